"""Closed forms that bring the outputs of a merged group back to what they were, no gradients.

The methods ``calibrated`` and ``residual`` call :func:`fit` with the sublayers of a group and the
orders that align their neurons. In three steps: the mean of aligned neurons, each with the weight
it has for its layer's output; a scale and a bias of every layer's neurons, so that they come
nearest to that layer's own; W_out and every layer's b_out by least squares on the original outputs.
A residual of low rank can be added to each map of each layer. Which parts matter, and which others
were tried, is in docs/quality.md.
"""

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ffmerge.models import ties
from ffmerge.models.inputs import forward, unchunked
from ffmerge.models.sublayer import FeedForward
from ffmerge.models.ties import Key, SharedWeights
from ffmerge.passes.weights.activations import Batches, hooked, positions, stop_when_seen
from ffmerge.passes.weights.align import neurons
from ffmerge.passes.weights.evidence import Evidence
from ffmerge.passes.weights.least_squares import RIDGE, Regression

TOKENS = 16_384  # positions that W_out is solved over
_TINY = 1e-12  # of the mean variance: a row below it never changes
LowRank = tuple[Tensor, Tensor]  # up and down: their product is added to a weight


@dataclass
class Layer:
    """What one layer brings, its neurons in the common order, and what it gets; all float64.

    r are the rows of one map d -> f, m such maps. ``w_in`` (m, r, d), ``b_in`` (m, r), ``w_out``
    (f, d), ``b_out`` (d,); of what it reads ``mean`` (d,) and ``covariance`` (d, d);
    ``importance`` (f,), how far each neuron moves the output. It gets other biases, ``scale``
    (m, r) and the residuals ``low``, of each map d -> f and of the map f -> d.
    """

    w_in: Tensor
    b_in: Tensor
    w_out: Tensor
    b_out: Tensor
    mean: Tensor
    covariance: Tensor
    importance: Tensor
    scale: Tensor = field(default_factory=partial(torch.empty, 0))
    low: list[LowRank] = field(default_factory=list)


def fit(
    model: Any,
    members: Sequence[FeedForward],
    orders: Sequence[Tensor | None],
    evidence: Evidence,
    rank: int,
) -> SharedWeights:
    """Return what the group will share and what each member has for itself.

    ``orders`` align the members' neurons; the ``rank`` of the residuals may be 0. What the members
    read is replayed from the cache if it has it, or else the data is run once more.
    """
    with torch.no_grad():
        layers = []
        for member, order in zip(members, orders, strict=True):
            layers.append(_layer(model, member, order, evidence))
        w_in, w_out = weighted_means(layers)
        for layer in layers:
            _draft_(layer, w_in, w_out, rank)
        weights = _shared_weights(model, members, layers, w_in, w_out)
        seen = None
        if evidence.cache:
            seen = evidence.cache.replay(members, weights)
        if seen is None:
            seen = side_by_side(model, members, weights, evidence.batches(), TOKENS)
        with closing(seen):
            w_out = _refit_(layers, w_out, seen)
        return _shared_weights(model, members, layers, w_in, w_out)


def _layer(model: Any, member: FeedForward, order: Tensor | None, evidence: Evidence) -> Layer:
    own, maps, layer = neurons(model, member, order), len(member.inputs), member.layer
    w_out, b_out = own[maps, "weight"], model.get_submodule(member.output).bias
    w_in, b_in = [], []
    for number in range(maps):
        w_in.append(_rows(own[number, "weight"], member.d_model))
        bias = own.get((number, "bias"), w_out.new_zeros(1, len(w_in[0])).T)
        b_in.append(_rows(bias, 1)[:, 0])
    spread = (evidence.hidden.squares[layer][0] / evidence.hidden.count).sqrt()
    if order is not None:
        spread = spread[order.to(spread.device)]
    return Layer(
        w_in=torch.stack(w_in),
        b_in=torch.stack(b_in),
        w_out=w_out,
        b_out=w_out.new_zeros(member.d_model) if b_out is None else b_out.detach().to(w_out),
        mean=evidence.inputs.mean[layer][0],
        covariance=evidence.inputs.covariance(layer),
        importance=spread * w_out.norm(dim=1),
    )


def weighted_means(layers: Sequence[Layer]) -> tuple[Tensor, Tensor]:
    """Return the mean W_in (m, r, d) and W_out (f, d), each neuron by its importance squared.

    So the mean of aligned neurons has the least squared error of the outputs, were inputs alike
    and errors of neurons unrelated. Neurons that do nothing anywhere count alike.
    """
    squares = torch.stack([layer.importance for layer in layers]) ** 2
    total = squares.sum(0)
    shares = torch.where(total > 0, squares / total, 1 / len(layers))
    blocks = layers[0].w_in.shape[1] // shares.shape[1]
    w_in = torch.stack([layer.w_in for layer in layers])
    w_out = torch.stack([layer.w_out for layer in layers])
    return (
        (w_in * shares.repeat(1, blocks)[:, None, :, None]).sum(0),
        (w_out * shares[..., None]).sum(0),
    )


def _draft_(layer: Layer, w_in: Tensor, w_out: Tensor, rank: int) -> None:
    """Give the layer the scale, bias and residuals with which the means do its work best."""
    layer.scale = scale_of(layer.w_in, w_in, layer.covariance)
    rest = layer.w_in - layer.scale[..., None] * w_in
    if rank:
        layer.low = [low_rank(each, layer.covariance, rank) for each in rest]
        rest -= torch.stack([up @ down for up, down in layer.low])
        identity = torch.eye(len(w_out)).to(w_out)
        layer.low.append(low_rank((layer.w_out - w_out).T, identity, rank))
    layer.b_in = layer.b_in + rest @ layer.mean


def scale_of(own: Tensor, merged: Tensor, covariance: Tensor) -> Tensor:
    """Return by what each row of ``merged`` is multiplied to come nearest to the row of ``own``.

    The factor with the smallest error on inputs of that covariance. A row whose output never
    changes keeps 1.
    """
    theirs = merged @ covariance
    variance = (theirs * merged).sum(-1)
    factor = (theirs * own).sum(-1) / variance
    return torch.where(variance > _TINY * variance.mean(), factor, 1.0)


def low_rank(rest: Tensor, covariance: Tensor, rank: int) -> LowRank:
    """Return (r, rank) and (rank, d) whose product is nearest to ``rest`` on such inputs.

    The SVD of ``rest`` times a root of the inputs' covariance, cut off (arXiv 2403.07378). The
    covariance must be summed in float64: the little that is added to its diagonal makes it
    definite then, on any processor.
    """
    strength = 1e-6 * float(covariance.diagonal().mean()) or 1.0
    damped = covariance + strength * torch.eye(len(covariance)).to(covariance)
    root = torch.linalg.cholesky(damped)
    u, s, v = torch.linalg.svd(rest @ root, full_matrices=False)
    down = torch.linalg.solve_triangular(root, v[:rank], upper=False, left=False)
    return u[:, :rank] * s[:rank], down


def _refit_(
    layers: Sequence[Layer], w_out: Tensor, seen: Iterable[Mapping[int, tuple[Tensor, Tensor]]]
) -> Tensor:
    """Return the W_out that best gives the original outputs, and give each layer its b_out.

    What is regressed is the error that is left, so nothing cancels where little is left.
    """
    f, d = w_out.shape
    zeros = partial(w_out.new_zeros, dtype=torch.float32)
    errors = Regression(zeros((f, f)), zeros((f, d)))
    for batch in seen:
        pairs = zip(layers, batch.values(), strict=True)
        for number, (layer, (hidden, outputs)) in enumerate(pairs):
            weight = w_out
            if layer.low:
                up, down = layer.low[-1]
                weight = w_out + (up @ down).T
            errors.update(number, hidden, outputs - hidden.float() @ weight.float())
    step = errors.solve(RIDGE)
    for number, layer in enumerate(layers):
        layer.b_out = errors.bias(number, step)
    return w_out + step


def side_by_side(
    model: Any,
    members: Sequence[FeedForward],
    weights: SharedWeights,
    batches: Batches,
    tokens: int,
) -> Generator[dict[int, tuple[Tensor, Tensor]], None, None]:
    """Yield by layer what the merged W_out is given, (n, f), and what the original put out, (n, d).

    Each batch is run twice. In the second pass every member puts out what the original did, so
    that the next one reads what the original read.
    """
    count = 0
    original: dict[str, list[Tensor]] = {member.output: [] for member in members}
    given: dict[str, list[Tensor]] = {member.output: [] for member in members}

    def keep(path: str, _: Any, args: Any, out: Tensor) -> None:
        original[path].append(out)
        stop_when_seen(original, members)

    def swap(path: str, _: Any, args: Any, out: Tensor) -> Tensor:
        given[path].append(args[0])
        stop_when_seen(given, members)
        return original[path][len(given[path]) - 1]

    for batch in batches:
        for kept in (*original.values(), *given.values()):
            kept.clear()
        with torch.no_grad(), unchunked(model):
            with hooked(model, original, keep):
                forward(model, batch)
            with ties.tied(model, [members], [weights]), hooked(model, given, swap):
                forward(model, batch)
        outputs = {path: torch.cat(parts, dim=-2) for path, parts in original.items()}
        first = outputs[members[0].output]
        counted = positions(model, batch, members[0].reads, first.shape[:-1]).to(first.device)
        found = {}
        for member in members:
            hidden = torch.cat(given[member.output], dim=-2)
            found[member.layer] = hidden[counted], outputs[member.output][counted]
        yield found
        count += int(counted.sum())
        if count >= tokens:
            return


def _rows(weight: Tensor, width: int) -> Tensor:
    """Return the rows of a map: (f, blocks * width) to (blocks * f, width)."""
    return torch.cat(weight.split(width, 1))


def _shared_weights(
    model: Any,
    members: Sequence[FeedForward],
    layers: Sequence[Layer],
    w_in: Tensor,
    w_out: Tensor,
) -> SharedWeights:
    """Return a fit as parameters, in the layout and type of the model's own."""
    weights = dict(zip(members[0].keys, members[0].weights, strict=True))
    like = model.get_parameter(members[0].weights[0].name)

    def stored(tensors: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
        return {key: tensor.to(like).contiguous() for key, tensor in tensors.items()}

    shared = {}
    for number, weight in enumerate([*w_in, w_out]):  # neurons first
        neurons_axis = weights[number, "weight"].neurons
        shared[number, "weight"] = weight.T if neurons_axis else weight
    own = []
    for layer in layers:
        parts: dict[Key, Tensor] = {}
        for number, bias in enumerate([*layer.b_in, layer.b_out]):
            parts[number, "bias"] = bias
        for number, scale in enumerate(layer.scale):
            parts[number, "scale"] = scale
        for number, (up, down) in enumerate(layer.low):
            parts |= {(number, "up"): up, (number, "down"): down}
        own.append(stored(parts))
    return SharedWeights(stored(shared), own)
