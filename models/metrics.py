"""Task metrics as running sums, the same numbers for PyTorch and for a runtime.

The search and the exporter feed one the logits that PyTorch gives, the runtime tests those of a
package, batch by batch, each with its labels (:func:`labels_of`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from ffmerge.errors import InputError
from ffmerge.models.probe import Array
from ffmerge.models.tasks import base

IGNORED = -100  # the label transformers gives to positions that do not count


@dataclass(frozen=True)
class Metric:
    """A task metric: ``add`` gives the sum and the count of one batch, ``value`` their result.

    Sums and counts of batches add up, so no batch has to be kept.
    """

    name: str
    higher_is_better: bool
    add: Callable[[Array, Array], tuple[float, int]]
    value: Callable[[float, int], float]


def for_task(task: str) -> Metric | None:
    """Return the metric of a task, or None when it has none here."""
    task = base(task)
    if task == "text-generation":
        return PERPLEXITY
    if task == "text2text-generation":
        return TARGET_PERPLEXITY
    if task in ("image-classification", "text-classification", "token-classification"):
        return ACCURACY
    return None


def labels_of(task: str, batch: Mapping[str, Array]) -> Array:
    """Return a batch's labels; a language model's are its own tokens, padding ignored.

    Nor counts its first token behind padding on the left: there is nothing to foretell it from.

    Raises:
        InputError: the batch has no labels and the task needs them.
    """
    is_language = base(task) == "text-generation" and "input_ids" in batch
    if "labels" not in batch and not is_language:
        raise InputError(f"the examples have no labels, and {task} is measured against labels.")
    if not is_language:
        return batch["labels"]
    ids = batch["input_ids"]
    labels = batch.get("labels", ids)
    mask = np.asarray(batch.get("attention_mask", np.ones_like(ids))) != 0
    if mask.shape != labels.shape:
        return labels
    foretold = mask.copy()
    foretold[:, 1:] &= mask[:, :-1]
    return np.where(foretold, labels, IGNORED)


def _count_right(logits: Array, labels: Array) -> tuple[float, int]:
    _check_range(logits, labels)
    right = logits.argmax(-1) == labels  # never so where ignored
    return float(right.sum()), int((labels != IGNORED).sum())


def _check_range(logits: Array, labels: Array) -> None:
    """Raise InputError unless every label that counts is one of the classes."""
    classes = logits.shape[-1]
    wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= classes))]
    if wrong.size:
        raise InputError(
            f"the label {wrong[0]} is none of the model's, which are 0 to {classes - 1}."
        )


def _next_token_loss(logits: Array, labels: Array) -> tuple[float, int]:
    return _token_loss(logits[:, :-1], labels[:, 1:])


def _token_loss(logits: Array, labels: Array) -> tuple[float, int]:
    _check_range(logits, labels)
    total, count = 0.0, 0
    for row, targets in zip(logits, labels, strict=True):  # bounds the memory
        counted = targets != IGNORED
        scores = row[counted].astype(np.float64)
        scores -= scores.max(-1, keepdims=True)
        picked = np.take_along_axis(scores, targets[counted][:, None].astype(np.int64), -1)
        total += float(np.log(np.exp(scores).sum(-1)).sum() - picked.sum())
        count += int(counted.sum())
    return total, count


def _mean(total: float, count: int) -> float:
    if not count:
        raise InputError("the examples have no label that counts.")
    return total / count


def _perplexity(total: float, count: int) -> float:
    return float(np.exp(_mean(total, count)))


ACCURACY = Metric("accuracy", True, _count_right, _mean)
PERPLEXITY = Metric("perplexity", False, _next_token_loss, _perplexity)
# of an encoder-decoder: position i of the decoder foretells label i
TARGET_PERPLEXITY = Metric("perplexity", False, _token_loss, _perplexity)
