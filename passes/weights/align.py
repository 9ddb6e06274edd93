"""Which neuron of one layer belongs to which neuron of another."""

from collections.abc import Mapping

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

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
