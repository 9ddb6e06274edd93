"""A model as a package in fewer bits would compute it, without making the package.

The search of a budget and ``compare`` ask for the size of the weights, and measure the effect of
rounding them, and for int8 and int4 of rounding what they are multiplied by. The codes are those
of a package: ``models/codes.py``.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ffmerge.models import codes, sizes
from ffmerge.models.codes import AT_ONCE, BLOCKS, FLOOR, Array
from ffmerge.models.sizes import BITS

PRODUCTS = (nn.Linear, Conv1D)
ROUNDED = (*PRODUCTS, nn.Embedding, nn.Conv1d, nn.Conv2d)
DTYPES = ("fp32", "fp16", "int8", "int4")


def bytes_of(model: nn.Module, dtype: str) -> int:
    """Return the bytes of the weights of a package, scales counted, every shared one once.

    Graph, and copies that runtimes need of a weight, are not in it.
    """
    return sizes.bytes_of(shapes_of(model), dtype)


def shapes_of(model: nn.Module) -> list[tuple[int, ...]]:
    """Return the shapes of the parameters, every shared one once."""
    return [tuple(parameter.shape) for parameter in model.parameters()]


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


def to_dtype(weight: Tensor, dtype: str) -> Tensor:
    """Return a (rows, columns) weight as ``dtype`` can hold it, in its own type.

    int8 and int4 have a scale for each block of a row's columns. Rows are rounded some at a time: a
    table of half a gigabyte would take four times as much in between.
    """
    new = torch.empty_like(weight, memory_format=torch.contiguous_format)
    step = max(1, AT_ONCE // max(1, weight.shape[1]))
    for start in range(0, len(weight), step):
        some = slice(start, start + step)
        values = weight[some].float().cpu().numpy()
        new[some] = torch.from_numpy(_rounded_values(values, dtype))
    return new


def _rounded_values(values: Array, dtype: str) -> Array:
    if dtype == "fp16":
        return values.astype(np.float16)
    bits = BITS[dtype]
    whole, scales = codes.block_codes(values, bits)
    return codes.block_values(whole, scales, bits, width=values.shape[1])


def _rounded_weight(module: Any, dtype: str) -> Tensor:
    """Return the weight of a map, a convolution or a table as ``dtype`` holds it, in its layout."""
    weight, turned = module.weight.data, isinstance(module, Conv1D)
    if weight.numel() < FLOOR and dtype != "fp16":
        return weight
    rows = weight.T if turned else weight
    if weight.ndim > 2 and dtype != "fp16":
        whole, scale = codes.int8_codes(rows.flatten(1).float().cpu().numpy(), axis=1)
        return torch.from_numpy(whole * scale).to(weight).view(rows.shape)
    new = to_dtype(rows.flatten(1), dtype).view(rows.shape)
    return new.T if turned else new


def rounded_input(x: Tensor, block: int) -> Tensor:
    """Return what a product reads of ``x``: codes of 8 bits, a range for each block of a row."""
    width = x.shape[-1]
    filled = nn.functional.pad(x, (0, -width % block)).unflatten(-1, (-1, block))
    step = filled.abs().amax(-1, keepdim=True) / 127
    codes_of = (filled / step.where(step != 0, 1)).round()
    return (codes_of * step).flatten(-2)[..., :width]


def _round_(whole: list[Tensor], dtype: str, module: Any, args: tuple[Any, ...]) -> Any:
    weight = module.weight
    whole.append(weight.data)
    weight.data = _rounded_weight(module, dtype)
    if dtype not in BITS or weight.numel() < FLOOR or not isinstance(module, PRODUCTS):
        return None
    return (rounded_input(args[0], BLOCKS[BITS[dtype]]), *args[1:])


def _restore_(whole: list[Tensor], module: Any, *_: Any) -> None:
    module.weight.data = whole.pop()
