"""What else a model of the same size could be: rivals that merging has to beat.

A rival stands in the model for the length of a block and is measured there. None is saved: what
wins is better had from a tool of its own. The rivals ``copy-anchor`` and ``drop-ffn`` are merge
methods.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, product
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ffmerge.models import ties
from ffmerge.models.probe import Array
from ffmerge.models.sublayer import FeedForward
from ffmerge.models.ties import Key, SharedWeights
from ffmerge.passes.weights.activations import watch
from ffmerge.passes.weights.calibrated import low_rank
from ffmerge.passes.weights.moments import Moments

Stacks = Mapping[str, Sequence[FeedForward]]


@dataclass(frozen=True)
class Rival:
    """A model made smaller in another way, while ``applied()`` lasts."""

    name: str
    what: str
    removed: int  # parameters
    applied: Callable[[], AbstractContextManager[None]]


def drop_layers(model: nn.Module, by_stack: Stacks, removed: int) -> list[Rival]:
    """Return a rival for each window of whole layers, as short as removes ``removed`` parameters.

    With several stacks the same window is taken out of each (arXiv 2403.03853 chooses layers by
    what they change; here, as in the paper's own baseline, all windows are to be measured).
    """
    lists = [_blocks(members) for members in by_stack.values()]
    size = {p: sum(x.numel() for x in model.get_submodule(p).parameters()) for p in chain(*lists)}
    length = math.ceil(removed / sum(min(size[path] for path in paths) for paths in lists))
    first, rivals = next(iter(by_stack.values())), []
    for start in range(min(map(len, lists)) - length + 1):
        span = slice(start, start + length)
        gone = [path for paths in lists for path in paths[span]]
        what = f"{first[span][0].layer}-{first[span][-1].layer}"
        total = sum(size[path] for path in gone)
        rivals.append(Rival("drop-layer", what, total, partial(_without, model, gone)))
    return rivals


def factor(
    model: nn.Module,
    by_stack: Stacks,
    removed: int,
    batches: Iterable[Mapping[str, Array]],
    tokens: int,
) -> list[Rival]:
    """Return one rival: every map as a product of two, so thin that ``removed`` parameters go.

    The rank is cut where that least changes what a map puts out on the data (arXiv 2403.07378),
    all maps by the same part of their size, and the biases keep the mean of what it puts out.
    """
    maps: list[Any] = [model.get_submodule(p) for m in chain(*by_stack.values()) for p in m.maps]
    sizes = [_matrix(module).shape for module in maps]
    added = sum(len(_matrix(module)) for module in maps if module.bias is None)
    keep = 1 - (removed + added) / sum(rows * columns for rows, columns in sizes)
    ranks = {s: int(keep * s[0] * s[1] / sum(s)) for s in sizes}
    kept = sum(ranks[s] * sum(s) for s in sizes) + added
    gone = sum(rows * columns for rows, columns in sizes) - kept
    seen = {
        (name, m.layer, last): Moments(((m.layer, m.layer),), dtype=torch.float64)
        for name, found in by_stack.items()
        for m, last in product(found, (False, True))
    }
    for signals in watch(model, by_stack, batches, tokens):
        for name, by_layer in signals.items():
            for layer, signal in by_layer.items():
                seen[name, layer, False].update({layer: signal.inputs[None]})
                seen[name, layer, True].update({layer: signal.hidden[None]})
    groups, sharings = [], []
    for name, member in ((name, m) for name, found in by_stack.items() for m in found):
        own: dict[Key, Tensor] = {}
        for i, path in enumerate(member.maps):
            module: Any = model.get_submodule(path)
            matrix = _matrix(module)
            moments = seen[name, member.layer, i == len(member.inputs)]
            covariance = moments.cross[member.layer, member.layer][0].double() / moments.count
            up, down = low_rank(matrix.double(), covariance, ranks[matrix.shape])
            thin = (up @ down).to(matrix.dtype)
            shift = (matrix - thin) @ moments.mean[member.layer][0].to(matrix.dtype)
            own[i, "weight"] = thin.T if isinstance(module, Conv1D) else thin
            own[i, "bias"] = shift if module.bias is None else module.bias.detach() + shift
        groups.append([member])
        sharings.append(SharedWeights({}, [own]))
    return [Rival("low-rank", "", gone, partial(ties.tied, model, groups, sharings))]


def _matrix(module: Any) -> Tensor:
    """Return the (out, in) matrix of a map."""
    weight: Tensor = module.weight.detach()
    return weight.T if isinstance(module, Conv1D) else weight


def _blocks(members: Sequence[FeedForward]) -> list[str]:
    """Return the paths of the whole layers around a stack's sublayers: to where they part."""
    parts = [member.output.split(".") for member in members]
    place = next(i for i, names in enumerate(zip(*parts, strict=False)) if len(set(names)) > 1)
    return [".".join(names[: place + 1]) for names in parts]


@contextmanager
def _without(model: nn.Module, paths: Sequence[str]) -> Iterator[None]:
    """Let the layers at ``paths`` pass on what they are given, for the length of the block."""

    def skip(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> Any:
        given = args[0] if args else kwargs["hidden_states"]
        return (given, *out[1:]) if isinstance(out, tuple) else given

    with ExitStack() as stack:
        for path in paths:
            hook = model.get_submodule(path).register_forward_hook(skip, with_kwargs=True)
            stack.callback(hook.remove)
        yield
