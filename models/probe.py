"""Fixed inputs on which a model and its package are compared, drawn from a seed.

The package stores the outputs PyTorch gave and this recipe, not the inputs: the folder stays
small and the check runs on a device without PyTorch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

# At most this many elements of all outputs are stored per case (a language model at batch 8
# would otherwise add 16 MB of logits to the package, and as much for its cache).
STORED = 1 << 16


@dataclass(frozen=True)
class InputSpec:
    """One model input; ``shape`` mixes numbers and the names of dynamic dimensions.

    ``kind`` says what it is drawn from: "normal" is N(0, 1), "integer" are numbers below
    ``high``, "mask" is ones with padding at the end of some rows, "position" counts on from the
    length of the past, "flag" is the size of that name.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    kind: str = "normal"
    high: int = 0


@dataclass(frozen=True)
class Probe:
    """The recipe: inputs, the sizes of the dynamic dimensions of each case, and the seed."""

    inputs: tuple[InputSpec, ...]
    cases: tuple[Mapping[str, int], ...]
    seed: int = 0

    def draw(self, case: int, batch: int | None = None) -> dict[str, Array]:
        """Return the inputs of one case; the same values on every machine.

        With ``batch``, every dimension that ends in ``batch_size`` is that.
        """
        generator = np.random.Generator(np.random.PCG64([self.seed, case]))
        sizes = dict(self.cases[case])
        if batch:
            sizes |= {name: batch for name in sizes if name.endswith("batch_size")}
        return {spec.name: _draw(spec, sizes, generator) for spec in self.inputs}

    def complete(self, batch: Mapping[str, Array]) -> dict[str, Array]:
        """Return the inputs for a batch of data; what it lacks is no padding and an empty past.

        Positions go on from the past, as they do in PyTorch where they are not given.
        """
        ids = batch.get("input_ids", next(iter(batch.values())))
        rows, length = ids.shape[:2]
        past = next((x.shape[2] for k, x in batch.items() if k.startswith("past_key_values")), 0)
        filled = {
            "mask": np.ones((rows, past + length)),
            "position": np.broadcast_to(np.arange(past, past + length), (rows, length)),
            "integer": np.zeros_like(ids),  # the first kind of token, where there are several
        }
        return {
            spec.name: np.asarray(
                batch[spec.name]
                if spec.name in batch
                else filled.get(spec.kind, np.zeros(_sized(spec, rows))),
                spec.dtype,
            )
            for spec in self.inputs
        }


def _sized(spec: InputSpec, rows: int) -> tuple[int, ...]:
    """Return the shape of a past that is empty."""
    return tuple(d if isinstance(d, int) else rows * (d == "batch_size") for d in spec.shape)


def _draw(spec: InputSpec, sizes: Mapping[str, int], generator: np.random.Generator) -> Array:
    shape = tuple(sizes[d] if isinstance(d, str) else d for d in spec.shape)
    if spec.kind == "flag":
        return np.full(shape, sizes[spec.name], spec.dtype)
    if spec.kind == "position":
        count = np.arange(shape[1]) + sizes.get("past_sequence_length", 0)
        return np.broadcast_to(count, shape).astype(spec.dtype)
    if spec.kind == "mask":  # row i ends in i % 3 padded positions, and never has none left
        padding = np.minimum(np.arange(shape[0]) % 3, shape[1] - 1)
        return (np.arange(shape[1]) < shape[1] - padding[:, None]).astype(spec.dtype)
    if spec.kind == "integer":
        return generator.integers(0, spec.high, shape).astype(spec.dtype)
    return generator.standard_normal(shape, dtype=np.float32).astype(spec.dtype)


def stored_elements(output: Array, of: int = 1) -> Array:
    """Return the flat sample of one ``of`` several outputs that the package keeps.

    Every n-th element, n odd: an odd stride visits every residue of the usual even row lengths.
    All elements when there are at most ``STORED // of``.
    """
    return output.reshape(-1)[:: stride(output.size, of)]


def stride(size: int, of: int = 1) -> int:
    """Return the step between stored elements of an output of ``size`` elements."""
    step = -(-size // max(STORED // of, 1))
    return step + (step + 1) % 2 if step > 1 else 1
