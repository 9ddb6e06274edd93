"""Which neuron of one layer belongs to which neuron of another."""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def match(correlation: Tensor) -> Tensor:
    """Return equation (2): the order that maximises the sum of ``correlation[j, order[j]]``.

    ``correlation`` is (f, f) with the anchor's neurons as rows. ``order`` is a permutation:
    place j of the aligned layer takes the other layer's neuron ``order[j]``. Solved exactly by
    SciPy's linear assignment (Crouse 2016).
    """
    _, order = linear_sum_assignment(correlation.cpu().numpy(), maximize=True)
    return torch.as_tensor(order)
