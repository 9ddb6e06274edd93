"""Moments of hidden pre-activations, in one pass over the data.

The features X of a sublayer are the outputs of its map d -> f, before the nonlinearity
(arXiv 2501.06126, section 3.3). Batches are merged by the update of Chan, Golub and LeVeque
(1979): every batch is centred on its own mean before it is squared, so nothing cancels however
far the mean lies from zero.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ffmerge.errors import InputError
from ffmerge.models.feedforward import FeedForward
from ffmerge.models.inputs import to_tensors
from ffmerge.models.probe import Array

Pair = tuple[int, int]


@dataclass
class Moments:
    """Count, means, sums of squares and of cross products of the layers' features.

    ``cross`` holds, for each pair (anchor, other), the (f, f) sums of products of deviations,
    in float32; means and squares are (f,) in float64.
    """

    pairs: tuple[Pair, ...]
    count: int = 0
    mean: dict[int, Tensor] = field(default_factory=dict)
    squares: dict[int, Tensor] = field(default_factory=dict)
    cross: dict[Pair, Tensor] = field(default_factory=dict)

    def update(self, features: Mapping[int, Tensor]) -> None:
        """Add a batch: (n, f) features of every layer, the same n rows in each."""
        n = len(next(iter(features.values())))
        if n == 0:
            return
        total = self.count + n
        means = {layer: x.double().mean(0) for layer, x in features.items()}
        centred = {layer: (x.double() - means[layer]).float() for layer, x in features.items()}
        shift = {layer: m - self.mean.get(layer, m) for layer, m in means.items()}
        scale = self.count * n / total
        for layer, x in centred.items():
            squares = x.double().square().sum(0) + scale * shift[layer].square()
            self.squares[layer] = self.squares.get(layer, 0) + squares
            self.mean[layer] = self.mean.get(layer, means[layer]) + shift[layer] * (n / total)
        for a, b in self.pairs:
            cross = self.cross.setdefault((a, b), x.new_zeros(len(means[a]), len(means[b])))
            cross.addmm_(centred[a].T, centred[b])
            cross.addr_((scale * shift[a]).float(), shift[b].float())
        self.count = total

    def correlation(self, anchor: int, other: int) -> Tensor:
        """Return equation (1), the (f, f) Pearson correlation; rows are the anchor's neurons.

        A neuron that never changes correlates with nothing: its row or column is 0.
        """
        spread = torch.outer(self.squares[anchor].sqrt(), self.squares[other].sqrt()).float()
        return torch.where(spread > 0, self.cross[anchor, other] / spread, 0.0)


def window_pairs(layers: Sequence[int], windows: Iterable[Sequence[int]]) -> tuple[Pair, ...]:
    """Return every (anchor, member) pair that some window needs, once, in layer order."""
    pairs = {(layers[w[0]], layers[i]) for w in windows for i in w[1:]}
    return tuple(sorted(pairs))


def collect(
    model: Any,
    sublayers: Sequence[FeedForward],
    pairs: Iterable[Pair],
    batches: Iterable[Mapping[str, Array]],
    tokens: int,
) -> Moments:
    """Return the moments of the sublayers' pre-activations over at least ``tokens`` positions.

    Positions whose ``attention_mask`` is 0 are left out. Stops with the batch that reaches
    ``tokens``, or with the data.

    Raises:
        InputError: the data has no position that counts, or the model does not take it.
    """
    moments = Moments(tuple(pairs))
    features: dict[int, Tensor] = {}
    with ExitStack() as stack, torch.no_grad():
        for sublayer in sublayers:
            module = model.get_submodule(sublayer.inputs[-1])
            handle = module.register_forward_hook(_keep(features, sublayer.layer))
            stack.callback(handle.remove)
        for batch in batches:
            features.clear()
            forward(model, batch)
            moments.update({layer: _counted(x, batch) for layer, x in features.items()})
            if moments.count >= tokens:
                break
    if moments.count < 2:
        raise InputError("the data holds fewer than two positions to take statistics from.")
    return moments


def forward(model: Any, batch: Mapping[str, Array]) -> Any:
    """Return the model's output for a batch, labels left out.

    Raises:
        InputError: the model does not take these arrays.
    """
    inputs = {name: array for name, array in batch.items() if name != "labels"}
    try:
        return model(**to_tensors(inputs, model))
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        shapes = ", ".join(f"{name} {tuple(array.shape)}" for name, array in inputs.items())
        raise InputError(
            f"{type(model).__name__} does not take this data ({shapes}): "
            f"{str(error).splitlines()[0]}"
        ) from error


def _keep(features: dict[int, Tensor], layer: int) -> Any:
    def hook(module: Any, args: Any, out: Tensor) -> None:
        features[layer] = out

    return hook


def _counted(features: Tensor, batch: Mapping[str, Array]) -> Tensor:
    """Return (n, f) features of the positions that are not padding."""
    mask = batch.get("attention_mask")
    if mask is not None and features.shape[:-1] == mask.shape:
        return features[torch.as_tensor(mask, device=features.device).bool()]
    return features.flatten(0, -2)
