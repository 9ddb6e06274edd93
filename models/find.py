"""Find the feed-forward sublayers of a model by following the data of one forward pass.

Finding reads the data flow, on the meta device if need be, so no table of model or module names is
needed and no weights are. What only looks like a sublayer (experts, convolutions, anything between
the maps that tells neurons apart) is left alone, with the reason. What is found still has to be
proved: ``models/prove.py``.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import permutations
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

from ffmerge.errors import InputError
from ffmerge.models.inputs import example_inputs, unchunked
from ffmerge.models.sublayer import FeedForward, LeftAlone, Weight, block_of

# Ops that move no neuron, and ops that keep neurons apart, though not in their place. Elementwise
# ops are known by PyTorch's own ``pointwise`` tag; hardswish lacks it. A product of tensors, as in
# attention, is also what is called mm or attention.
_VIEWS = {"view", "_unsafe_view", "clone", "_to_copy", "detach", "alias", "squeeze", "unsqueeze"}
_HALVES = {"split", "chunk", "split_with_sizes", "slice"}  # of a fused gate and up projection
_MOVES = {"transpose", "t", "permute", "native_dropout"}
_PRODUCTS = {"convolution", "dot", "embedding"}
_PICKS = {"index", "index_select", "gather"}  # how a router hands tokens to an expert
_ELEMENTWISE, _PRODUCT, _NONE = "elementwise", "product", ""  # ops that go by these names here

# On the meta device there is no value to look at: any will do, only the structure is read.
_WITHOUT_VALUES: dict[str, Callable[..., Any]] = {
    "_local_scalar_dense": lambda x: 1,
    "nonzero": lambda x: x.new_empty((x.numel(), x.ndim), dtype=torch.int64),
    "_grouped_mm": lambda a, b, *_, **__: a.new_empty((a.shape[0], b.shape[-1])),
}

EXPERTS = "mixture-of-experts: a router gives every expert other tokens"


def find(model: nn.Module) -> tuple[FeedForward, ...]:
    """Return every feed-forward sublayer of a repeated block, in the order of execution.

    Runs one forward pass on the smallest inputs; a model on the meta device computes nothing.
    A sublayer that is executed several times (ALBERT) is returned once.

    Raises:
        InputError: the model is on the meta device and its code has to look at values.
    """
    return survey(model)[0]


def survey(model: nn.Module) -> tuple[tuple[FeedForward, ...], tuple[LeftAlone, ...]]:
    """Return what :func:`find` returns, and what only looks like it, each with the reason.

    A sublayer is a map f -> d whose input is an elementwise function of maps d -> f that read
    one tensor. What looks like it are maps d -> f -> d of one block, f > d, with more in between.
    """
    trace = _trace(model)
    left = dict.fromkeys(_banks(model), EXPERTS)
    found: dict[_Match, list[int]] = {}
    alike: dict[str, tuple[str, str]] = {}
    for name, hidden in trace.calls:
        makers, ops = _before(trace, hidden)
        place = block_of(model, name)
        if not makers or place is None or _PRODUCT in ops or not _reads(trace, makers[0][1]):
            continue
        d_ff, d_model = trace.linear[name]
        inputs = tuple(maker for maker, _ in makers)
        shapes = {trace.linear[maker] for maker in inputs}
        if not shapes <= {(d_model, d_ff), (d_model, 2 * d_ff)}:
            continue
        fused = (d_model, d_ff) not in shapes
        one_source = len({_origin(trace, x, _VIEWS) for _, x in makers}) == 1
        plain = one_source and len(shapes) == 1 and len(inputs) <= 2 - fused and name not in inputs
        between = ops - _VIEWS - _HALVES - {_ELEMENTWISE}
        convolved = trace.convolutions & {name, *inputs}
        if plain and _ELEMENTWISE in ops and not between and not convolved:
            match, source = _Match(inputs, name, 1 + fused, *place), makers[0][1]
            if trace.made_by[_origin(trace, source, _VIEWS | _HALVES)].name in _PICKS:
                left[match.path.rpartition(".")[0]] = EXPERTS
            else:
                found.setdefault(match, []).append(source)
        elif d_ff > d_model and {block_of(model, maker) for maker in inputs} == {place}:
            reason = "its maps d -> f read several tensors, or another tensor enters after them"
            if unlike := {op.strip("_") for op in between - _MOVES - {_NONE}}:
                reason = f"{min(unlike)} between its maps does not treat every neuron alike"
            if convolved:
                reason = "its maps are convolutions"
            alike[_common_prefix([*inputs, name])] = name, reason
    known = {match.output for match in found}
    for path, (name, reason) in alike.items():
        if name not in known and not any(path.startswith(f"{other}.") for other in left):
            left[path] = reason
    return _named(model, trace, found), tuple(LeftAlone(*item) for item in left.items())


@dataclass(frozen=True)
class _Match:
    """Maps d -> f and f -> d, and the place of their block: number ``layer`` of ``stack``."""

    inputs: tuple[str, ...]
    output: str
    fused: int
    stack: str
    layer: int

    @property
    def path(self) -> str:
        return _common_prefix([*self.inputs, self.output])


class _Op(NamedTuple):
    """What made a tensor from which; one that no op made is there from the start."""

    name: str = _NONE
    sources: tuple[int, ...] = ()


class _Trace(TorchDispatchMode):
    """Which op made each tensor from which, and which linear map took and gave which."""

    def __init__(self) -> None:
        super().__init__()
        self.made_by: dict[int, _Op] = defaultdict(_Op)
        self.changed: dict[int, tuple[int, ...]] = defaultdict(tuple)  # in place, from which
        self.calls: list[tuple[str, int]] = []  # of a map, with what it took
        self.maps: dict[int, int] = {}  # what a map gave, and the number of the call
        self.linear: dict[str, tuple[int, int]] = {}
        self.convolutions: set[str] = set()  # of the maps, those of size 1
        self.inputs: dict[int, str] = {}  # of the model
        self.alive: list[Tensor] = []  # an id is only an address while it lives

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        blind = bool(args) and isinstance(args[0], Tensor) and args[0].is_meta
        call = _WITHOUT_VALUES.get(name, func) if blind else func
        out = call(*args, **(kwargs or {}))
        sources = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
        ids = tuple(id(source) for source in sources)
        op = _Op(_kind(func, name, args), ids)
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if any(tensor is source for source in sources):
                self.changed[id(tensor)] += ids
            elif isinstance(tensor, Tensor):
                self.made_by[id(tensor)] = op
                self.alive += [tensor, *sources]
        return out

    def record(self, name: str, _: Any, args: tuple[Tensor, ...], out: Tensor) -> None:
        """Note the call of the map ``name``: a forward hook, but for the name."""
        self.maps[id(out)] = len(self.calls)
        self.calls.append((name, id(args[0])))
        self.alive += [args[0], out]


def _kind(func: Any, name: str, args: Any) -> str:
    """Return by what name an op counts."""
    if name == "convolution" and args[8] > 1:
        return "depthwise_convolution"
    if name.endswith("mm") or "attention" in name or name in _PRODUCTS:
        return _PRODUCT
    tagged = torch.Tag.pointwise in func.tags or name == "hardswish"
    return _ELEMENTWISE if tagged and name not in _VIEWS | _HALVES else name


def _trace(model: nn.Module) -> _Trace:
    trace = _Trace()
    with ExitStack() as stack:
        stack.enter_context(unchunked(model))
        for name, module in model.named_modules():
            if isinstance(module, Conv1D):
                rows, columns = module.weight.shape
                trace.linear[name] = rows, columns
            elif isinstance(module, nn.Linear):
                trace.linear[name] = module.in_features, module.out_features
            elif isinstance(module, (nn.Conv1d, nn.Conv2d)):
                if module.groups > 1 or set(module.kernel_size) != {1}:
                    continue
                trace.linear[name] = module.in_channels, module.out_channels
                trace.convolutions.add(name)
            else:
                continue
            handle = module.register_forward_hook(partial(trace.record, name))
            stack.callback(handle.remove)
        run_example(model, trace)
    return trace


def run_example(model: nn.Module, trace: _Trace | None = None) -> None:
    inputs = example_inputs(model)
    blind = any(p.is_meta for p in model.parameters())
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.callback(model.train, model.training)
        model.eval()
        if trace is not None:
            trace.inputs = {id(tensor): name for name, tensor in inputs.items()}
            trace.alive += inputs.values()
            stack.enter_context(trace)
        if blind:  # has no autocast, which rotary positions in transformers 4 switch off
            stack.callback(setattr, torch, "autocast", torch.autocast)
            torch.autocast = lambda *_, **__: nullcontext()
        try:
            model(**inputs)
        except Exception as error:  # a model's code may raise anything
            if not blind:
                raise
            raise InputError(
                f"the code of {type(model).__name__} cannot be followed without weights: give a "
                "checkpoint that holds them."
            ) from error


def _before(trace: _Trace, tensor: int) -> tuple[list[tuple[str, int]], set[str]]:
    """Return the calls of the maps that a tensor comes from, and the ops in between by name."""
    calls, ops, queue, seen = set(), set(), [tensor], set()
    while queue:
        current = queue.pop()
        if current in seen:
            continue
        seen.add(current)
        if trace.changed[current]:
            ops.add(_ELEMENTWISE)
        if current in trace.maps:
            calls.add(trace.maps[current])
        else:
            name, sources = trace.made_by[current]
            ops.add(name)
            queue += sources if name != _PRODUCT else ()
    return [trace.calls[call] for call in sorted(calls)], ops


def _origin(trace: _Trace, tensor: int, through: set[str]) -> int:
    """Return the tensor that ``tensor`` is a mere view or copy of, by the ops ``through``."""
    while trace.made_by[tensor].name in through:
        tensor = trace.made_by[tensor].sources[0]
    return tensor


def _reads(trace: _Trace, tensor: int) -> tuple[str, ...]:
    """Return the names of the model inputs that ``tensor`` depends on."""
    seen: set[int] = set()
    queue = [tensor]
    while queue:
        current = queue.pop()
        if current not in seen:
            seen.add(current)
            queue += trace.made_by[current].sources + trace.changed[current]
    return tuple(name for at, name in trace.inputs.items() if at in seen)


def _banks(model: nn.Module) -> list[str]:
    """Return the modules that hold maps d -> f and f -> d of all experts as 3-D parameters."""
    paths: list[str] = []
    for path, module in model.named_modules():
        owners = [m for m in (module, *module.children()) if not hasattr(m, "kernel_size")]
        shapes = [p.shape for m in owners for p in m.parameters(recurse=False) if p.ndim == 3]
        for (n, a, b), (m, c, e) in permutations(shapes, 2):
            maps = (c == b and a in (e, 2 * e)) or (e == a and b in (c, 2 * c))
            if n == m > 1 and (a, b) != (c, e) and maps:
                paths = [p for p in paths if p != path and not path.startswith(f"{p}.")] + [path]
    return paths


def _named(
    model: nn.Module, trace: _Trace, found: Mapping[_Match, list[int]]
) -> tuple[FeedForward, ...]:
    """Return the sublayers with their stacks: one for each list of blocks and place in a block.

    A stack is called by the parts of its path that others lack, ``layers`` if alone: names of
    modules vary between releases of transformers where a model has one stack; where it has
    several, the parts that tell them apart (``encoder``, ``decoder``) do not.
    """
    inner = {m: m.path.removeprefix(f"{m.stack}.{m.layer}") for m in found}
    places = {(m.stack, inner[m]) for m in found}
    several = {m: sum(stack == m.stack for stack, _ in places) > 1 for m in found}
    keys = {m: (m.stack + inner[m] * several[m]).split(".") for m in found}
    sublayers = []
    for match, sources in found.items():
        parts = [part for part in keys[match] if any(part not in key for key in keys.values())]
        weights: list[Weight] = []
        for name in (*match.inputs, match.output):
            module = model.get_submodule(name)
            last = name == match.output
            # Linear stores (out, in), Conv1D (in, out): the neurons are out of an input map
            blocks = 1 if last else match.fused
            of_outputs = None if last else 0
            axes = {
                "weight": int(isinstance(module, Conv1D) != last),
                "bias": of_outputs,
                "scale": of_outputs,
                "down": 1 if last else None,
                "up": of_outputs,
            }
            weights += [
                Weight(f"{name}.{part}", axis, blocks)
                for part, axis in axes.items()
                if getattr(module, part, None) is not None
            ]
        d_ff, d_model = trace.linear[match.output]
        runs = len({_origin(trace, source, _VIEWS | _HALVES) for source in sources})
        sublayers.append(FeedForward(
            ".".join(parts) or "layers", match.layer, match.path, match.inputs, match.output,
            d_model, d_ff, tuple(weights), _reads(trace, sources[0]), runs,
        ))  # fmt: skip
    return tuple(sublayers)


def _common_prefix(paths: Sequence[str]) -> str:
    parts = [path.split(".") for path in paths]
    length = next(i for i, level in enumerate(zip(*parts, strict=False)) if len(set(level)) > 1)
    return ".".join(parts[0][:length])
