"""What a checkpoint's own tokenizer and processors make of text, pictures and sound.

The exporter loads them once (:func:`load`). What they return for an example is what a person hands
to PyTorch: the inputs of the package are read from it (``models/derive.py``), and it is a case on
which the package is compared. Drawn inputs look like it: :func:`like_the_task`.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ffmerge.models.derive import Made
from ffmerge.models.probe import Array, InputSpec, Tokens, picture

_PICTURES, _IDS = ("pixel_values", "pixel_values_videos"), ("input_ids", "decoder_input_ids")
_SOUND = ("input_values", "input_features")
# For two calls of unlike size: texts, height and width of a picture, samples of sound.
_TEXTS = (
    ("A word.", "A few more words."),
    ("A text of several words, and a longer one.", "Short."),
)
_SIZES, _SAMPLES = ((48, 64), (80, 56)), (8_000, 11_000)


@dataclass(frozen=True)
class Processors:
    """The tokenizer and the processors of a checkpoint, each None where it has none."""

    tokenizer: Any = None
    pictures: Any = None
    sound: Any = None


def load(folder: Path | None, accepted: Collection[str]) -> Processors:
    """Return what is in ``folder`` for a model whose ``forward`` takes what is ``accepted``."""
    if folder is None:
        return Processors()
    tokenizer = pictures = sound = None
    if not set(accepted).isdisjoint(_IDS):
        tokenizer = _loaded("AutoTokenizer", folder)
    if "pixel_values_videos" in accepted:
        pictures = _loaded("AutoVideoProcessor", folder)
    elif "pixel_values" in accepted:
        pictures = _loaded("AutoImageProcessor", folder)
    if not set(accepted).isdisjoint(_SOUND):
        sound = _loaded("AutoFeatureExtractor", folder)
    return Processors(tokenizer, pictures, sound)


def made(found: Processors, config: Any) -> Made:
    """Return what the processors return for two examples of unlike size, by name of the input."""
    first, second = (_call(found, config, number) for number in (0, 1))
    pairs = {}
    for name, array in first.items():
        if name in second and array.ndim == second[name].ndim:
            pairs[name] = (array, second[name])
    return pairs


def _call(found: Processors, config: Any, number: int) -> dict[str, Array]:
    """Return what the processors return for the example of a number."""
    arrays: dict[str, Array] = {}
    if found.tokenizer is not None:
        arrays |= _tried(lambda: _tokenized(found.tokenizer, config, _TEXTS[number]))
    if found.pictures is not None:
        frames = getattr(config, "num_frames", None) or getattr(config, "frames_per_clip", None)
        arrays |= _tried(lambda: _processed(found.pictures, _SIZES[number], frames))
    if found.sound is not None:
        arrays |= _tried(lambda: _heard(found.sound, _SAMPLES[number]))
    return arrays


def _tried(make: Any) -> dict[str, Array]:
    """Return the arrays that a processor returns; none where it wants to be called otherwise."""
    try:
        returned = dict(make())
    except Exception:  # processors of others raise whatever they like
        return {}
    arrays = {name: np.asarray(value) for name, value in returned.items()}
    return {name: array for name, array in arrays.items() if array.ndim and array.dtype != object}


def _tokenized(tokenizer: Any, config: Any, texts: Sequence[str]) -> Any:
    """Return texts as ids; those of a document with a box for each word."""
    longest = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", 0) or 512)
    settings = {"truncation": True, "max_length": max(longest, 8), "return_tensors": "np"}
    if tokenizer.pad_token is None:  # a batch of unlike texts cannot be made
        texts = texts[:1]
    else:
        settings["padding"] = True
    try:
        return tokenizer([*texts], **settings)
    except (ValueError, AssertionError, TypeError):
        words = [text.split() for text in texts]
        boxes = [[[10 + 20 * i, 10, 25 + 20 * i, 30] for i, _ in enumerate(row)] for row in words]
        return tokenizer(words, boxes=boxes, **settings)


def _processed(processor: Any, size: tuple[int, int], frames: int | None) -> Any:
    """Return two pictures as the processor makes them, or of a clip of ``frames`` pictures one."""
    from PIL import Image

    pictures = []
    for seed in range(frames or 2):
        pixels = np.rint(255 * picture((1, 3, *size), seed)[0]).astype(np.uint8)
        pictures.append(Image.fromarray(pixels.transpose(1, 2, 0)))
    if frames:
        return processor(pictures, return_tensors="np")
    return processor(images=pictures, return_tensors="np")


def _heard(extractor: Any, samples: int) -> Any:
    """Return two sounds of unlike length as the feature extractor makes them."""
    time = np.arange(samples) / extractor.sampling_rate
    waves = []
    for pitch, length in ((220, samples), (330, samples * 3 // 4)):
        wave = np.sin(2 * np.pi * pitch * time[:length]) * np.exp(-time[:length])
        waves.append(wave.astype(np.float32))
    rate = extractor.sampling_rate
    return extractor(waves, sampling_rate=rate, padding=True, return_tensors="np")


def like_the_task(
    specs: Sequence[InputSpec], found: Processors, config: Any
) -> tuple[InputSpec, ...]:
    """Return the inputs of a model with pictures and ids as the processor and tokenizer say.

    Without a processor pictures are in -1..1, without a tokenizer ids are any of the configuration.
    """
    drawn = []
    for spec in specs:
        if spec.name in _PICTURES:
            spec = _picture(spec, found.pictures)
        elif spec.name in _IDS and found.tokenizer is not None:
            spec = _text(spec, found.tokenizer, config)
        drawn.append(spec)
    return tuple(drawn)


def _loaded(kind: str, folder: Path) -> Any:
    """Return the processor in a folder, None where there is none, or one that is not known here."""
    import transformers

    try:
        return getattr(transformers, kind).from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError):
        return None


def _picture(spec: InputSpec, processor: Any) -> InputSpec:
    channels = int(spec.shape[-3])
    mean = getattr(processor, "image_mean", None)
    deviation = getattr(processor, "image_std", None)
    if processor is not None and not getattr(processor, "do_normalize", False):
        mean, deviation = [0.0] * channels, [1.0] * channels
    if not mean or not deviation or len(mean) != channels:
        mean = deviation = [0.5] * channels
    colours = tuple(zip(map(float, mean), map(float, deviation), strict=True))
    return replace(spec, kind="picture", colours=colours)


def _text(spec: InputSpec, tokenizer: Any, config: Any) -> InputSpec:
    """Return the ids of an encoder or language model as the tokenizer begins, ends and pads them.

    Those of a decoder begin as the configuration says, and have no end.
    """
    high = min(len(tokenizer), spec.high)
    special = tuple(sorted(i for i in set(tokenizer.all_special_ids) if i < high))
    if high <= len(special):
        return spec
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = tokenizer.eos_token_id
    if pad is None or pad >= spec.high:
        pad = 0
    first: Sequence[int] = ()
    last: Sequence[int] = ()
    if any("decoder" in str(dimension) for dimension in spec.shape):
        start = getattr(config, "decoder_start_token_id", None)
        if start is not None:
            first = (int(start),)
    else:
        first, last = _ends(_tokenized(tokenizer, config, ("a",))["input_ids"][0].tolist(), special)
    tokens = Tokens(special=special, pad=int(pad), first=tuple(first), last=tuple(last))
    return replace(spec, high=high, tokens=tokens)


def _ends(ids: Sequence[int], special: tuple[int, ...]) -> tuple[Sequence[int], Sequence[int]]:
    """Return the special ids before and behind those of a text."""
    plain = [at for at, token in enumerate(ids) if token not in special] or [0]
    return ids[: plain[0]], ids[plain[-1] + 1 :]
