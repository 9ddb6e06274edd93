"""Find the feed-forward sublayers of a model by following the data of one forward pass.

:func:`find` is called wherever a model has to be understood: to merge, inspect, save and load it.
Only the data flow is read (``models/dataflow.py``), so no table of model or module names is needed
and no weights are. What only looks like a sublayer (experts, convolutions, anything between the
maps that tells neurons apart) is left alone, with the reason. Before a merge, what is found is
proved as well: ``models/prove.py``.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import permutations

from torch import nn
from transformers.pytorch_utils import Conv1D

from ffmerge.models.dataflow import ELEMENTWISE, HALVES, NONE, PRODUCT, VIEWS, DataFlow, follow
from ffmerge.models.sublayer import FeedForward, LeftAlone, Weight, block_of

_MOVES = {"transpose", "t", "permute", "native_dropout"}  # keep neurons apart, not in their place
_PICKS = {"index", "index_select", "gather"}  # how a router hands tokens to an expert

# Which axis of each part counts hidden neurons, in the maps d -> f and in the map f -> d, where
# weights are (out, in), as in Linear.
_INPUT_AXES = {"weight": 0, "bias": 0, "scale": 0, "down": None, "up": 0}
_OUTPUT_AXES = {"weight": 1, "bias": None, "scale": None, "down": 1, "up": None}

EXPERTS = "mixture-of-experts: a router gives every expert other tokens"

Maps = tuple[str, ...]  # the linear maps d -> f, and last the map f -> d


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
    flow = follow(model)
    left = dict.fromkeys(_banks(model), EXPERTS)
    found: dict[Maps, list[int]] = {}  # with what each run of it read
    alike: dict[Maps, str] = {}
    for maps, sources, ops in _candidates(model, flow):
        reason = _why_not(flow, maps, sources, ops)
        if reason:
            if _look_alike(model, flow, maps):
                alike[maps] = reason
        elif flow.maker(flow.origin(sources[0], VIEWS | HALVES)) in _PICKS:
            left[_common_prefix(maps).rpartition(".")[0]] = EXPERTS
        else:
            found.setdefault(maps, []).append(sources[0])
    left |= _unlike(alike, found, left)
    return _sublayers(model, flow, found), tuple(LeftAlone(*item) for item in left.items())


def _candidates(model: nn.Module, flow: DataFlow) -> Iterator[tuple[Maps, list[int], set[str]]]:
    """Yield maps in a block whose sizes are d -> f -> d, what they read, and the ops between."""
    for output, hidden in flow.calls:
        inputs, sources, ops = flow.before(hidden)
        maps = (*inputs, output)
        if not inputs or PRODUCT in ops or block_of(model, output) is None:
            continue
        if _fit(flow, maps) and flow.reads(sources[0]):
            yield maps, sources, ops


def _fit(flow: DataFlow, maps: Maps) -> bool:
    """Tell whether the sizes of the maps are those of d -> f -> d."""
    *inputs, output = maps
    d_ff, d_model = flow.sides[output]
    return all(flow.sides[name] in ((d_model, d_ff), (d_model, 2 * d_ff)) for name in inputs)


def _is_fused(flow: DataFlow, maps: Maps) -> bool:
    """Tell whether the one map d -> f is a gate and up projection in one."""
    return flow.sides[maps[0]][1] > flow.sides[maps[-1]][0]


def _why_not(flow: DataFlow, maps: Maps, sources: Sequence[int], ops: set[str]) -> str:
    """Return why maps of fitting sizes are no feed-forward sublayer, nothing if they are one.

    ``sources`` are what the maps d -> f read, ``ops`` what is between them and the map f -> d.
    """
    if flow.convolutions.intersection(maps):
        return "its maps are convolutions"
    between = ops - VIEWS - HALVES - {ELEMENTWISE}
    if unlike := {op.strip("_") for op in between - _MOVES - {NONE}}:
        return f"{min(unlike)} between its maps does not treat every neuron alike"
    *inputs, output = maps
    most = 1 if _is_fused(flow, maps) else 2
    of_one_size = len({flow.sides[name] for name in inputs}) == 1
    of_one_tensor = len({flow.origin(source, VIEWS) for source in sources}) == 1
    is_plain = of_one_size and of_one_tensor and len(inputs) <= most and output not in inputs
    if between or ELEMENTWISE not in ops or not is_plain:
        return "its maps d -> f read several tensors, or another tensor enters after them"
    return ""


def _look_alike(model: nn.Module, flow: DataFlow, maps: Maps) -> bool:
    d_ff, d_model = flow.sides[maps[-1]]
    return d_ff > d_model and len({block_of(model, name) for name in maps}) == 1


def _unlike(alike: dict[Maps, str], found: Iterable[Maps], left: Iterable[str]) -> dict[str, str]:
    """Return by path what only looks like a sublayer, and is neither one nor part of experts."""
    outputs = {maps[-1] for maps in found}
    unlike: dict[str, str] = {}
    for maps, reason in alike.items():
        path = _common_prefix(maps)
        around = [other for other in (*left, *unlike) if path.startswith(f"{other}.")]
        if maps[-1] not in outputs and not around:
            unlike[path] = reason
    return unlike


def _banks(model: nn.Module) -> list[str]:
    """Return the modules that hold maps d -> f and f -> d of all experts as 3-D parameters."""
    paths: list[str] = []
    for path, module in model.named_modules():
        shapes = []
        for owner in (module, *module.children()):
            if not hasattr(owner, "kernel_size"):
                shapes += [p.shape for p in owner.parameters(recurse=False) if p.ndim == 3]
        if any(_are_experts(one, other) for one, other in permutations(shapes, 2)):
            paths = [outer for outer in paths if not path.startswith(f"{outer}.")]
            paths.append(path)
    return paths


def _are_experts(one: Sequence[int], other: Sequence[int]) -> bool:
    """Tell whether 3-D parameters of these shapes map d -> f and f -> d, for several experts."""
    (experts, a, b), (others, c, e) = one, other
    if experts != others or experts < 2 or (a, b) == (c, e):
        return False
    return (c == b and a in (e, 2 * e)) or (e == a and b in (c, 2 * c))


def _sublayers(
    model: nn.Module, flow: DataFlow, found: dict[Maps, list[int]]
) -> tuple[FeedForward, ...]:
    names = _stack_names(model, found)
    sublayers = []
    for maps, sources in found.items():
        d_ff, d_model = flow.sides[maps[-1]]
        sublayers.append(
            FeedForward(
                stack=names[maps],
                layer=_block(model, maps)[1],
                path=_common_prefix(maps),
                inputs=maps[:-1],
                output=maps[-1],
                d_model=d_model,
                d_ff=d_ff,
                weights=_weights(model, maps, blocks=2 if _is_fused(flow, maps) else 1),
                reads=flow.reads(sources[0]),
                runs=len({flow.origin(source, VIEWS | HALVES) for source in sources}),
            )
        )
    return tuple(sublayers)


def _stack_names(model: nn.Module, found: Iterable[Maps]) -> dict[Maps, str]:
    """Return the stack of each sublayer: one for each list of blocks and place in a block.

    A stack is called by the parts of its path that others lack, ``layers`` if alone: names of
    modules vary between releases of transformers where a model has one stack; where it has
    several, the parts that tell them apart (``encoder``, ``decoder``) do not.
    """
    inner = {}  # the list of blocks, and where in a block the sublayer is
    for maps in found:
        blocks, layer = _block(model, maps)
        inner[maps] = blocks, _common_prefix(maps).removeprefix(f"{blocks}.{layer}")
    in_a_block = Counter(blocks for blocks, _ in set(inner.values()))
    parts = {}
    for maps, (blocks, path) in inner.items():
        parts[maps] = (blocks + path if in_a_block[blocks] > 1 else blocks).split(".")
    names = {}
    for maps, own in parts.items():
        telling = [part for part in own if any(part not in other for other in parts.values())]
        names[maps] = ".".join(telling) or "layers"
    return names


def _weights(model: nn.Module, maps: Maps, blocks: int) -> tuple[Weight, ...]:
    """Return the parameters of the maps; those of the maps d -> f hold ``blocks`` of neurons."""
    weights = []
    for path in maps:
        module = model.get_submodule(path)
        is_output = path == maps[-1]
        for part, axis in (_OUTPUT_AXES if is_output else _INPUT_AXES).items():
            if getattr(module, part, None) is None:
                continue
            if part == "weight" and isinstance(module, Conv1D):  # (in, out)
                axis = int(not axis)
            weights.append(Weight(f"{path}.{part}", axis, 1 if is_output else blocks))
    return tuple(weights)


def _block(model: nn.Module, maps: Maps) -> tuple[str, int]:
    block = block_of(model, maps[-1])
    assert block is not None  # only maps in blocks are looked at
    return block


def _common_prefix(paths: Sequence[str]) -> str:
    first, *others = (path.split(".") for path in paths)
    length = 0
    while all(other[length] == first[length] for other in others):
        length += 1
    return ".".join(first[:length])
