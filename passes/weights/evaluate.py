"""How good a model is on examples: its task metric, or without labels its fidelity."""

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ffmerge.errors import FfmergeWarning, InputError
from ffmerge.models.examples import Examples
from ffmerge.models.inputs import forward, main_output
from ffmerge.models.metrics import IGNORED, Metric, for_task, labels_of
from ffmerge.models.probe import Array
from ffmerge.models.tasks import base
from ffmerge.passes.weights.activations import positions
from ffmerge.passes.weights.parts import rows_by_logits, split

HELD = 1 << 26  # elements of the original's outputs that fidelity holds

_NOT_FINITE = "the model puts out NaN or infinite values on this data: nothing can be measured."


@dataclass(frozen=True)
class Score:
    """A named measure of a model; a higher ``rank`` is always better."""

    name: str
    measure: Callable[[Any], float]
    higher_is_better: bool

    def rank(self, value: float) -> float:
        """Return ``value`` turned so that higher is better."""
        return value if self.higher_is_better else -value


def score_for(
    model: Any, task: str, examples: Examples, batch_size: int, criterion: str = "metric"
) -> Score:
    """Return the task's metric on ``examples``, or the fidelity to ``model`` as it is now.

    Fidelity is the mean cosine between the outputs of the model that is measured and those of
    the original: it needs no labels and is 1 for the original. It is taken where there is no
    metric or nothing to hold it against, and if ``criterion`` is ``fidelity``. Of many outputs
    it goes by some, at even distances: ``HELD`` elements are kept of the original's.

    Raises:
        InputError: there is no such criterion.
    """
    if criterion not in ("metric", "fidelity"):
        raise InputError(f"there is no criterion {criterion!r}: choose metric or fidelity.")
    task = base(task)
    if task == "automatic-speech-recognition" and model.config.is_encoder_decoder:
        task = "text2text-generation"  # other models of this task give frames, not tokens
    metric = for_task(task) if criterion == "metric" else None
    first = next(iter(examples.batches(batch_size)))
    if metric and ("labels" in first or task == "text-generation"):
        measure = _labelled(metric, task, examples, batch_size)
        return Score(metric.name, measure, metric.higher_is_better)
    original = []
    for batch in _parts(model, examples, batch_size):
        output = _output(model, batch)
        kept = _counted(model, batch, output, len(examples))
        original.append((kept, _vectors(output)[kept]))
    return Score("fidelity", _fidelity(original, examples, batch_size), True)


def warn_near_chance(model: Any, name: str, value: float, rows: int) -> None:
    """Warn if the original measures no better than guessing: then data or labels do not fit it.

    For accuracy that is within two standard errors of one in so many classes; for perplexity
    more than half the vocabulary.
    """
    if name == "accuracy":
        guess = 1 / max(model.config.num_labels, 1)
        near = value < min(guess + 2 * math.sqrt(guess * (1 - guess) / rows), 1)
    elif name == "perplexity":
        guess = float(model.config.get_text_config(decoder=True).vocab_size)
        near = value > guess / 2
    else:
        return
    if near:
        warnings.warn(
            f"the original's {name} is {value:.4g} on {rows} examples, and guessing gives "
            f"{guess:.4g}: do the data and its labels fit this model?",
            FfmergeWarning,
            stacklevel=2,
        )


def _labelled(
    metric: Metric, task: str, examples: Examples, batch_size: int
) -> Callable[[Any], float]:
    def measure(model: Any) -> float:
        total, count = 0.0, 0
        for batch in _parts(model, examples, batch_size):
            logits, labels = _output(model, batch), labels_of(task, batch)
            if logits.shape[: labels.ndim] != labels.shape:
                raise InputError(
                    f"labels of shape {labels.shape} do not fit outputs of shape {logits.shape}."
                )
            part, seen = metric.add(logits, labels)
            if metric.higher_is_better:  # the largest of NaN is a class like any other
                highest = logits[labels != IGNORED].max(-1)
                _finite(float(np.abs(highest).max(initial=0)))
            total, count = total + part, count + seen
        return _finite(metric.value(total, count))

    return measure


def _fidelity(
    original: list[tuple[Array, Array]], examples: Examples, batch_size: int
) -> Callable[[Any], float]:
    def measure(model: Any) -> float:
        cosines = []
        parts = _parts(model, examples, batch_size)
        for batch, (kept, expected) in zip(parts, original, strict=True):
            got = _vectors(_output(model, batch))[kept]
            dots = (got * expected).sum(-1)
            lengths = np.linalg.norm(got, axis=-1) * np.linalg.norm(expected, axis=-1)
            cosines.append(dots / lengths)
        return _finite(float(np.concatenate(cosines).mean()))

    return measure


def _counted(model: Any, batch: dict[str, Array], output: Array, rows: int) -> Array:
    """Return the numbers of the vectors of an output that count: no padding, and not too many.

    Together those of all ``rows`` of the examples have at most about ``HELD`` elements.
    """
    counted = np.arange(output[..., 0].size)
    if output.ndim == 3:
        last = "decoder_input_ids" if model.config.is_encoder_decoder else model.main_input_name
        real = positions(model, batch, (last,), output.shape[:2])
        counted = np.flatnonzero(real.numpy())
    share = HELD * len(output) // rows // output.shape[-1]
    step = -(-len(counted) // max(share, 1))
    return counted[:: max(step, 1)]


def _vectors(output: Array) -> Array:
    return output.reshape(-1, output.shape[-1])


def _parts(model: Any, examples: Examples, batch_size: int) -> Iterator[dict[str, Array]]:
    """Yield the examples in batches whose logits fit in memory."""
    for batch in examples.batches(batch_size):
        yield from split(batch, rows_by_logits(model, batch))


def _output(model: Any, batch: dict[str, Array]) -> Array:
    with torch.no_grad():
        output = main_output(forward(model, batch))
    return np.asarray(output.float().cpu().numpy())


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise InputError(_NOT_FINITE)
    return value
