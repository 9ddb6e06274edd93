"""What else a model of the same size could be: methods that merging has to beat.

``compare`` measures them like all others. What they do is not saved: what wins is better had from
a tool of its own.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ffmerge.models import ties
from ffmerge.models.sublayer import FeedForward, block_of
from ffmerge.models.ties import Key, SharedWeights
from ffmerge.passes.weights.activations import add_up
from ffmerge.passes.weights.calibrated import low_rank
from ffmerge.passes.weights.evidence import Evidence
from ffmerge.passes.weights.methods import Temporary, method
from ffmerge.passes.weights.moments import Moments
from ffmerge.passes.weights.windows import Choice, Stacks


def _shortest_windows(model: Any, by_stack: Stacks, k: int) -> list[Choice]:
    """Return the windows of whole layers that are as short as removes what merging k layers does.

    With several stacks the same window is taken out of each (arXiv 2403.03853 chooses layers by
    what they change; here, as in the paper's own baseline, all windows are to be measured).
    """
    removed = smallest = 0
    for members in by_stack.values():
        removed += (k - 1) * _weights_of(model, members[0])
        smallest += min(_parameters_of(model, _layer_of(model, each)) for each in members)
    length = math.ceil(removed / smallest)
    choices = []
    for start in range(min(map(len, by_stack.values())) - length + 1):
        window = slice(start, start + length)
        choices.append(tuple(members[window] for members in by_stack.values()))
    return choices


@method(
    "drop-layer",
    source="arXiv 2403.03853, its baseline of all windows",
    statistics=False,
    saved=False,
    choices=_shortest_windows,
)
def drop_layers(model: Any, members: Sequence[FeedForward], evidence: Evidence) -> Temporary:
    """Return the whole layers around the members passing on what they are given."""
    paths = [_layer_of(model, member) for member in members]
    removed = sum(_parameters_of(model, path) for path in paths)
    return Temporary(removed, partial(_without, model, paths))


def _all_layers(model: Any, by_stack: Stacks, k: int) -> list[Choice]:
    return [tuple(by_stack.values())]


@method("low-rank", source="arXiv 2403.07378", statistics=False, saved=False, choices=_all_layers)
def factor(model: Any, members: Sequence[FeedForward], evidence: Evidence) -> Temporary:
    """Return every map as a product of two, so thin that as much goes as by merging k layers.

    The rank is cut where that least changes what a map puts out on the data (arXiv 2403.07378),
    all maps by the same part of their size, and the biases keep the mean of what it puts out.
    """
    removed = ((evidence.k or 1) - 1) * _weights_of(model, members[0])
    size = added = 0
    for path in (path for member in members for path in member.maps):
        module = model.get_submodule(path)
        size += module.weight.numel()
        if module.bias is None:
            added += len(_matrix(module))
    keep = 1 - (removed + added) / size
    moments = _map_moments(model, members, evidence)
    left, own = added, []
    for member in members:
        mine: dict[Key, Tensor] = {}
        for number, path in enumerate(member.maps):
            module = model.get_submodule(path)
            rows, columns = _matrix(module).shape
            rank = int(keep * rows * columns / (rows + columns))
            left += rank * (rows + columns)
            read = moments["hidden" if number == len(member.inputs) else "inputs"]
            mine |= _thin(module, number, read, member.layer, rank)
        own.append(mine)
    weights = SharedWeights({}, own)
    return Temporary(size - left, partial(ties.tied, model, [members], [weights]))


def _map_moments(
    model: Any, members: Sequence[FeedForward], evidence: Evidence
) -> dict[str, Moments]:
    """Return means and covariances of what the maps d -> f and the maps f -> d are given."""
    own = tuple((member.layer, member.layer) for member in members)
    moments = {what: Moments(own, dtype=torch.float64) for what in ("inputs", "hidden")}
    stack = members[0].stack
    add_up(model, {stack: members}, {stack: moments}, evidence.batches(), evidence.tokens)
    return moments


def _thin(module: Any, number: int, read: Moments, layer: int, rank: int) -> dict[Key, Tensor]:
    """Return weight and bias of a map cut to a rank, that reads the inputs of ``layer``."""
    matrix = _matrix(module)
    up, down = low_rank(matrix.double(), read.covariance(layer), rank)
    thin = (up @ down).to(matrix.dtype)
    bias = (matrix - thin) @ read.mean[layer][0].to(matrix.dtype)
    if module.bias is not None:
        bias += module.bias.detach()
    return {
        (number, "weight"): thin.T if isinstance(module, Conv1D) else thin,
        (number, "bias"): bias,
    }


def _matrix(module: Any) -> Tensor:
    """Return the (out, in) matrix of a map."""
    weight: Tensor = module.weight.detach()
    return weight.T if isinstance(module, Conv1D) else weight


def _weights_of(model: Any, member: FeedForward) -> int:
    """Return the number of parameters of a sublayer."""
    return sum(model.get_parameter(weight.name).numel() for weight in member.weights)


def _parameters_of(model: Any, path: str) -> int:
    return sum(parameter.numel() for parameter in model.get_submodule(path).parameters())


def _layer_of(model: Any, member: FeedForward) -> str:
    """Return the path of the whole layer around a sublayer."""
    block = block_of(model, member.output)
    assert block is not None  # a sublayer is found in a repeated block only
    return f"{block[0]}.{block[1]}"


@contextmanager
def _without(model: nn.Module, paths: Sequence[str]) -> Iterator[None]:
    """Let the layers at ``paths`` pass on what they are given, for the length of the block."""

    def skip(layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> Any:
        given = args[0] if args else kwargs[next(iter(signature(layer.forward).parameters))]
        return (given, *out[1:]) if isinstance(out, tuple) else given

    handles = []
    try:
        for path in paths:
            module = model.get_submodule(path)
            handles.append(module.register_forward_hook(skip, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
