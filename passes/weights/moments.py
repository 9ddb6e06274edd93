"""Means, variances and cross products of what layers compute, in one pass over the data.

:func:`~ffmerge.passes.weights.activations.collect` feeds batches of activations in, methods read
correlations and covariances. Batches are merged by the update of Chan, Golub and LeVeque (1979):
every batch is centred on its own mean before it is squared, so nothing cancels however far the mean
lies from zero.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from accelerate.utils import reduce
from torch import Tensor

Pair = tuple[int, int]


@dataclass
class Moments:
    """Count, means, sums of squares and of cross products of layers' features.

    Features are (v, n, f): v views of the same f neurons at n positions; v is 3 for the neurons of
    a gated sublayer, else 1. Means and squares are (v, f) in float64. ``cross`` holds, for each of
    the ``pairs`` of layers, the (v, f, f) sums of products of deviations, in ``dtype``: a
    covariance that is going to be factored takes float64.
    """

    pairs: tuple[Pair, ...]
    count: int = 0
    dtype: torch.dtype = torch.float32
    mean: dict[int, Tensor] = field(default_factory=dict)
    squares: dict[int, Tensor] = field(default_factory=dict)
    cross: dict[Pair, Tensor] = field(default_factory=dict)

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers of all pairs."""
        return tuple(dict.fromkeys(layer for pair in self.pairs for layer in pair))

    def update(self, features: Mapping[int, Tensor]) -> None:
        """Add a batch: (v, n, f) features of every layer, the same n positions in each."""
        _, n, _ = next(iter(features.values())).shape
        if n == 0:
            return
        total = self.count + n
        means = {layer: x.mean(1, dtype=torch.float64) for layer, x in features.items()}
        shift = {layer: m - self.mean.get(layer, m) for layer, m in means.items()}
        scale = self.count * n / total
        centred = {}
        for layer, x in features.items():
            # the last row gives what the means of the batch and of those before are apart
            centred[layer] = _centred(x, means[layer], scale**0.5 * shift[layer])
            squares = torch.linalg.vector_norm(centred[layer][:, :n], dim=1, dtype=torch.float64)
            squares = squares.square() + scale * shift[layer].square()
            self.squares[layer] = self.squares.get(layer, 0) + squares
            self.mean[layer] = self.mean.get(layer, means[layer]) + shift[layer] * (n / total)
        for a, b in self.pairs:
            x, y = centred[a], centred[b]
            if (a, b) not in self.cross:
                shape = (len(x), x.shape[2], y.shape[2])
                self.cross[a, b] = x.new_zeros(shape, dtype=self.dtype)
            for view, sums in enumerate(self.cross[a, b]):
                if self.dtype == x.dtype:
                    sums.addmm_(x[view].T, y[view])
                else:  # products too: of those in float32 the sum may be indefinite
                    sums += x[view, :n].to(self.dtype).T @ y[view, :n].to(self.dtype)
                    sums.addr_(scale * shift[a][view], shift[b][view])
        self.count = total

    def pool_(self, sizes: Mapping[int, tuple[int, int]], like: Tensor) -> None:
        """Make these the moments of all processes together, none of which need have a batch.

        ``sizes`` are the (v, f) of every layer, ``like`` is a tensor of the device.
        """
        count = like.new_tensor(self.count, dtype=torch.float64)
        total = reduce(count, "sum")
        shift = {}
        for layer, size in sizes.items():
            zeros = like.new_zeros(size, dtype=torch.float64)
            mean = self.mean.get(layer, zeros)
            self.mean[layer] = reduce(mean * count, "sum") / total.clamp(min=1)
            shift[layer] = mean - self.mean[layer]
            squares = self.squares.get(layer, zeros) + count * shift[layer].square()
            self.squares[layer] = reduce(squares, "sum")
        for a, b in self.pairs:
            (views, f), (_, g) = sizes[a], sizes[b]
            cross = self.cross.get((a, b), like.new_zeros((views, f, g), dtype=self.dtype))
            for view in range(views):
                x, y = (count * shift[a][view]).to(cross), shift[b][view].to(cross)
                cross[view].addr_(x, y)
            self.cross[a, b] = reduce(cross, "sum")
        self.count = int(total)

    def joined(self, other: "Moments") -> "Moments":
        """Return these moments with those of other layers and pairs at the same positions."""
        return Moments(
            pairs=(*self.cross, *other.cross),
            count=self.count,
            dtype=self.dtype,
            mean=self.mean | other.mean,
            squares=self.squares | other.squares,
            cross=self.cross | other.cross,
        )

    def covariance(self, layer: int) -> Tensor:
        """Return the (f, f) covariance of a layer that is paired with itself, in float64."""
        return self.cross[layer, layer][0].double() / self.count

    def correlation(self, anchor: int, other: int) -> Tensor:
        """Return equation (1), the (f, f) Pearson correlation; rows are the anchor's neurons.

        Summed over the views. A neuron that never changes correlates with nothing: its row or
        column is 0.
        """
        if (anchor, other) not in self.cross:
            return self.correlation(other, anchor).T
        crosses = self.cross[anchor, other]
        total = torch.zeros_like(crosses[0])
        for cross, a, b in zip(crosses, self.squares[anchor], self.squares[other], strict=True):
            spread = torch.outer(a.sqrt(), b.sqrt()).float()
            total += torch.where(spread > 0, cross / spread, 0.0)
        return total


def _centred(x: Tensor, mean: Tensor, last: Tensor) -> Tensor:
    """Return the rows ``x - mean``, (v, n, f), and one more, in float32.

    What rounding takes from the mean is taken off after it.
    """
    near = mean.float()[:, None]
    out = near.new_empty((x.shape[0], x.shape[1] + 1, x.shape[2]))
    torch.sub(x, near, out=out[:, :-1])
    out[:, :-1] -= mean[:, None] - near
    out[:, -1] = last
    return out
