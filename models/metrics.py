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

    Raises:
        InputError: the batch has no labels and the task needs them.
    """
    if "labels" in batch:
        return batch["labels"]
    if base(task) != "text-generation" or "input_ids" not in batch:
        raise InputError(f"the examples have no labels, and {task} is measured against labels.")
    mask = batch.get("attention_mask", np.ones_like(batch["input_ids"]))
    return np.where(mask != 0, batch["input_ids"], IGNORED)


def _count_right(logits: Array, labels: Array) -> tuple[float, int]:
    right = logits.argmax(-1) == labels  # never so where ignored
    return float(right.sum()), int((labels != IGNORED).sum())


def _next_token_loss(logits: Array, labels: Array) -> tuple[float, int]:
    return _token_loss(logits[:, :-1], labels[:, 1:])


def _token_loss(logits: Array, labels: Array) -> tuple[float, int]:
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
