"""Inputs drawn as a checkpoint's own processor and tokenizer would make them.

The exporter calls :func:`like_the_task` with the probes of all graphs of a package, which say what
inputs there are, and gets them back saying also which pictures and ids look like real ones.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ffmerge.models.probe import InputSpec, Probe, Tokens

_PICTURES, _IDS = "pixel_values", ("input_ids", "decoder_input_ids")


def like_the_task(probes: Sequence[Probe], folder: Path | None, config: Any) -> list[Probe]:
    """Return the probes with pictures and ids as the processor and tokenizer in ``folder`` say.

    Without a processor pictures are in -1..1, without a tokenizer ids are any of the configuration.
    """
    names = {spec.name for probe in probes for spec in probe.inputs}
    processor = tokenizer = None
    if folder and _PICTURES in names:
        processor = _loaded("AutoImageProcessor", folder)
    if folder and not names.isdisjoint(_IDS):
        tokenizer = _loaded("AutoTokenizer", folder)
    return [_like(probe, processor, tokenizer, config) for probe in probes]


def _like(probe: Probe, processor: Any, tokenizer: Any, config: Any) -> Probe:
    specs = []
    for spec in probe.inputs:
        if spec.name == _PICTURES:
            spec = _picture(spec, processor)
        elif spec.name in _IDS and tokenizer is not None:
            spec = _text(spec, tokenizer, config)
        specs.append(spec)
    return replace(probe, inputs=tuple(specs))


def _loaded(kind: str, folder: Path) -> Any:
    """Return the processor in a folder, None where there is none, or one that is not known here."""
    import transformers

    try:
        return getattr(transformers, kind).from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError):
        return None


def _picture(spec: InputSpec, processor: Any) -> InputSpec:
    channels = int(spec.shape[1])
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
        first, last = _ends(tokenizer("a")["input_ids"], special)
    tokens = Tokens(special=special, pad=int(pad), first=tuple(first), last=tuple(last))
    return replace(spec, high=high, tokens=tokens)


def _ends(ids: Sequence[int], special: tuple[int, ...]) -> tuple[Sequence[int], Sequence[int]]:
    """Return the special ids before and behind those of a text."""
    plain = [at for at, token in enumerate(ids) if token not in special] or [0]
    return ids[: plain[0]], ids[plain[-1] + 1 :]
