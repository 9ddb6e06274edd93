"""Batches in parts that fit in memory: what one forward pass of a large vocabulary would fill.

The measures (``evaluate.py``) bound the logits of a pass, recovery (``recover.py``) what PyTorch
keeps for the gradients of one.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ffmerge.models.probe import Array

LOGITS = 1 << 29  # bytes of the logits of one forward pass
# Bytes of what a pass keeps for its gradients. All in all one of a language model takes 2.5 times
# that: measured with SmolLM2-135M, 5 rows of 256 tokens.
SAVED = 1 << 30


def split(batch: Mapping[str, Array], rows: int) -> Iterator[dict[str, Array]]:
    """Yield a batch in parts of so many rows, in order, padded as they are."""
    for start in range(0, _rows(batch), rows):
        yield {name: array[start : start + rows] for name, array in batch.items()}


def rows_by_logits(model: Any, batch: Mapping[str, Array]) -> int:
    """Return how many rows of a batch one pass takes, so that its logits take ``LOGITS`` bytes.

    All, where the model has no scores of a vocabulary.
    """
    head = model.get_output_embeddings()
    if head is None:
        return _rows(batch)
    length = max(array.shape[1] for array in batch.values() if array.ndim > 1)
    return max(LOGITS // (4 * length * head.weight.shape[0]), 1)


def rows_by_gradients(
    model: Any, batch: Mapping[str, Array], loss: Callable[[dict[str, Array]], Any]
) -> int:
    """Return how many rows of a batch one pass takes, so that it keeps ``SAVED`` bytes.

    ``loss`` of the first row is computed, to see what that keeps beside the model's weights.
    """
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}  # bytes by storage

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss(next(split(batch, 1)))
    return max(SAVED // max(sum(kept.values()), 1), 1)


def _rows(batch: Mapping[str, Array]) -> int:
    return len(next(iter(batch.values())))
