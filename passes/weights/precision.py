"""A model as a package in fewer bits would compute it, without making the package.

The search of a budget and ``compare`` ask for the size of the weights, and measure the effect of
rounding them, and for int8 and int4 of rounding what they are multiplied by. The codes are those
of a package: ``models/codes.py``. int8 has two forms there (``passes/graph/quantize.py``): a model
that generates is taken to be exported with its cache, in blocks, and any other multiplies rows; so
does an encoder whose states a decoder reads. Without ``rows`` all are in blocks, as for a provider
that has no kernels for rows.
"""

from collections.abc import Callable, Iterator, Set
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ffmerge.models import codes, sizes
from ffmerge.models.codes import AT_ONCE, BELOW, BLOCKS, FLOOR, SPREAD, Array
from ffmerge.models.sizes import BITS

PRODUCTS = (nn.Linear, Conv1D)
ROUNDED = (*PRODUCTS, nn.Embedding, nn.Conv1d, nn.Conv2d)
DTYPES = ("fp32", "fp16", "int8", "int4")
Whole = list[tuple[Tensor, Tensor]]  # parameters, and their values before they were rounded
Round = Callable[[Any, Any], Any]  # a module and what it reads; returns that rounded, or None


def bytes_of(model: nn.Module, dtype: str, rows: bool = True) -> int:
    """Return the bytes of the weights of a package, scales counted, every shared one once.

    Graph, and copies that runtimes need of a weight, are not in it.
    """
    return sizes.bytes_of(shapes_of(model, rows), dtype)


def shapes_of(model: nn.Module, rows: bool = True) -> list[tuple[int, ...]]:
    """Return the shapes of the parameters, every shared one once, as ``sizes`` takes them."""
    shapes = {id(parameter): tuple(parameter.shape) for parameter in model.parameters()}
    by_rows = _by_rows(model, "int8", rows)
    for module in model.modules():
        if isinstance(module, Conv1D):
            shapes[id(module.weight)] = tuple(module.weight.shape)[::-1]
        for weight in _weights_by_rows(module, by_rows):
            if id(weight) in shapes:  # else it is computed: a weight norm
                shapes[id(weight)] = sizes.ByRows(shapes[id(weight)])
    for module in model.modules():
        if isinstance(module, nn.Embedding):  # a tied one is looked up as well
            shapes[id(module.weight)] = sizes.Table(module.weight.shape)
    return list(shapes.values())


@contextmanager
def rounded(model: nn.Module, dtype: str, rows: bool = True) -> Iterator[None]:
    """Round the weights of maps, convolutions and tables to ``dtype`` for the length of the block.

    Each only while it is used: a large model is never held twice.
    """
    by_rows, no_blocks = _by_rows(model, dtype, rows), _no_blocks(model, dtype)
    constants = {id(buffer) for buffer in model.buffers()}
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, nn.MultiheadAttention) or _is_router(module):
                if dtype in BITS:
                    in_rows = getattr(module, "out_proj", module) in by_rows
                    stack.enter_context(_rounding_inside(module, dtype, in_rows))
                continue
            round_ = _rounding_of(module, dtype, by_rows, no_blocks, constants)
            if round_ is None:
                continue
            whole: list[Whole] = []
            before, after = partial(_replace_, whole, round_), partial(_restore_, whole)
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(after, always_call=True).remove)
        yield


def _rounding_of(
    module: Any, dtype: str, by_rows: Set[nn.Module], no_blocks: Set[int], constants: Set[int]
) -> Round | None:
    """Return what rounds the weights that a module has, None where it has none that are rounded."""
    if isinstance(module, parametrize.ParametrizationList):
        return None  # what it computes is rounded
    if module in by_rows:
        return _round_rows_
    if isinstance(module, ROUNDED) and id(module.weight) not in no_blocks:
        return partial(_round_, dtype, constants)
    if _summed(module, dtype):
        return _round_summed_
    return None


@contextmanager
def _rounding_inside(module: nn.MultiheadAttention, dtype: str, by_rows: bool) -> Iterator[None]:
    """Round what PyTorch's attention, or a router, multiplies: their maps are not called."""
    running: list[ExitStack] = []

    def before(*_: Any) -> None:
        stack = ExitStack()
        running.append(stack)
        fast = torch.backends.mha.get_fastpath_enabled()  # one operator, which shows no products
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        torch.backends.mha.set_fastpath_enabled(False)
        stack.enter_context(_Products(module, dtype, by_rows))

    def after(*_: Any) -> None:
        running.pop().close()

    hooks = (
        module.register_forward_pre_hook(before),
        module.register_forward_hook(after, always_call=True),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Products(TorchDispatchMode):
    """Rounds the products by a module's parameters, or by parts of them, and what they read."""

    def __init__(self, module: nn.Module, dtype: str, by_rows: bool) -> None:
        super().__init__()
        self.held = {p.untyped_storage().data_ptr() for p in module.parameters()}
        self.dtype, self.by_rows = dtype, by_rows

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation of PyTorch, a product ``x @ W.T`` on rounded numbers."""
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            *bias, x, turned = args
            if turned.untyped_storage().data_ptr() in self.held and _is_large(turned):
                x, weight = self._rounded(x, turned.T.contiguous())
                args = (*bias, x, weight.T)
        return func(*args, **(kwargs or {}))

    def _rounded(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        if self.by_rows:
            return rounded_rows(x), _rows_weight(weight)
        return rounded_input(x, BLOCKS[BITS[self.dtype]]), to_dtype(weight, self.dtype)


def _by_rows(model: nn.Module, dtype: str, rows: bool) -> set[nn.Module]:
    """Return the maps whose products have a range for each row: none by a table that is read.

    Of a model that generates those of an encoder, unless a decoder multiplies by its weights.
    """
    if dtype != "int8" or not rows:
        return set()
    outside: set[int] = set()
    inside = model
    if isinstance(model, PreTrainedModel) and model.can_generate():
        if not model.config.is_encoder_decoder:
            return set()
        inside = model.get_encoder()
        outside = {id(each.weight) for each in _maps(model) - _maps(inside)}
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    found = set()
    for module in _maps(inside):
        if id(module.weight) in tables:
            continue
        if id(module.weight) in outside:
            return set()
        found.add(module)
    return found


def _maps(model: nn.Module) -> set[Any]:
    """Return the maps whose weights are in fewer bits."""
    found = set()
    for module in model.modules():
        if (isinstance(module, PRODUCTS) or _is_router(module)) and _is_large(module.weight):
            found.add(module)
    return found


def _is_large(weight: Tensor) -> bool:
    """Say whether a package has a weight in fewer bits: no vector, and enough elements."""
    return weight.numel() >= FLOOR and not codes.is_vector(weight.shape)


def _is_router(module: Any) -> bool:
    """Say whether a module multiplies by a matrix of its own, as what chooses experts does."""
    own = dict(module.named_parameters(recurse=False)).get("weight")
    return own is not None and own.ndim == 2 and not isinstance(module, ROUNDED)


def _weights_by_rows(module: Any, by_rows: Set[nn.Module]) -> list[Tensor]:
    """Return the weights of a module that are multiplied in rows."""
    if isinstance(module, nn.MultiheadAttention) and module.out_proj in by_rows:
        own = dict(module.named_parameters(recurse=False))
        return [weight for name, weight in own.items() if name.endswith("weight")]
    return [module.weight] if module in by_rows else []


def _no_blocks(model: nn.Module, dtype: str) -> set[int]:
    """Return the tables, by id, whose rows are no whole blocks: a package has them in int8."""
    if dtype not in BITS:
        return set()
    tables = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    return {id(table) for table in tables if table.shape[1] % BLOCKS[BITS[dtype]]}


def _summed(module: nn.Module, dtype: str) -> list[str]:
    """Return the names of a module's parameters that a package has in int8, if they are large.

    Those that no map reads, as position embeddings are, and tables whose rows are no whole blocks.
    """
    found = []
    for name, parameter in module.named_parameters(recurse=False):
        if dtype in BITS and _is_large(parameter):
            found.append(name)
    return found


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
    form = codes.Form(BITS[dtype], BLOCKS[BITS[dtype]])
    return codes.block_codes(values, form).values(values.shape[1])


def _rounded_weight(module: Any, dtype: str) -> Tensor:
    """Return the weight of a map, a convolution or a table as ``dtype`` holds it, in its layout."""
    weight = module.weight.data
    if dtype in BITS and not _is_large(weight):
        return weight
    if dtype in BITS and weight.ndim > 2:
        return _int8(weight)
    if isinstance(module, Conv1D):
        return to_dtype(weight.T, dtype).T
    return to_dtype(weight.flatten(1), dtype).view(weight.shape)


def _int8(values: Tensor) -> Tensor:
    """Return what is no matrix as a package has it in int8."""
    whole, scale = codes.codes_of_rows(values.float().cpu().numpy())
    return torch.from_numpy(whole * scale).to(values)


def rounded_input(x: Tensor, block: int) -> Tensor:
    """Return what a product reads of ``x``: codes of 8 bits, a range for each block of a row."""
    width = x.shape[-1]
    filled = nn.functional.pad(x, (0, -width % block)).unflatten(-1, (-1, block))
    step = filled.abs().amax(-1, keepdim=True) / 127
    codes_of = (filled / step.where(step != 0, 1)).round()
    return (codes_of * step).flatten(-2)[..., :width]


def rounded_rows(x: Tensor) -> Tensor:
    """Return what a product reads of ``x``: codes of 8 bits, a range for each row, spread.

    Computed in float32, whatever ``x`` is: the least that float16 holds is far from ``tiny``.
    """
    if x.numel() == 0:
        return x
    rows = _spread(x.float())
    high, low = rows.amax(-1, keepdim=True), rows.amin(-1, keepdim=True)
    largest = high.maximum(low * BELOW).clamp_min(torch.finfo(torch.float32).tiny)
    rows = rows * largest.reciprocal()
    low, high = rows.amin().clamp_max(0), rows.amax().clamp_min(0)
    step = ((high - low) / 255).clamp_min(torch.finfo(torch.float32).tiny)
    zero = (-low / step).round()
    codes_of = ((rows / step).round() + zero).clamp(0, 255)
    return _spread((codes_of - zero) * step * largest).to(x)


def _spread(x: Tensor) -> Tensor:
    """Return ``codes.spread``, of what is not a whole number of parts itself."""
    if x.shape[-1] % SPREAD:
        return x
    parts = x.unflatten(-1, (-1, SPREAD)) @ torch.from_numpy(codes.HADAMARD).to(x)
    return parts.flatten(-2)


def _rows_weight(weight: Tensor) -> Tensor:
    """Return a weight (outputs, inputs) as a package has it whose products have ranges of rows."""
    values = _spread(weight.float().cpu())
    whole, scale = codes.int8_codes(values.numpy(), axis=1, paired=True)
    return _spread(torch.from_numpy(whole * scale)).to(weight)


def _replace_(
    whole: list[Whole],
    round_: Round,
    module: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Round a module's parameters, and what it reads, its first argument; keep what they were."""
    whole.append([(parameter, parameter.data) for parameter in module.parameters()])
    name = None
    if args:
        read = args[0]
    else:
        name, read = next(iter(kwargs.items()), (None, None))
    rounded_ = round_(module, read)
    if rounded_ is None:
        return None
    if name is None:
        return (rounded_, *args[1:]), kwargs
    return args, {**kwargs, name: rounded_}


def _restore_(whole: list[Whole], *_: Any) -> None:
    for parameter, values in whole.pop():
        parameter.data = values


def _put_(module: Any, values: Tensor) -> None:
    """Give a module another weight; where it is computed from others, these."""
    if parametrize.is_parametrized(module, "weight"):
        module.weight = values
    else:
        module.weight.data = values


def _round_rows_(module: Any, read: Tensor) -> Tensor:
    if isinstance(module, Conv1D):
        _put_(module, _rows_weight(module.weight.data.T).T)
    else:
        _put_(module, _rows_weight(module.weight.data))
    return rounded_rows(read)


def _round_(dtype: str, constants: Set[int], module: Any, read: Any) -> Tensor | None:
    """Round a module's weight; return what a map reads, rounded.

    What is found in a table by ids of no input, as position embeddings of pictures and of sounds
    are, is a constant in a graph, which is added, in int8.
    """
    large = dtype in BITS and _is_large(module.weight)
    if large and isinstance(module, nn.Embedding) and _are_fixed(read, module, constants):
        _put_(module, _int8(module.weight.data))
        return None
    _put_(module, _rounded_weight(module, dtype))
    if large and isinstance(module, PRODUCTS):
        return rounded_input(read, BLOCKS[BITS[dtype]])
    return None


def _are_fixed(ids: Any, table: nn.Embedding, constants: Set[int]) -> bool:
    """Say whether ids are the same for all inputs: a buffer as it is, or every row of a table.

    Those without an axis of the batch, in order; one that counts tokens has that axis, or fewer.
    A size, from which a module makes ids of its own, is none of them.
    """
    if id(ids) in constants:
        return True
    if not isinstance(ids, Tensor) or ids.shape != table.weight.shape[:1]:
        return False
    return bool(ids.tolist() == list(range(len(ids))))


def _round_summed_(module: Any, _: Any) -> None:
    for name in _summed(module, "int8"):
        parameter = getattr(module, name)
        parameter.data = _int8(parameter.data)
