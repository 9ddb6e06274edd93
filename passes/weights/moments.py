"""Moments of hidden neurons, in one pass over the data.

The features X of a plain sublayer are the outputs of its map d -> f, before the nonlinearity
(arXiv 2501.06126, section 3.3). A gated one has two such outputs for each neuron, gate and up; both
count, and so does their product that the map f -> d takes (docs/merging.md). Batches are merged by
the update of Chan, Golub and LeVeque (1979): every batch is centred on its own mean before it is
squared, so nothing cancels however far the mean lies from zero.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from accelerate.utils import reduce
from torch import Tensor

Pair = tuple[int, int]


@dataclass
class Moments:
    """Count, means, sums of squares and of cross products of the layers' features.

    Features have v views of the same f neurons: 1, or 3 of a gated sublayer. ``cross``
    holds, for each pair (anchor, other), the (v, f, f) sums of products of deviations, in
    ``dtype``; means and squares are (v, f) in float64. ``inputs`` are the moments of what the
    layers read, each paired with itself, ``hidden`` those of what the map f -> d is given,
    unpaired.
    """

    pairs: tuple[Pair, ...]
    count: int = 0
    dtype: torch.dtype = torch.float32
    mean: dict[int, Tensor] = field(default_factory=dict)
    squares: dict[int, Tensor] = field(default_factory=dict)
    cross: dict[Pair, Tensor] = field(default_factory=dict)
    inputs: "Moments | None" = None
    hidden: "Moments | None" = None

    def update(self, features: Mapping[int, Tensor]) -> None:
        """Add a batch: (v, n, f) features of every layer, the same n rows in each."""
        views, n, _ = next(iter(features.values())).shape
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
            if (a, b) not in self.cross:
                shape = (views, means[a].shape[1], means[b].shape[1])
                self.cross[a, b] = centred[a].new_zeros(shape, dtype=self.dtype)
            for view, total_of in enumerate(self.cross[a, b]):
                x, y = centred[a][view], centred[b][view]
                if self.dtype == x.dtype:
                    total_of.addmm_(x.T, y)
                else:  # products too: of those in float32 the sum may be indefinite
                    total_of += x[:n].to(self.dtype).T @ y[:n].to(self.dtype)
                    total_of.addr_(scale * shift[a][view], shift[b][view])
        self.count = total

    def pooled(self, sizes: Mapping[int, tuple[int, int]], like: Tensor) -> None:
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
        found = Moments((*self.cross, *other.cross), self.count)
        for name in ("mean", "squares", "cross"):
            getattr(found, name).update(getattr(self, name) | getattr(other, name))
        if self.inputs and other.inputs and self.hidden and other.hidden:
            found.inputs = self.inputs.joined(other.inputs)
            found.hidden = self.hidden.joined(other.hidden)
        return found

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
