"""Closed forms that bring the outputs of a merged group back to what they were, no gradients.

In three steps, each of which can be left out. The mean of aligned neurons, each with the weight it
has for its layer's output, or RegMean (arXiv 2212.09849). A scale and a bias of every layer's
neurons, so that they come nearest to that layer's own (REPAIR, arXiv 2211.08403, gives them their
variance). W_out and every layer's b_out by least squares on the original outputs. A residual of
low rank can be added to each map of each layer.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.linalg import get_lapack_funcs
from torch import Tensor

from ffmerge.errors import InputError
from ffmerge.models import ties
from ffmerge.models.inputs import StopForward, forward, unchunked
from ffmerge.models.probe import Array
from ffmerge.models.sublayer import FeedForward
from ffmerge.models.ties import Key, SharedWeights
from ffmerge.passes.weights.activations import positions
from ffmerge.passes.weights.align import neurons
from ffmerge.passes.weights.moments import Moments
from ffmerge.passes.weights.recorded import Recorded
from ffmerge.passes.weights.settings import Settings

_COLUMNS = 64  # of the right side that are solved for at a time: what bounds the memory
_STRIPE = 512  # columns of a symmetric product that are computed at a time
_TINY = 1e-12  # of the mean variance: a row below it never changes
LowRank = tuple[Tensor, Tensor]  # up and down: their product is added to a weight


@dataclass(frozen=True)
class Fit:
    """A group while it is fitted; r are the rows of one map d -> f, m such maps.

    Shared: ``w_in`` (m, r, d), ``w_out`` (f, d). Of each member: ``scale`` and ``b_in`` (m, r),
    ``b_out`` (d,), ``low_in`` for each map, ``low_out``. All float64.
    """

    w_in: Tensor
    w_out: Tensor
    scale: Sequence[Tensor]
    b_in: Sequence[Tensor]
    b_out: Sequence[Tensor]
    low_in: Sequence[Sequence[LowRank]]
    low_out: Sequence[LowRank | None]


@dataclass(frozen=True)
class Member:
    """What one layer brings, its neurons in the common order; all float64.

    ``w_in`` (m, r, d), ``b_in`` (m, r), ``w_out`` (f, d), ``b_out`` (d,); of what it reads ``mean``
    (d,) and ``covariance`` (d, d); ``importance`` (f,), how far each neuron moves the output.
    """

    w_in: Tensor
    b_in: Tensor
    w_out: Tensor
    b_out: Tensor
    mean: Tensor
    covariance: Tensor
    importance: Tensor


def fit(
    model: Any,
    members: Sequence[FeedForward],
    orders: Sequence[Tensor | None],
    moments: Moments,
    batches: Callable[[], Iterable[Mapping[str, Array]]],
    settings: Settings,
    recorded: Recorded | None = None,
) -> SharedWeights:
    """Return what the group will share and what each member has for itself.

    ``orders`` align the members' neurons. ``batches`` is run once for each of
    ``settings.rounds``, over ``settings.tokens`` positions; in the first not, if what the members
    read is ``recorded``.
    """
    with torch.no_grad():
        found = _drafted(
            [_member(model, m, o, moments) for m, o in zip(members, orders, strict=True)], settings
        )
        for number in range(settings.rounds):
            sharing, forced = _sharing(model, members, found, settings), number == 0
            seen = recorded.side_by_side(members, sharing) if recorded and forced else None
            found = _refitted(
                members, found, settings,
                seen or _side_by_side(model, members, sharing, batches(), settings.tokens, forced),
            )  # fmt: skip
        return _sharing(model, members, found, settings)


def _member(model: Any, member: FeedForward, order: Tensor | None, moments: Moments) -> Member:
    inputs, hidden, layer = moments.inputs, moments.hidden, member.layer
    assert inputs and hidden  # what collect gives has both
    own, maps = neurons(model, member, order), len(member.inputs)
    w_in = torch.stack([_rows(own[i, "weight"], member.d_model) for i in range(maps)])
    biases = [own.get((i, "bias"), w_in.new_zeros(1, w_in.shape[1]).T) for i in range(maps)]
    w_out, b_out = own[maps, "weight"], model.get_submodule(member.output).bias
    spread = (hidden.squares[layer][0] / hidden.count).sqrt()
    return Member(
        w_in,
        torch.stack([_rows(b, 1)[:, 0] for b in biases]),
        w_out,
        w_out.new_zeros(member.d_model) if b_out is None else b_out.detach().to(w_out),
        inputs.mean[layer][0],
        inputs.cross[layer, layer][0].double() / inputs.count,
        (spread if order is None else spread[order.to(spread.device)]) * w_out.norm(dim=1),
    )


def _drafted(members: Sequence[Member], settings: Settings) -> Fit:
    """Return the fit that the moments give, before W_out is regressed."""
    shares = torch.stack(shares_of([m.importance for m in members], settings.importance))
    blocks = members[0].w_in.shape[1] // len(members[0].w_out)
    w_ins = torch.stack([m.w_in for m in members])
    w_outs = torch.stack([m.w_out for m in members])
    w_in = (w_ins * shares.repeat(1, blocks)[:, None, :, None]).sum(0)
    w_out = (w_outs * shares[..., None]).sum(0)
    if settings.regmean:
        w_in = regmean([m.w_in for m in members], [m.covariance for m in members], settings.ridge)
    identity = torch.eye(len(w_out)).to(w_out)
    scales, b_ins, low_ins = [], [], []
    low_outs: list[LowRank | None] = []
    for m in members:
        scale = scale_of(m.w_in, w_in, m.covariance, settings.scale)
        rest = m.w_in - scale[..., None] * w_in
        low = [low_rank(each, m.covariance, settings.rank) for each in rest if settings.rank]
        if low:
            rest -= torch.stack([up @ down for up, down in low])
        scales.append(scale)
        low_ins.append(low)
        b_ins.append(m.b_in + rest @ m.mean)
        low_outs.append(
            low_rank((m.w_out - w_out).T, identity, settings.rank) if settings.rank else None
        )
    b_outs = [m.b_out for m in members]
    if not settings.bias:
        b_ins = [torch.stack([m.b_in for m in members]).mean(0)] * len(members)
        b_outs = [torch.stack(b_outs).mean(0)] * len(members)
    return Fit(w_in, w_out, scales, b_ins, b_outs, low_ins, low_outs)


def shares_of(importance: Sequence[Tensor], power: float) -> list[Tensor]:
    """Return by what each layer's neurons are multiplied in the mean: they sum to 1 for a neuron.

    With power 2 the mean of aligned neurons has the least squared error of the outputs, were
    inputs alike and errors of neurons unrelated. Neurons that do nothing anywhere count alike.
    """
    weights = [each**power for each in importance]
    total = torch.stack(weights).sum(0)
    even = torch.full_like(total, 1 / len(weights))
    return [torch.where(total > 0, each / total, even) for each in weights]


def regmean(weights: Sequence[Tensor], covariances: Sequence[Tensor], ridge: float) -> Tensor:
    """Return the W that minimises the sum over layers of ``|(W - W_l) x_l|^2`` for centred x_l.

    ``weights`` are (..., r, d), ``covariances`` (d, d). Where the inputs say nothing it is the
    mean (arXiv 2212.09849, equation 2, with the ridge towards the mean).
    """
    mean = sum(weights) / len(weights)
    pairs = zip(weights, covariances, strict=True)
    right = sum((w - mean) @ covariance for w, covariance in pairs).flatten(0, -2)
    return mean + ridge_solve(sum(covariances), right.T, ridge).T.view_as(mean)


def scale_of(own: Tensor, merged: Tensor, covariance: Tensor, how: str) -> Tensor:
    """Return by what each row of ``merged`` is multiplied to do the work of the row of ``own``.

    ``repair`` gives the output of the row its old variance, ``regress`` is the factor with the
    smallest error, ``none`` is 1. A row whose output never changes keeps 1.
    """
    theirs = merged @ covariance
    variance = (theirs * merged).sum(-1)
    factor = (theirs * own).sum(-1) / variance
    if how == "repair":
        factor = (((own @ covariance) * own).sum(-1) / variance).sqrt()
    changes = variance > _TINY * variance.mean()
    return torch.where(changes & (how != "none"), factor, 1.0)


def low_rank(rest: Tensor, covariance: Tensor, rank: int) -> LowRank:
    """Return (r, rank) and (rank, d) whose product is nearest to ``rest`` on such inputs.

    The SVD of ``rest`` times a root of the inputs' covariance, cut off (arXiv 2403.07378).
    """
    strength = 1e-6 * float(covariance.diagonal().mean()) or 1.0
    damped = covariance + strength * torch.eye(len(covariance)).to(covariance)
    root = torch.linalg.cholesky(damped)
    u, s, v = torch.linalg.svd(rest @ root, full_matrices=False)
    down = torch.linalg.solve_triangular(root, v[:rank], upper=False, left=False)
    return u[:, :rank] * s[:rank], down


def ridge_solve(gram: Tensor, right: Tensor, ridge: float) -> Tensor:
    """Return X of ``(gram + strength I) X = right``, solved in float64 and finite for any gram.

    Of ``gram`` the lower triangle is read. The strength is ``ridge`` times the mean of the
    diagonal, 1 where that is 0, and never below what rounding can have cost a gram of its type.
    Cholesky in LAPACK's packed form, half a float64 matrix: no more bytes than a gram in float32.
    X has the type of ``right``.

    Raises:
        InputError: the ridge is too small for such statistics.
    """
    gram, n = gram.cpu(), len(gram)
    factorize, solve = get_lapack_funcs(("pftrf", "pftrs"), dtype=np.float64)
    # two triangles make one tall rectangle (Gustavson et al. 2010, figure 3)
    even, left = 1 - n % 2, (n + 1) // 2
    half = np.empty(left * (n + even))
    tall = torch.from_numpy(half).view(left, n + even).T
    tall[even:] = gram[:, :left]
    for row in range(n - left):
        tall[row, row + 1 - even :] = gram[left + row :, left + row]
    relative = max(ridge, n * torch.finfo(gram.dtype).eps)
    strength = relative * float(gram.diagonal().double().mean()) or 1.0
    for offset in (-even, 1 - even):
        tall.diagonal(offset).add_(strength)
    half, failed = factorize(n, half, uplo="L", overwrite_a=True)
    if failed:
        raise InputError(f"ridge {ridge} is too small for the statistics of this data.")
    solution = torch.empty_like(right)
    for given, found in zip(right.split(_COLUMNS, 1), solution.split(_COLUMNS, 1), strict=True):
        columns = given.cpu().numpy().astype(np.float64, order="F")
        found.copy_(torch.from_numpy(solve(n, half, columns, uplo="L", overwrite_b=True)[0]))
    return solution


@dataclass
class Regression:
    """Least squares of one matrix for several layers, each with a bias of its own.

    Minimises the sum over layers of ``|H_l W + b_l - Y_l|^2``. ``gram`` (f, f) and ``cross``
    (f, d) are sums of products of deviations from each layer's own means, in float32, merged as
    in :class:`Moments`; the means are float64. Of the gram, which is symmetric, only the stripes
    below the diagonal are computed: for f = 3072 that is 58 % of it.
    """

    gram: Tensor
    cross: Tensor
    counts: dict[int, int] = field(default_factory=dict)
    hidden: dict[int, Tensor] = field(default_factory=dict)
    target: dict[int, Tensor] = field(default_factory=dict)

    def update(self, layer: int, hidden: Tensor, target: Tensor) -> None:
        """Add a batch of a layer: (n, f) and (n, d)."""
        n, seen = len(hidden), self.counts.get(layer, 0)
        if n == 0:
            return
        h, y = hidden.double().mean(0), target.double().mean(0)
        dh, dy = (hidden - h).float(), (target - y).float()
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


def _refitted(
    members: Sequence[FeedForward],
    found: Fit,
    settings: Settings,
    seen: Iterable[Mapping[int, tuple[Tensor, Tensor]]],
) -> Fit:
    """Return the fit with W_out and b_out that best give the original outputs.

    What is regressed is the error that is left, so nothing cancels where little is left.
    """
    f, d = found.w_out.shape
    zeros = partial(found.w_out.new_zeros, dtype=torch.float32)
    errors = Regression(zeros((f, f)), zeros((f, d)))
    for batch in seen:
        for low, (layer, (hidden, outputs)) in zip(found.low_out, batch.items(), strict=True):
            weight = found.w_out + (low[0] @ low[1]).T if low else found.w_out
            errors.update(layer, hidden, outputs - hidden.float() @ weight.float())
    step = errors.solve(settings.ridge) if settings.least_squares else torch.zeros_like(found.w_out)
    b_out = [errors.bias(m.layer, step) for m in members] if settings.bias else found.b_out
    return replace(found, w_out=found.w_out + step, b_out=b_out)


def _side_by_side(
    model: Any,
    members: Sequence[FeedForward],
    sharing: SharedWeights,
    batches: Iterable[Mapping[str, Array]],
    tokens: int,
    forced: bool,
) -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
    """Yield by layer what the merged W_out is given, (n, f), and what the original put out, (n, d).

    ``forced`` lets every member put out what the original did, so that the next one reads what the
    original read; without it each reads what the merged model really gives.
    """
    count = 0
    original: dict[str, list[Tensor]] = {m.output: [] for m in members}
    given: dict[str, list[Tensor]] = {m.output: [] for m in members}

    once = all(m.runs == 1 for m in members)

    def keep(path: str, _: Any, args: Any, out: Tensor) -> None:
        original[path].append(out)
        if once and all(original.values()):
            raise StopForward

    def swap(path: str, _: Any, args: Any, out: Tensor) -> Tensor | None:
        given[path].append(args[0])
        if once and all(given.values()):
            raise StopForward
        return original[path][len(given[path]) - 1] if forced else None

    for batch in batches:
        for kept in (*original.values(), *given.values()):
            kept.clear()
        with torch.no_grad(), unchunked(model):
            with _hooked(model, members, keep):
                forward(model, batch)
            with ties.tied(model, [members], [sharing]), _hooked(model, members, swap):
                forward(model, batch)
        whole = {m.layer: torch.cat(original[m.output], dim=-2) for m in members}
        counted = positions(model, batch, members[0].reads, whole[members[0].layer].shape[:-1])
        counted = counted.to(whole[members[0].layer].device)
        yield {
            m.layer: (torch.cat(given[m.output], dim=-2)[counted], whole[m.layer][counted])
            for m in members
        }
        count += int(counted.sum())
        if count >= tokens:
            return


@contextmanager
def _hooked(model: Any, members: Sequence[FeedForward], hook: Callable[..., Any]) -> Iterator[None]:
    """Call ``hook(path, module, args, out)`` after each member's map f -> d."""
    with ExitStack() as stack:
        for path in (m.output for m in members):
            handle = model.get_submodule(path).register_forward_hook(partial(hook, path))
            stack.callback(handle.remove)
        yield


def _rows(weight: Tensor, width: int) -> Tensor:
    """Return the rows of a map: (f, blocks * width) to (blocks * f, width)."""
    return torch.cat(weight.split(width, 1))


def _sharing(
    model: Any, members: Sequence[FeedForward], found: Fit, settings: Settings
) -> SharedWeights:
    """Return a fit as parameters, in the layout and type of the model's own."""
    weights = dict(zip(members[0].keys, members[0].weights, strict=True))
    out = len(members[0].inputs)
    w_ins = [w.T if weights[i, "weight"].neurons else w for i, w in enumerate(found.w_in)]
    w_out = found.w_out.T if weights[out, "weight"].neurons else found.w_out
    shared = {(i, "weight"): w for i, w in enumerate([*w_ins, w_out])}
    own: list[dict[Key, Tensor]] = []
    for scale, b_in, b_out, low_in, low_out in zip(
        found.scale, found.b_in, found.b_out, found.low_in, found.low_out, strict=True
    ):
        biases = {(i, "bias"): b for i, b in enumerate([*b_in, b_out])}
        mine = dict(biases) if settings.bias else {}
        if not settings.bias:
            shared |= {key: b for key, b in biases.items() if key in weights}
        if settings.scale != "none":
            mine |= {(i, "scale"): s for i, s in enumerate(scale)}
        for i, (up, down) in enumerate([*low_in, *([low_out] if low_out else [])]):
            mine |= {(i, "up"): up, (i, "down"): down}
        own.append(mine)
    like = model.get_parameter(members[0].weights[0].name)

    def stored(tensors: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
        return {key: tensor.to(like).contiguous() for key, tensor in tensors.items()}

    return SharedWeights(stored(shared), [stored(mine) for mine in own] if any(own) else ())
