"""Inputs as a checkpoint's own processor and tokenizer make them: the recipe to draw some."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ffmerge.models.probe import InputSpec, Probe, Tokens


def like_the_task(probe: Probe, folder: Path | None, config: Any) -> Probe:
    """Return the probe with pictures and ids as the processor and tokenizer in ``folder`` say.

    Without a processor pictures are in -1..1, without a tokenizer ids are any of the configuration.
    """
    import transformers

    def loaded(kind: str) -> Any:
        try:
            return getattr(transformers, kind).from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError):
            return None  # none there, or one that is not known here: nothing is said

    ways: dict[str, tuple[str, Callable[[InputSpec, Any, Any], InputSpec]]] = {
        "pixel_values": ("AutoImageProcessor", _picture),
        "input_ids": ("AutoTokenizer", _text),
        "decoder_input_ids": ("AutoTokenizer", _text),
    }
    specs = []
    for spec in probe.inputs:
        kind, fit = ways.get(spec.name, ("", _text))
        processor = loaded(kind) if folder and kind else None
        if spec.name == "pixel_values" or processor:
            spec = fit(spec, processor, config)
        specs.append(spec)
    return replace(probe, inputs=tuple(specs))


def _picture(spec: InputSpec, processor: Any, config: Any) -> InputSpec:
    channels = int(spec.shape[1])
    mean, deviation = (getattr(processor, f"image_{part}", None) for part in ("mean", "std"))
    if processor and not getattr(processor, "do_normalize", False):
        mean, deviation = [0.0] * channels, [1.0] * channels
    if not mean or not deviation or len(mean) != channels:
        mean = deviation = [0.5] * channels
    colours = tuple((float(m), float(d)) for m, d in zip(mean, deviation, strict=True))
    return replace(spec, kind="picture", colours=colours)


def _text(spec: InputSpec, tokenizer: Any, config: Any) -> InputSpec:
    """An encoder's and a language model's ids begin and end as the tokenizer has it."""
    high = min(len(tokenizer), spec.high)
    special = tuple(sorted(i for i in set(tokenizer.all_special_ids) if i < high))
    if high <= len(special):
        return spec
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    first, last = _ends(tokenizer("a")["input_ids"], special)
    decodes = any("decoder" in str(dimension) for dimension in spec.shape)
    start = getattr(config, "decoder_start_token_id", None)
    tokens = Tokens(
        special, int(pad if pad is not None and pad < spec.high else 0),
        first if not decodes else () if start is None else (int(start),),
        () if decodes else last,
    )  # fmt: skip
    return replace(spec, high=high, tokens=tokens)


def _ends(ids: Sequence[int], special: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    plain = [i for i, token in enumerate(ids) if token not in special] or [0]
    return tuple(ids[: plain[0]]), tuple(ids[plain[-1] + 1 :])
