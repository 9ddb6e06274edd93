"""Least squares with a ridge: one matrix for several layers, from sums over batches.

The method ``calibrated`` solves for W_out here.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.linalg import LinAlgError, cho_factor, cho_solve
from torch import Tensor

from ffmerge.errors import InputError

RIDGE = 1e-2  # relative to the mean of the diagonal
_STRIPE = 512  # columns of a symmetric product that are computed at a time


@dataclass
class Regression:
    """Least squares of one matrix for several layers, each with a bias of its own.

    Minimises the sum over layers of ``|H_l W + b_l - Y_l|^2``. ``gram`` (f, f) and ``cross``
    (f, d) are sums of products of deviations from each layer's own means, in float32, merged as
    in :class:`~ffmerge.passes.weights.moments.Moments`; the means are float64. Of the gram, which
    is symmetric, only the stripes below the diagonal are computed: for f = 3072 that is 58 % of it.
    """

    gram: Tensor
    cross: Tensor
    counts: dict[int, float] = field(default_factory=dict)
    hidden: dict[int, Tensor] = field(default_factory=dict)
    target: dict[int, Tensor] = field(default_factory=dict)

    def update(
        self, layer: int, hidden: Tensor, target: Tensor, weights: Tensor | None = None
    ) -> None:
        """Add a batch of a layer: (n, f) and (n, d), all rows alike or by ``weights`` (n,)."""
        n, seen = float(len(hidden)), self.counts.get(layer, 0.0)
        if n == 0:
            return
        h, y = hidden.double().mean(0), target.double().mean(0)
        if weights is not None:
            n = float(weights.double().sum())
            h, y = (weights.double() @ each.double() / n for each in (hidden, target))
        dh, dy = (hidden - h).float(), (target - y).float()
        if weights is not None:
            root = weights.float().sqrt()[:, None]
            dh, dy = dh * root, dy * root
        for start in range(0, len(self.gram), _STRIPE):
            stripe = dh[:, start : start + _STRIPE]
            self.gram[start:, start : start + _STRIPE].addmm_(dh[:, start:].T, stripe)
        self.cross.addmm_(dh.T, dy)
        to_h = h - self.hidden.get(layer, h)
        to_y = y - self.target.get(layer, y)
        part = seen * n / (seen + n)
        self.gram.addr_((part * to_h).float(), to_h.float())
        self.cross.addr_((part * to_h).float(), to_y.float())
        self.hidden[layer] = h - to_h * (seen / (seen + n))
        self.target[layer] = y - to_y * (seen / (seen + n))
        self.counts[layer] = seen + n

    def solve(self, ridge: float) -> Tensor:
        """Return W, (f, d) in float64; 0 in directions that the data has not."""
        return ridge_solve(self.gram, self.cross, ridge).double()

    def bias(self, layer: int, weight: Tensor) -> Tensor:
        """Return the best b_l, (d,), to a weight."""
        return self.target[layer] - self.hidden[layer] @ weight


def ridge_solve(gram: Tensor, right: Tensor, ridge: float) -> Tensor:
    """Return X of ``(gram + strength I) X = right``, solved in float64 and finite for any gram.

    Of ``gram`` the lower triangle is read. The strength is ``ridge`` times the mean of the
    diagonal, 1 where that is 0, and never below what rounding can have cost a gram of its type. X
    has the type of ``right``.

    Raises:
        InputError: the statistics are not finite, or the ridge is too small for them.
    """
    relative = max(ridge, len(gram) * torch.finfo(gram.dtype).eps)
    strength = relative * float(gram.diagonal().double().mean()) or 1.0
    damped = gram.cpu().numpy().astype(np.float64, order="F")
    damped[np.diag_indices_from(damped)] += strength
    try:
        factor = cho_factor(damped, lower=True, overwrite_a=True, check_finite=False)
    except LinAlgError as error:
        raise InputError(f"ridge {ridge} is too small for the statistics of this data.") from error
    columns = right.cpu().numpy().astype(np.float64, order="F")
    solution = cho_solve(factor, columns, overwrite_b=True, check_finite=False)
    return torch.from_numpy(solution).to(right)
