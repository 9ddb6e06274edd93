"""The inputs of a model, derived from its ``forward``, its configuration and its own processor.

:func:`input_specs` is asked by whatever runs a model without data: finding sublayers, proving them,
export. What the checkpoint's tokenizer or processor returns comes first (``models/processing.py``);
where there is none, a rule for each name of an argument reads its size from the configuration. What
neither tells has to be given as an example (:func:`of_example`).
"""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ffmerge.errors import InputError
from ffmerge.models.probe import LARGE, Array, InputSpec, Probe, Tokens

Made = Mapping[str, tuple[Array, Array]]  # what a processor returns for two calls of unlike size

# Batch sizes and lengths on which a package is compared with PyTorch.
_CASES = ((1, 7), (3, 5), (8, 11))
_FEW = (1, 2, 3)  # batch sizes where a row is large: PyTorch takes most of an export for more
_IMAGE_SIZE = 224  # convolutional models name none: any will do
_SAMPLES = 400  # of sound for one length of text: convolutions shorten it before the layers
_FRAMES = 16  # the same for frames of a spectrogram
_TEXT = ("batch_size", "sequence_length")
# Arguments of ``forward`` that are no inputs: what is asked for, and what stands for other inputs.
_SETTINGS = (
    "use_cache", "return_dict", "return_loss", "output_", "past_key_values", "cache",
    "logits_to_keep", "interpolate_pos_encoding", "start_positions", "end_positions",
    "encoder_outputs", "kwargs", "args", "target_values",
)  # fmt: skip


@dataclass(frozen=True)
class _Source:
    """What inputs are derived from."""

    model: Any
    accepted: tuple[str, ...]
    required: tuple[str, ...]
    made: Made

    def number(self, *names: str) -> int:
        """Return the first number of the configuration under one of the names, 0 if there is none.

        A configuration of several parts is asked itself, then its text, its picture, its sound.
        """
        config = self.model.config
        parts = [config, config.get_text_config()]
        parts += [getattr(config, f"{kind}_config", None) for kind in ("vision", "audio")]
        for part in parts:
            for name in names:
                value = getattr(part, name, None)
                if isinstance(value, int) and not isinstance(value, bool):
                    return value
        return 0


def arguments(model: Any) -> dict[str, inspect.Parameter]:
    """Return the arguments of a model's ``forward`` that can be inputs, by name."""
    found = {}
    for name, parameter in inspect.signature(model.forward).parameters.items():
        if not name.startswith(_SETTINGS) and not name.endswith("labels"):
            found[name] = parameter
    return found


def input_specs(model: Any, made: Made | None = None) -> tuple[InputSpec, ...]:
    """Return the inputs of a transformers model with optimum's names and dynamic dimensions.

    Raises:
        InputError: an argument that ``forward`` needs cannot be derived.
    """
    accepted, required = arguments(model), required_of(model)
    source = _Source(model, tuple(accepted), required, made or {})
    specs = _by_rule(source)
    for name in source.made:
        if name in accepted and name not in specs and name != "attention_mask":
            specs[name] = _of_arrays(name, *source.made[name])
    missing = [name for name in required if name not in specs]
    if missing or not specs:
        raise InputError(not_derived(model))
    return tuple(specs.values())


def required_of(model: Any) -> tuple[str, ...]:
    """Return the arguments without which ``forward`` cannot be called."""
    found = arguments(model).items()
    return tuple(name for name, given in found if given.default is inspect.Parameter.empty)


def _by_rule(source: _Source) -> dict[str, InputSpec]:
    specs = {}
    for name, rule in _RULES.items():
        if name in source.accepted and (spec := rule(source, name)):
            specs[name] = spec
    return specs


def not_derived(model: Any) -> str:
    """Say which arguments an example has to hold."""
    needed = required_of(model) or left_out(model, ())
    return (
        f"the inputs of {type(model).__name__} cannot be derived from its configuration: export it "
        f"with --example FILE.npz, which holds a row or more of {', '.join(needed)}."
    )


def left_out(model: Any, specs: tuple[InputSpec, ...]) -> tuple[str, ...]:
    """Return the arguments of ``forward`` that no package reads: they keep their default."""
    known = {spec.name for spec in specs}
    names = []
    for name in arguments(model):
        is_other_form = name.endswith(("_embeds", "head_mask")) or "encoder_" in name
        if name not in known and not is_other_form:
            names.append(name)
    return tuple(names)


def of_example(model: Any, arrays: Mapping[str, Array]) -> tuple[InputSpec, ...]:
    """Return the inputs that rows of an example are: names, types, any number of rows.

    Other sizes are dynamic where a rule knows the input, else those of the example. What is drawn
    later stays in the range of the example.

    Raises:
        InputError: the model takes no argument of a name.
    """
    accepted = arguments(model)
    if unknown := [name for name in arrays if name not in accepted]:
        raise InputError(
            f"{type(model).__name__} takes no {', '.join(unknown)}: of the example, it takes "
            f"{', '.join(accepted)}."
        )
    known = _by_rule(_Source(model, tuple(accepted), required_of(model), {}))
    specs = []
    for name, array in arrays.items():
        spec = _of_arrays(name, array, array)
        if name in known and fits(known[name], array):
            spec = known[name]
        specs.append(spec)
    return tuple(specs)


def fits(spec: InputSpec, array: Array) -> bool:
    """Tell whether an array has the sizes of an input that are fixed."""
    if len(spec.shape) != array.ndim:
        return False
    pairs = zip(spec.shape, array.shape, strict=True)
    return all(isinstance(size, str) or size == other for size, other in pairs)


def probe(model: Any, specs: tuple[InputSpec, ...]) -> Probe:
    """Return the fixed inputs on which ``model`` and its package are compared."""
    longest = getattr(model.config, "max_position_embeddings", None) or 0
    if longest <= 0:  # XLNet has -1: no bound
        longest = _CASES[-1][1]
    dimensions = [name for spec in specs for name in spec.shape if isinstance(name, str)]
    cases, large = [], any(_is_large(spec) for spec in specs)
    for number, (rows, length) in enumerate(_CASES):
        if large:
            rows = _FEW[number]
        known = {
            "batch_size": rows,
            "sequence_length": min(length, longest),
            "decoder_sequence_length": length - 2,
            "samples": length * _SAMPLES,
            "frames": length * _FRAMES,
        }
        cases.append({name: known.get(name, length) for name in dimensions})
    return Probe(specs, tuple(cases))


def _is_large(spec: InputSpec) -> bool:
    sizes = [size for size in spec.shape[1:] if isinstance(size, int)]
    return math.prod(sizes) > LARGE


def _pictures(source: _Source, name: str) -> InputSpec:
    """Return pictures as (rows, channels, height, width), clips with frames before the channels."""
    if name in source.made:
        return InputSpec(
            name, "float32", ("batch_size", *source.made[name][0].shape[1:]), needed=True
        )
    config = source.model.config
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", None) or getattr(vision, "crop_size", _IMAGE_SIZE)
    shape: tuple[int, ...] = (source.number("num_channels", "in_chans") or 3, *_pair(size))
    frames = source.number("num_frames", "frames_per_clip")
    if frames:
        shape = (frames, *shape)
    return InputSpec(name, "float32", ("batch_size", *shape), needed=True)


def _features(source: _Source, name: str) -> InputSpec | None:
    """Return the spectrogram of sound, of one length where positions are counted by it."""
    if name in source.made:
        return _of_arrays(name, *source.made[name], length="frames")
    bins, positions = source.number("num_mel_bins"), source.number("max_source_positions")
    by_frame = source.number("feature_projection_input_dim", "input_feat_per_channel")
    by_frame *= source.number("input_channels") or 1
    if by_frame:
        return InputSpec(name, "float32", ("batch_size", "frames", by_frame), needed=True)
    if bins and positions:
        return InputSpec(name, "float32", ("batch_size", bins, 2 * positions), needed=True)
    return None


def _sound(source: _Source, name: str) -> InputSpec:
    """Return a wave as (rows, samples), or a spectrogram where the model counts bins."""
    if name in source.made:
        return _of_arrays(name, *source.made[name], length="samples")
    frames, bins = source.number("max_length"), source.number("num_mel_bins")
    if frames and bins:
        return InputSpec(name, "float32", ("batch_size", frames, bins), needed=True)
    return InputSpec(name, "float32", ("batch_size", "samples"), needed=True)


def _ids(source: _Source, name: str) -> InputSpec:
    """Return the ids of text; what an encoder-decoder with another head reads ends as text does."""
    high, shape = source.number("vocab_size"), _TEXT
    if name.startswith("decoder"):
        high = source.number("decoder_vocab_size") or high
        shape = ("batch_size", "decoder_sequence_length")
    model, tokens = source.model, None
    end = getattr(model.config, "eos_token_id", None)
    pad = getattr(model.config, "pad_token_id", None)
    if model_decodes(model) and not model.can_generate() and isinstance(end, int):
        special = [token for token in (end, pad) if isinstance(token, int)]
        tokens = Tokens(tuple(sorted(special)), pad or 0, last=(end,))
    return InputSpec(name, "int64", shape, "integer", high, tokens, needed=True)


def _mask(source: _Source, name: str) -> InputSpec | None:
    """Return the mask of text, and of sound where its processor makes one."""
    if "input_ids" in source.accepted:
        return InputSpec(name, "int64", _TEXT, "mask")
    sound = [spec for spec in ("input_values", "input_features") if spec in source.accepted]
    if not sound:
        return None
    read = _RULES[sound[0]](source, sound[0])
    if source.made:
        wanted = name in source.made
    else:  # a model whose features are normalized in groups was trained without one
        wanted = getattr(source.model.config, "feat_extract_norm", "layer") == "layer"
    if not wanted or read is None or not isinstance(read.shape[1], str):
        return None
    return InputSpec(name, "int64", read.shape[:2], "mask")


def _companion(*sizes: str, shape: tuple[int | str, ...] = _TEXT, kind: str = "integer") -> Any:
    """Return the rule of an integer beside every id, below the first of the ``sizes`` there is."""

    def rule(source: _Source, name: str) -> InputSpec | None:
        high = source.number(*sizes)
        if high < 2:
            return None
        return InputSpec(name, "int64", shape, kind, high)

    return rule


def _languages(source: _Source, name: str) -> InputSpec | None:
    """Return the language of every id, unless a tokenizer leaves it out: so do its users."""
    config = source.model.config
    if source.made and name not in source.made:
        return None
    if not getattr(config, "use_lang_emb", True) or source.number("n_langs") < 2:
        return None
    return InputSpec(name, "int64", _TEXT, "integer", source.number("n_langs"), needed=True)


def _row_language(source: _Source, name: str) -> InputSpec | None:
    languages = getattr(source.model.config, "languages", ())
    if not languages or getattr(source.model.config, "default_language", None):
        return None
    return InputSpec(name, "int64", ("batch_size",), "integer", len(languages), needed=True)


def _tasks(source: _Source, name: str) -> InputSpec | None:
    if not getattr(source.model.config, "use_task_id", True):
        return None
    rule: Callable[[_Source, str], InputSpec | None] = _companion("task_type_vocab_size")
    return rule(source, name)


def _decoder_ids(source: _Source, name: str) -> InputSpec | None:
    """Return the ids of a decoder, unless the model makes them of what its encoder reads."""
    model = source.model
    if not model_decodes(model):
        return None
    if not model.can_generate() and _makes_decoder_ids(model):
        return None
    return _ids(source, name)


def _makes_decoder_ids(model: Any) -> bool:
    """Tell whether an encoder-decoder answers without ids for its decoder."""
    if "input_ids" not in arguments(model):
        return False
    end = getattr(model.config, "eos_token_id", None) or 0
    ids = torch.full((1, 3), int(end if isinstance(end, int) else end[0]), device=model.device)
    ids[0, :2] = 0 if end else 1
    try:
        with torch.no_grad():
            model(input_ids=ids)
    except ValueError:
        return False
    except Exception:  # for another reason, such as values to look at without weights
        return True
    return True


def _series(source: _Source, name: str) -> InputSpec | None:
    """Return an input of a time series: rows, steps of the past or the future, channels."""
    config = source.model.config
    length, ahead = source.number("context_length"), source.number("prediction_length")
    lags = getattr(config, "lags_sequence", None)
    if not length:
        return None
    channels = source.number("num_input_channels", "input_size") or 1
    values: tuple[int | str, ...] = (channels,)
    if lags:
        length += max(lags)
        if channels == 1:
            values = ()
    time = (source.number("num_time_features"),)
    steps, each, kind = {
        "past_values": (length, values, "normal"),
        "past_observed_mask": (length, values, "mask"),
        "past_time_features": (length, time, "normal"),
        "future_values": (ahead, values, "normal"),
        "future_time_features": (ahead, time, "normal"),
    }[name]
    of_future = name.startswith("future")
    if of_future and not (lags and model_decodes(source.model)):
        return None
    if name == "past_observed_mask" and name not in source.required:
        return None
    if each == (0,):
        return None
    return InputSpec(name, "float32", ("batch_size", steps, *each), kind, needed=kind != "mask")


def model_decodes(model: Any) -> bool:
    """Tell whether a model is one of an encoder and a decoder."""
    return bool(getattr(model.config, "is_encoder_decoder", False))


def _static(source: _Source, name: str) -> InputSpec | None:
    """Return what is known of a whole series: numbers, or kinds with a vocabulary each."""
    count = source.number(f"num_{name}")
    if not count:
        return None
    if "real" in name:
        return InputSpec(name, "float32", ("batch_size", count), needed=True)
    high = min(source.model.config.cardinality)
    return InputSpec(name, "int64", ("batch_size", count), "integer", high, needed=True)


_RULES: dict[str, Callable[[_Source, str], InputSpec | None]] = {
    "pixel_values": _pictures,
    "pixel_values_videos": _pictures,
    "input_features": _features,
    "input_values": _sound,
    "input_ids": _ids,
    "bbox": _companion("max_2d_position_embeddings", shape=(*_TEXT, 4), kind="boxes"),
    "attention_mask": _mask,
    "token_type_ids": _companion("type_vocab_size"),
    "task_type_ids": _tasks,
    "langs": _languages,
    "lang_ids": _row_language,
    "decoder_input_ids": _decoder_ids,
    "past_values": _series,
    "past_time_features": _series,
    "past_observed_mask": _series,
    "static_categorical_features": _static,
    "static_real_features": _static,
    "future_values": _series,
    "future_time_features": _series,
}


def _of_arrays(
    name: str, first: Array, second: Array, length: str = "sequence_length"
) -> InputSpec:
    """Return the input that two arrays of one name are: where they differ in size it is dynamic.

    ``length`` is the name of the first dimension behind the rows that is.
    """
    shape: list[int | str] = ["batch_size"]
    for axis, (size, other) in enumerate(zip(first.shape[1:], second.shape[1:], strict=True), 1):
        if size == other:
            shape.append(int(size))
        elif length in shape:
            shape.append(f"{name}_{axis}")
        else:
            shape.append(length)
    kinds = {"f": "float32", "i": "int64", "u": "int64", "b": "bool"}
    if first.dtype.kind not in kinds:
        raise InputError(f"{name} is an array of {first.dtype}, not of numbers.")
    dtype = kinds[first.dtype.kind]
    if dtype == "float32":
        return InputSpec(name, dtype, tuple(shape), needed=True)
    if name.endswith("mask") and first.ndim == 2:
        return InputSpec(name, dtype, tuple(shape), "mask")
    high = 1 + int(max(first.max(initial=1), second.max(initial=1)))
    return InputSpec(name, dtype, tuple(shape), "integer", high, needed=True)


def _pair(size: Any) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    height, width = size
    return int(height), int(width)
