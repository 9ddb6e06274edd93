"""What float32 rounds off: a PyTorch model computed in float64, without a second copy of it.

The exporter asks for it on every input that a package is compared on (``exporter/reference.py``):
a runtime adds in another order than PyTorch does, so it may be as far from it as PyTorch itself
is from the exact result.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from ffmerge.models.probe import Array

_WIDENED = 1 << 18  # elements of a weight that are wide at once; a head has ten times as many


@contextmanager
def exactly(model: torch.nn.Module) -> Iterator[None]:
    """Compute in float64; what a model keeps for later calls meanwhile, it has no longer behind."""
    held = [(each, dict(vars(each)), dict(each._buffers)) for each in model.modules()]
    try:
        with Float64():
            yield
    finally:
        for module, attributes, buffers in held:
            vars(module).clear()
            vars(module).update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)


class Float64(TorchFunctionMode):
    """Within it every operator computes in float64: a weight is widened while it is used.

    So are casts to float32 that a model's code asks for. A tensor that is changed in place stays
    what it is, and gets the values in its own precision.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run one operator on widened tensors."""
        options = dict(kwargs or {})
        if func.__name__ == "__get__":  # a shape or a dtype: nothing is computed
            return func(*args, **options)
        if func is Tensor.float:
            func = Tensor.double
        if func is torch.nn.functional.linear:
            return _linear(*args, **options)
        given = args
        if func is not torch.nn.functional.embedding:  # a row that is looked up is exact
            args, options = tree_map(_wide, (args, options))
        found = func(*args, **options)
        if _changes(func) and args[0] is not given[0]:
            return given[0].copy_(args[0])
        return tree_map(_wide, found)


def _changes(func: Callable[..., Any]) -> bool:
    """Say whether an operator changes its first argument: ``copy_``, ``x[0] = y``, ``x += y``."""
    name = func.__name__
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return a product by a weight in float64, of which a few rows are widened at a time."""
    if weight.ndim == 1:
        return torch.nn.functional.linear(_wide(input), _wide(weight), _wide(bias))
    given, rows = _wide(input), max(_WIDENED // weight.shape[-1], 1)
    product = given.new_empty(*given.shape[:-1], len(weight))
    held = given.new_empty(min(rows, len(weight)), weight.shape[-1])
    for first in range(0, len(weight), rows):
        part = weight[first : first + rows]
        wide = held[: len(part)].copy_(part)
        product[..., first : first + rows] = torch.nn.functional.linear(given, wide)
    return product if bias is None else product + _wide(bias)


def _wide(value: Any) -> Any:
    if isinstance(value, Tensor) and value.dtype == torch.float32:
        return value.double()
    if value is torch.float32:
        return torch.float64
    return value


def rounded_off(output: Array, exact: Array, rtol: float) -> float:
    """Return by how much an output is off the exact one, less ``rtol`` of each element's size.

    With three digits: the last bits are those of a processor.
    """
    if not output.size:
        return 0.0
    off = np.abs(output - exact) - rtol * np.abs(exact)
    return float(f"{max(np.nanmax(off), 0.0):.3g}")
