"""Fixed inputs on which a model and its package are compared, drawn from a seed.

The package stores the outputs PyTorch gave and this recipe, not the inputs: the folder stays
small and the check runs on a device without PyTorch.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

# At most this many elements of one output are stored per case (a language model at batch 8
# would otherwise add 16 MB of logits to the package).
STORED = 1 << 16


@dataclass(frozen=True)
class InputSpec:
    """One model input: a float drawn from N(0, 1), or an integer below ``high``.

    ``shape`` mixes numbers and the names of dynamic dimensions. ``high`` is 0 for floats, and
    for an attention mask (``mask``) the values are ones with padding at the end of some rows.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    high: int = 0
    mask: bool = False


@dataclass(frozen=True)
class Probe:
    """The recipe: inputs, the sizes of the dynamic dimensions of each case, and the seed."""

    inputs: tuple[InputSpec, ...]
    cases: tuple[Mapping[str, int], ...]
    seed: int = 0

    def draw(self, case: int) -> dict[str, Array]:
        """Return the inputs of one case; the same values on every machine."""
        generator = np.random.Generator(np.random.PCG64([self.seed, case]))
        sizes = self.cases[case]
        return {spec.name: _draw(spec, sizes, generator) for spec in self.inputs}

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        inputs = [{**asdict(spec), "shape": list(spec.shape)} for spec in self.inputs]
        return {"inputs": inputs, "cases": [dict(c) for c in self.cases], "seed": self.seed}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Probe":
        """Read a recipe."""
        inputs = tuple(
            InputSpec(**{**spec, "shape": tuple(spec["shape"])}) for spec in value["inputs"]
        )
        return cls(inputs, tuple(value["cases"]), value["seed"])


def _draw(spec: InputSpec, sizes: Mapping[str, int], generator: np.random.Generator) -> Array:
    shape = tuple(sizes[d] if isinstance(d, str) else d for d in spec.shape)
    if spec.mask:  # row i ends in i % 3 padded positions, and never has none left
        padding = np.minimum(np.arange(shape[0]) % 3, shape[1] - 1)
        return (np.arange(shape[1]) < shape[1] - padding[:, None]).astype(spec.dtype)
    if spec.high:
        return generator.integers(0, spec.high, shape).astype(spec.dtype)
    return generator.standard_normal(shape, dtype=np.float32).astype(spec.dtype)


def stored_elements(output: Array) -> Array:
    """Return the flat sample of an output that the package keeps: every n-th element, n odd.

    All elements when there are at most ``STORED``. An odd stride visits every residue of the
    usual even row lengths.
    """
    return output.reshape(-1)[:: stride(output.size)]


def stride(size: int) -> int:
    """Return the step between stored elements of an output of ``size`` elements."""
    step = -(-size // STORED)
    return step + (step + 1) % 2 if step > 1 else 1
