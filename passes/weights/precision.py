"""A model as a package in fewer bits would compute it, without making the package.

The conventions are those of ``passes/graph/quantize.py``; what is told here is the size of the
weights and the effect of rounding them, and for int8 of rounding what they are multiplied by.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

PRODUCTS = (nn.Linear, Conv1D)
ROUNDED = (*PRODUCTS, nn.Embedding, nn.Conv1d, nn.Conv2d)
DTYPES = ("fp32", "fp16", "int8", "int4")
_FLOOR = 1024  # elements below which a weight stays float32
_BLOCK = 32
_AT_ONCE = 1 << 20  # elements that are rounded at a time


def bytes_of(model: nn.Module, dtype: str) -> int:
    """Return the bytes of the weights of a package, scales counted, every shared one once.

    Graph, and copies that runtimes need of a weight, are not in it.
    """
    total = 0
    for parameter in model.parameters():
        count = parameter.numel()
        if dtype in ("fp32", "fp16") or parameter.ndim < 2 or count < _FLOOR:
            total += count * (2 if dtype == "fp16" else 4)
        elif dtype == "int4" and parameter.ndim == 2:
            total += count // 2 + 4 * (count // _BLOCK)
        else:
            total += count + 4 * max(parameter.shape)
    return total


@contextmanager
def rounded(model: nn.Module, dtype: str) -> Iterator[None]:
    """Round the weights of maps, convolutions and tables to ``dtype`` for the length of the block.

    Each only while it is used: a large model is never held twice.
    """
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, ROUNDED):
                whole: list[Tensor] = []
                before, after = partial(_round_, whole, dtype), partial(_restore_, whole)
                stack.callback(module.register_forward_pre_hook(before).remove)
                stack.callback(module.register_forward_hook(after, always_call=True).remove)
        yield


def to_dtype(weight: Tensor, dtype: str, summed: bool = True) -> Tensor:
    """Return a (rows, columns) weight as ``dtype`` can hold it, in its own type.

    The columns of a row are multiplied with an input and summed, if ``summed``; int4 has a scale
    for each 32 of them, int8 one for each row. Rows are rounded some at a time: a table of half a
    gigabyte would take four times as much in between.
    """
    new = torch.empty_like(weight, memory_format=torch.contiguous_format)
    step = max(1, _AT_ONCE // max(1, weight.shape[1]))
    for start in range(0, len(weight), step):
        some = slice(start, start + step)
        new[some] = _to_dtype(weight[some].float(), dtype, summed)
    return new


def _to_dtype(values: Tensor, dtype: str, summed: bool) -> Tensor:
    columns = values.shape[1]
    if dtype == "fp16":
        return values.half()
    if dtype == "int8":
        largest = values.abs().amax(1, keepdim=True)
        if summed:  # the codes of two neighbours sum to 127 at most: see quantize.py
            pairs = values[:, : values.shape[1] // 2 * 2].unflatten(1, (-1, 2)).sum(-1)
            largest = largest.maximum(pairs.abs().amax(1, keepdim=True))
        scale, codes = largest / 127, (-127, 127)
    else:
        filled = nn.functional.pad(values, (0, -columns % _BLOCK))
        values = filled.unflatten(1, (-1, _BLOCK))
        low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
        scale, codes = torch.where(high > -low, high, low) / -8, (-8, 7)
    scale = scale.where(scale != 0, 1)
    values = (values / scale).round().clamp(*codes) * scale
    return values.flatten(1)[:, :columns]


def rounded_weight(module: Any, dtype: str, rows: Any = slice(None)) -> Tensor:
    """Return the weight of a map, a convolution or a table as ``dtype`` holds it, in its layout.

    Of ``rows`` only: those that belong to some outputs, or some rows of a table.
    """
    weight, turned = module.weight.data, isinstance(module, Conv1D)
    some = (weight.T if turned else weight)[rows]
    if weight.numel() >= _FLOOR or dtype == "fp16":
        kind = "int8" if weight.ndim > 2 and dtype == "int4" else dtype
        new = to_dtype(some.flatten(1), kind, summed=isinstance(module, PRODUCTS))
        some = new.view(some.shape)
    return some.T if turned else some


def rounded_input(x: Tensor) -> Tensor:
    """Return what an int8 product reads of ``x``: one range for the whole of it, zero included."""
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    step = ((high - low) / 255).clamp(min=1e-12)
    zero = (-low / step).round()
    return ((x / step + zero).round().clamp(0, 255) - zero) * step


def _round_(whole: list[Tensor], dtype: str, module: Any, args: tuple[Any, ...]) -> Any:
    weight = module.weight
    whole.append(weight.data)
    weight.data = rounded_weight(module, dtype)
    if dtype != "int8" or weight.numel() < _FLOOR or not isinstance(module, PRODUCTS):
        return None
    return (rounded_input(args[0]), *args[1:])


def _restore_(whole: list[Tensor], module: Any, *_: Any) -> None:
    module.weight.data = whole.pop()
