"""Rows of a table or a loader as one batch of numpy arrays."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ffmerge.errors import InputError
from ffmerge.models.metrics import IGNORED
from ffmerge.models.probe import Array


def stacked(columns: Mapping[str, Sequence[Array]]) -> dict[str, Array]:
    """Return rows as one batch: tokens of rows that differ in length are padded at the end.

    Raises:
        InputError: they differ, and no mask says what would be padding.
    """
    batch = {}
    for name, values in columns.items():
        if len({value.shape for value in values}) > 1:
            mask = "decoder_attention_mask" if name.startswith("decoder") else "attention_mask"
            is_marked = name == "labels" or mask in columns
            if values[0].ndim != 1 or not is_marked:
                raise InputError(
                    f"the rows of {name!r} differ in shape, and there is no {mask}: pad them."
                )
            values = _padded(values, IGNORED if name == "labels" else 0)
        batch[name] = np.stack(values)
    return batch


def _padded(rows: Sequence[Array], filler: int) -> list[Array]:
    longest = max(len(row) for row in rows)
    return [np.pad(row, (0, longest - len(row)), constant_values=filler) for row in rows]


def array_of(values: Any) -> Array:
    """Return a sequence or a tensor of any device as an array."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
    return np.asarray(values)
