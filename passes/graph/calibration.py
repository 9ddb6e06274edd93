"""Rows of a graph's inputs, and the ranges of activations on them for static int8.

``share_file`` reads the rows from an ``.npz`` (:func:`read_calibration`), an exporter takes them
from its examples; ``int8.py`` asks for the ranges (:func:`measure_ranges`), ``gptq.py`` rounds by
the rows.
"""

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from ffmerge.errors import InputError, first_line
from ffmerge.models.data import read
from ffmerge.passes.graph.tensors import Array
from ffmerge.passes.graph.walk import Kept

ROWS = 8  # of one run: all values that are measured are in memory at once


def read_calibration(model: ir.Model, path: Path) -> Kept:
    """Return the rows of an ``.npz`` of graph inputs, as many at a time as the graph takes.

    They wait on disk: pictures may take as much as the model that reads them.
    Those are ``ROWS`` where the first axis of the inputs has no fixed length; where it has, rows
    that do not fill a last batch are left out.

    Raises:
        InputError: the file cannot be read, lacks an input of the graph, or has too few rows.
    """
    if path.suffix != ".npz":
        raise InputError(f"{path} is not an .npz of the graph's inputs.")
    examples = read(str(path), None, None)
    inputs = [value for value in model.graph.inputs if not value.is_initializer()]
    given = examples.take(examples.rows[:1])
    for value in inputs:
        if value.name not in given:
            raise InputError(f"{path} has no input {value.name!r} of the graph.")
    rows, used = ROWS, len(examples)
    if fixed := _fixed_rows(inputs):
        rows = fixed
        used -= len(examples) % rows
    if not used:
        raise InputError(f"{path} has {len(examples)} rows, the graph takes {rows} at a time.")
    batches = examples.of(examples.rows[:used]).batches(rows)
    names = [str(value.name) for value in inputs]
    return Kept({name: batch[name] for name in names} for batch in batches)


def _fixed_rows(inputs: Iterable[ir.Value]) -> int | None:
    """Return how many rows a graph takes at a time, None if any number."""
    for value in inputs:
        if value.shape and isinstance(value.shape[0], int):
            return value.shape[0]
    return None


@dataclass(frozen=True)
class Seen:
    """A value over all batches: its smallest and largest, zero included, and its mean square."""

    low: float = 0.0
    high: float = 0.0
    square: float = 0.0
    count: int = 0

    def joined(self, array: Array) -> "Seen":
        """Return what was seen with one more array."""
        count = self.count + array.size
        squares = self.square * self.count + float(np.square(array, dtype=np.float64).sum())
        return Seen(
            min(self.low, float(array.min(initial=0))), max(self.high, float(array.max(initial=0))),
            squares / max(count, 1), count,
        )  # fmt: skip

    def lost(self, bits: int) -> float:
        """Return the error of rounding to codes of so many bits, as a fraction of the value.

        Both are root mean squares; that of rounding is a step by the root of 12.
        """
        step = (self.high - self.low) / (2**bits - 1)
        return step / max(12 * self.square, 1e-30) ** 0.5


def measure_ranges(
    model: ir.Model, values: Sequence[ir.Value], batches: Iterable[Mapping[str, Array]]
) -> dict[ir.Value, Seen]:
    """Return what each value is over all batches.

    A value that is not finite has none, so it stays as it is.

    Raises:
        InputError: a batch is not finite, or not what the model takes.
    """
    import onnxruntime

    found = {value: Seen() for value in values}
    if not found:
        return found
    outputs = list(model.graph.outputs)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        model.graph.outputs.extend(v for v in values if not v.is_graph_output())
        ir.save(model, path, external_data="data")
        model.graph.outputs[:] = outputs
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in batches:
        check_batch(batch)
        try:
            seen = session.run([value.name for value in values], dict(batch))
        except Exception as error:  # ONNX Runtime's errors have no common class of their own
            raise InputError(
                f"the calibration data does not fit the model: {first_line(error)}"
            ) from error
        for value, array in zip(values, seen, strict=True):
            if value not in found:
                continue
            if not np.isfinite(array).all():  # by a weight of the model: it has no range
                del found[value]
                continue
            found[value] = found[value].joined(array)
    return found


def check_batch(batch: Mapping[str, Array]) -> None:
    """Raise InputError if a batch holds NaN or infinity."""
    for name, given in batch.items():
        if not np.isfinite(given).all():
            raise InputError(f"the calibration data is not finite: {name} holds NaN or infinity.")
