"""Which neuron of one layer belongs to which neuron of another."""

from collections.abc import Mapping
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ffmerge.models.offload import device_of
from ffmerge.models.sublayer import FeedForward

_SWEEPS = 20  # seen: 2 to 6 until nothing changes


def match(similarity: Tensor) -> Tensor:
    """Return equation (2): the order that maximises the sum of ``similarity[j, order[j]]``.

    ``similarity`` is (f, f) with the anchor's neurons as rows. ``order`` is a permutation:
    place j of the aligned layer takes the other layer's neuron ``order[j]``. Solved exactly by
    SciPy's linear assignment (Crouse 2016).
    """
    _, order = linear_sum_assignment(similarity.cpu().numpy(), maximize=True)
    return torch.as_tensor(order)


def jointly(similarity: Mapping[tuple[int, int], Tensor], count: int) -> list[Tensor | None]:
    """Return orders of ``count`` layers, each the best match to all others as they are ordered.

    ``similarity[a, b]`` is (f, f) with the neurons of layer a as rows, for all a != b. Layer 0
    keeps its order; the others start aligned to it and are matched anew, one after the other,
    until none changes (coordinate ascent as in Git Re-Basin, algorithm 1).
    """
    f = len(similarity[0, 1])
    orders = [torch.arange(f), *(match(similarity[0, b]) for b in range(1, count))]
    for _ in range(_SWEEPS):
        before = torch.stack(orders)
        for b in range(1, count):
            others = [similarity[a, b][orders[a]] for a in range(count) if a != b]
            orders[b] = match(torch.stack(others).sum(0))
        if torch.equal(before, torch.stack(orders)):
            break
    return [None, *orders[1:]]


def neurons(
    model: Any, member: FeedForward, order: Tensor | None = None
) -> dict[tuple[int, str], Tensor]:
    """Return the parameters that have neurons, as float64 (f, ...) matrices with neurons first.

    Neuron ``order[j]`` is in row j. Blocks of a fused map stand side by side. They lie where the
    model computes.
    """
    found = {}
    for key, weight in zip(member.keys, member.weights, strict=True):
        value = model.get_parameter(weight.name).detach().to(device_of(model)).double()
        if weight.neurons is not None:
            value = value.movedim(weight.neurons, 0).reshape(weight.blocks, member.d_ff, -1)
            rows = torch.cat([*value], 1)
            found[key] = rows if order is None else rows[order.to(rows.device)]
    return found
