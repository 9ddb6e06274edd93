"""Feed-forward sublayers, found by following the data and proved by permuting hidden neurons.

A feed-forward sublayer maps d -> f by one linear map (two when gated), applies elementwise
functions, and maps f -> d by another. Finding reads the data flow of one forward pass, on the
meta device if need be, so no table of model or module names is needed and no weights are. The
proof runs the code of the sublayer on random weights: reordering its hidden neurons must leave
its output as it was.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers.pytorch_utils import Conv1D

from ffmerge.models.inputs import example_inputs

# Ops that move no neuron. Elementwise ops are known by PyTorch's own ``pointwise`` tag; this one
# lacks it.
_VIEWS = {"view", "_unsafe_view", "clone", "_to_copy", "detach", "alias", "squeeze", "unsqueeze"}
_UNTAGGED_POINTWISE = {"hardswish"}
_HALVES = {"split", "chunk", "split_with_sizes", "slice"}  # of a fused gate and up projection


@dataclass(frozen=True)
class Weight:
    """A parameter of a sublayer and which of its axes counts hidden neurons (None: no axis).

    A fused gate and up projection holds the neurons of both, one ``block`` after the other.
    """

    name: str
    neurons: int | None
    blocks: int = 1

    def reordered(self, values: Tensor, order: Tensor) -> Tensor:
        """Return ``values`` with hidden neuron ``order[j]`` in place j, in every block."""
        if self.neurons is None:
            return values
        index = torch.cat([order + block * len(order) for block in range(self.blocks)])
        return values.index_select(self.neurons, index.to(values.device))


@dataclass(frozen=True)
class FeedForward:
    """One feed-forward sublayer.

    ``path`` is the smallest module that holds all its linear maps. ``inputs`` are the modules
    d -> f in the order the model calls them, ``output`` is the module f -> d. ``weights`` has
    the same order in every layer of a stack, so members of a group match position by position.
    """

    stack: str
    layer: int
    path: str
    inputs: tuple[str, ...]
    output: str
    d_model: int
    d_ff: int
    weights: tuple[Weight, ...]

    @property
    def gated(self) -> bool:
        """True when two maps d -> f are multiplied (SwiGLU, GeGLU), also if they are fused."""
        return len(self.inputs) > 1 or self.weights[0].blocks > 1


def find(model: nn.Module) -> tuple[FeedForward, ...]:
    """Return every feed-forward sublayer of a repeated block, in the order of execution.

    Runs one forward pass on the smallest inputs; a model on the meta device computes nothing.
    A sublayer that is executed several times (ALBERT) is returned once.
    """
    matches = list(dict.fromkeys(_matches(_trace(model))))
    places = [_place(model, match.output) for match in matches]
    lists = list(dict.fromkeys(place[0] for place in places if place))
    names = dict(zip(lists, _distinguish(lists), strict=True))
    return tuple(
        _sublayer(model, match, names[place[0]], place[1])
        for match, place in zip(matches, places, strict=True)
        if place
    )


def stacks(sublayers: Sequence[FeedForward]) -> dict[str, tuple[FeedForward, ...]]:
    """Return the sublayers by stack, each in layer order."""
    names = dict.fromkeys(f.stack for f in sublayers)
    return {
        name: tuple(sorted((f for f in sublayers if f.stack == name), key=lambda f: f.layer))
        for name in names
    }


def prove(model: nn.Module, sublayers: Sequence[FeedForward], seed: int = 0) -> tuple[bool, ...]:
    """Tell for each sublayer whether reordering its hidden neurons leaves its output unchanged.

    Each is run alone, in float32, with random weights on the inputs the model gave it, three
    times: as it is, with all its weights reordered, and with only the first map reordered. The
    second must agree with the first to rounding, and the third must not: a sublayer whose
    output does not depend on the weights proves nothing.
    """
    calls = _capture(model, [f.path for f in sublayers])
    return tuple(_proved(model, f, *calls[f.path], seed) for f in sublayers)


@dataclass(frozen=True)
class _Match:
    inputs: tuple[str, ...]
    output: str
    blocks: int


@dataclass
class _Trace(TorchDispatchMode):
    """Which op made each tensor from which, and which linear map took and gave which."""

    made_by: dict[int, tuple[Any, tuple[int, ...]]] = field(default_factory=dict)
    calls: list[tuple[str, int, int]] = field(default_factory=list)
    linear: dict[str, tuple[int, int]] = field(default_factory=dict)
    changed: set[int] = field(default_factory=set)  # by an elementwise op in place
    alive: list[Tensor] = field(default_factory=list)  # an id is only an address while it lives

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sources = [a for a in args if isinstance(a, Tensor)]
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if any(tensor is source for source in sources):
                self.changed.add(id(tensor))
            elif isinstance(tensor, Tensor):
                self.made_by[id(tensor)] = (func, tuple(id(s) for s in sources))
                self.alive += [tensor, *sources]
        return out

    def hook(self, name: str) -> Any:
        def record(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            self.calls.append((name, id(args[0]), id(out)))
            self.alive += [args[0], out]

        return record


def _trace(model: nn.Module) -> _Trace:
    trace = _Trace()
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, (nn.Linear, Conv1D)):
                rows, columns = module.weight.shape
                trace.linear[name] = (
                    (rows, columns) if isinstance(module, Conv1D) else (columns, rows)
                )
                handle = module.register_forward_hook(trace.hook(name))
                stack.callback(handle.remove)
        _forward(model, trace)
    return trace


def _forward(model: nn.Module, mode: TorchDispatchMode | None = None) -> None:
    training = model.training
    model.eval()
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        inputs = example_inputs(model)
        if mode is not None:
            stack.enter_context(mode)
        model(**inputs)
    model.train(training)


def _matches(trace: _Trace) -> Iterator[_Match]:
    """Yield the linear maps f -> d whose input is an elementwise function of maps d -> f."""
    maps = {out: (name, x) for name, x, out in trace.calls}
    for name, hidden, _ in trace.calls:
        roots, activated = _roots(trace, hidden, maps)
        if not activated or not roots <= maps.keys():
            continue
        makers = [(maker, x) for maker, x, out in trace.calls if out in roots]
        inputs = tuple(maker for maker, _ in makers)
        d_ff, d_model = trace.linear[name]
        one_source = len({_origin(trace, x) for _, x in makers}) == 1
        shapes = {trace.linear[maker] for maker in inputs}
        fused = len(inputs) == 1 and shapes == {(d_model, 2 * d_ff)}
        plain = len(inputs) <= 2 and shapes == {(d_model, d_ff)}
        if one_source and name not in inputs and (plain or fused):
            yield _Match(inputs, name, 1 + fused)


def _roots(trace: _Trace, tensor: int, maps: Mapping[int, Any]) -> tuple[set[int], bool]:
    """Return the tensors an elementwise chain starts from, and whether it computes anything."""
    roots, activated, queue = set(), False, [tensor]
    while queue:
        current = queue.pop()
        activated |= current in trace.changed
        func, sources = trace.made_by.get(current, (None, ()))
        name = func.overloadpacket.__name__ if func else ""
        pointwise = func and (torch.Tag.pointwise in func.tags or name in _UNTAGGED_POINTWISE)
        if current in maps or not (pointwise or name in _VIEWS | _HALVES):
            roots.add(current)
            continue
        activated |= name not in _VIEWS | _HALVES
        queue += sources
    return roots, activated


def _origin(trace: _Trace, tensor: int) -> int:
    """Return the tensor that ``tensor`` is a mere view or copy of."""
    while tensor in trace.made_by:
        func, sources = trace.made_by[tensor]
        if func.overloadpacket.__name__ not in _VIEWS:
            break
        tensor = sources[0]
    return tensor


def _place(model: nn.Module, path: str) -> tuple[str, int] | None:
    """Return the innermost list of equal blocks around a module and its block's number.

    T5 lists the unlike sublayers of a block as well: that list repeats nothing.
    """
    parts = path.split(".")
    for end in range(len(parts) - 1, 0, -1):
        owner = model.get_submodule(".".join(parts[:end]))
        if isinstance(owner, nn.ModuleList) and len({type(block) for block in owner}) == 1:
            return ".".join(parts[:end]), int(parts[end])
    return None


def _distinguish(paths: Sequence[str]) -> list[str]:
    """Return a short name for each path: the parts in which they differ, ``layers`` if alone.

    Names of modules vary between releases of transformers where a model has one stack; where
    it has several, the parts that tell them apart (``encoder``, ``decoder``) do not.
    """
    split = [path.split(".") for path in paths]
    common = set.intersection(*map(set, split)) if split else set()
    return [".".join(part for part in parts if part not in common) or "layers" for parts in split]


def _sublayer(model: nn.Module, match: _Match, stack: str, layer: int) -> FeedForward:
    weights: list[Weight] = []
    for path in (*match.inputs, match.output):
        module = model.get_submodule(path)
        reads = path == match.output
        # Linear stores (out, in), Conv1D (in, out): the neurons are out of an input map
        blocks = 1 if reads else match.blocks
        weights.append(Weight(f"{path}.weight", int(isinstance(module, Conv1D) != reads), blocks))
        if module.bias is not None:
            weights.append(Weight(f"{path}.bias", None if reads else 0, blocks))
    last = next(weight for weight in weights if weight.name == f"{match.output}.weight")
    shape = model.get_parameter(last.name).shape
    d_ff, d_model = shape[last.neurons or 0], shape[1 - (last.neurons or 0)]
    path = _common_prefix([*match.inputs, match.output])
    return FeedForward(
        stack, layer, path, match.inputs, match.output, d_model, d_ff, tuple(weights)
    )


def _common_prefix(paths: Sequence[str]) -> str:
    parts = [path.split(".") for path in paths]
    length = next(i for i, level in enumerate(zip(*parts, strict=False)) if len(set(level)) > 1)
    return ".".join(parts[0][:length])


def _capture(model: nn.Module, paths: Sequence[str]) -> dict[str, tuple[Any, Any]]:
    """Return the first positional and keyword arguments each module is called with."""
    calls: dict[str, tuple[Any, Any]] = {}

    def keep(path: str) -> Any:
        return lambda module, args, kwargs: calls.setdefault(path, (args, kwargs)) and None

    with ExitStack() as stack:
        for path in paths:
            handle = model.get_submodule(path).register_forward_pre_hook(
                keep(path), with_kwargs=True
            )
            stack.callback(handle.remove)
        _forward(model)
    return calls


def _proved(model: nn.Module, sublayer: FeedForward, args: Any, kwargs: Any, seed: int) -> bool:
    generator = torch.Generator().manual_seed(seed)
    module = copy.deepcopy(model.get_submodule(sublayer.path)).float().cpu().eval()
    weights = {
        w: module.get_parameter(w.name.removeprefix(f"{sublayer.path}.")) for w in sublayer.weights
    }
    args, kwargs = tree_map(_float32, (args, kwargs))
    for parameter in weights.values():
        spread = parameter.numel() ** -0.25  # one over the square root of the mean side
        parameter.data = torch.randn(parameter.shape, generator=generator) * spread
    order = torch.randperm(sublayer.d_ff, generator=generator)

    def run() -> Tensor:
        with torch.no_grad():
            leaves = tree_leaves(module(*args, **kwargs))
        return next(leaf for leaf in leaves if isinstance(leaf, Tensor))

    before = run()
    for weight, parameter in weights.items():
        if not weight.name.startswith(f"{sublayer.output}."):
            parameter.data = weight.reordered(parameter.data, order)
    half_way = run()
    for weight, parameter in weights.items():
        if weight.name.startswith(f"{sublayer.output}."):
            parameter.data = weight.reordered(parameter.data, order)
    held = (run() - before).abs().max()
    return bool(held < 1e-3 * (half_way - before).abs().max())  # measured: 1e-7 to 1e-6


def _float32(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float().cpu() if value.is_floating_point() else value.cpu()
    return value
