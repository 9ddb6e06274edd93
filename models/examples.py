"""Rows that become model inputs when they are asked for.

``models/data.py`` makes these of whatever the user gives; statistics, metrics, recovery and the
runtime tests read them in batches of numpy arrays. Nothing here needs torch.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ffmerge.errors import FfmergeWarning, InputError
from ffmerge.models.probe import Array


@dataclass(frozen=True)
class Examples:
    """Rows that become model inputs when they are asked for, so none is held longer than needed.

    ``lengths`` are about those of rows that are padded to the longest of their batch.
    """

    rows: Sequence[int]
    take: Callable[[Sequence[int]], dict[str, Array]]
    lengths: Mapping[int, int] | None = None

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows)

    def batches(self, size: int) -> Iterator[dict[str, Array]]:
        """Yield all rows as model inputs, ``size`` at a time, with ``labels`` if known.

        They are in order, but for rows that have ``lengths``: those of like length are side by
        side, or most of what a model computes would be padding. Such batches come in an order that
        is drawn, each time the same, so that the first ones are of all lengths.

        Raises:
            InputError: a value is NaN or infinite.
        """
        rows = self.rows
        if self.lengths:
            rows = sorted(rows, key=self.lengths.__getitem__)
        parts = [rows[start : start + size] for start in range(0, len(rows), size)]
        if self.lengths:
            parts = [sorted(part) for part in parts]
            np.random.default_rng(0).shuffle(parts)
        for part in parts:
            batch = self.take(part)
            check_finite(batch, part)
            yield batch

    def of(self, rows: Sequence[int]) -> "Examples":
        """Return some of the rows."""
        return replace(self, rows=rows)

    def longest(self) -> "Examples":
        """Return the row that takes most, or all of them where it is not known."""
        if not self.lengths:
            return self
        return self.of([max(self.rows, key=self.lengths.__getitem__)])

    def halves(self) -> tuple["Examples", "Examples"]:
        """Return the rows at even and at odd places; twice the same row if there is only one.

        That is warned of: what is fitted to a row says of the same row that nothing was lost.
        """
        if len(self.rows) == 1:
            warnings.warn(
                "the data has one row: it is fitted to and measured on the same one, so figures "
                "say nothing of other data: give more rows.",
                FfmergeWarning,
                stacklevel=2,
            )
        return self.of(self.rows[::2]), self.of(self.rows[1::2] or self.rows)


def with_held_out(
    calibration: Examples | None, held_out: Examples | None
) -> tuple[Examples | None, Examples | None]:
    """Return both; where nothing is held out, every other row of the calibration is."""
    if calibration is None or held_out is not None:
        return calibration, held_out
    return calibration.halves()


def check_finite(batch: Mapping[str, Array], rows: Sequence[int]) -> None:
    """Raise InputError, naming input and row, if a value of a batch is NaN or infinite."""
    for name, array in batch.items():
        if array.dtype.kind not in "fc" or np.isfinite(array).all():
            continue
        bad = ~np.isfinite(array)
        row = rows[int(np.argmax(bad.reshape(len(array), -1).any(1)))]
        raise InputError(f"row {row} of the data, counted from 0, is NaN or infinite in {name!r}.")


def from_arrays(arrays: Mapping[str, Array]) -> Examples:
    """Return examples whose row i is the i-th element of every array.

    Raises:
        InputError: there are no rows, the arrays differ in length, or a value is NaN or infinite.
    """
    lengths = {}
    for name, array in arrays.items():
        lengths[name] = len(array) if np.ndim(array) else 0
    if len(set(lengths.values())) != 1 or not all(lengths.values()):
        raise InputError(
            f"the arrays of the data must have one common length above 0, not {lengths}."
        )
    every = range(next(iter(lengths.values())))
    check_finite({name: np.asarray(array) for name, array in arrays.items()}, every)

    def take(rows: Sequence[int]) -> dict[str, Array]:
        return {name: array[np.asarray(rows)] for name, array in arrays.items()}

    return Examples(every, take)
