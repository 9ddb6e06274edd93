"""Which neuron of one layer belongs to which neuron of another."""

from collections.abc import Sequence
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


def jointly(rows: Sequence[Tensor]) -> list[Tensor | None]:
    """Return orders of neurons: each layer matched best to all others as they are ordered.

    ``rows`` are (f, n) for each layer, a neuron in each row; two are alike by their product. Layer
    0 keeps its order; the others start aligned to it and are matched anew, one after the other,
    until none changes (coordinate ascent as in Git Re-Basin, algorithm 1).
    """
    orders = [torch.arange(len(rows[0])), *(match(rows[0] @ other.T) for other in rows[1:])]
    for _ in range(_SWEEPS):
        before = torch.stack(orders)
        for layer in range(1, len(rows)):
            others = torch.zeros_like(rows[0])
            for other, order in enumerate(orders):
                if other != layer:
                    others += rows[other][order.to(others.device)]
            orders[layer] = match(others @ rows[layer].T)
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
