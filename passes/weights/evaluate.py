"""How good a model is on examples: its task metric, or without labels its fidelity."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ffmerge.errors import InputError
from ffmerge.models.examples import Examples
from ffmerge.models.inputs import forward
from ffmerge.models.metrics import Metric, for_task, labels_of
from ffmerge.models.probe import Array
from ffmerge.models.tasks import base
from ffmerge.passes.weights.activations import positions


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
    metric or nothing to hold it against, and if ``criterion`` is ``fidelity``.

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
    original = [_output(model, batch) for batch in examples.batches(batch_size)]
    return Score("fidelity", _fidelity(original, examples, batch_size), True)


def _labelled(
    metric: Metric, task: str, examples: Examples, batch_size: int
) -> Callable[[Any], float]:
    def measure(model: Any) -> float:
        total, count = 0.0, 0
        for batch in examples.batches(batch_size):
            logits, labels = _output(model, batch), labels_of(task, batch)
            if logits.shape[: labels.ndim] != labels.shape:
                raise InputError(
                    f"labels of shape {labels.shape} do not fit outputs of shape {logits.shape}."
                )
            part, seen = metric.add(logits, labels)
            total, count = total + part, count + seen
        return metric.value(total, count)

    return measure


def _fidelity(original: list[Array], examples: Examples, batch_size: int) -> Callable[[Any], float]:
    def measure(model: Any) -> float:
        cosines = []
        for batch, expected in zip(examples.batches(batch_size), original, strict=True):
            got = _output(model, batch)
            dots = (got * expected).sum(-1)
            cosine = dots / (np.linalg.norm(got, axis=-1) * np.linalg.norm(expected, axis=-1))
            last = "decoder_input_ids" if model.config.is_encoder_decoder else model.main_input_name
            if cosine.ndim == 2:
                cosine = cosine[positions(model, batch, (last,), cosine.shape).numpy()]
            cosines.append(cosine.ravel())
        return float(np.concatenate(cosines).mean())

    return measure


def _output(model: Any, batch: dict[str, Array]) -> Array:
    with torch.no_grad():
        output = forward(model, batch)
    first = output["logits"] if "logits" in output else output[0]
    return np.asarray(first.float().cpu().numpy())
