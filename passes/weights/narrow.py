"""Fewer hidden neurons in every sublayer, and W_out solved for anew: closed form, front to back.

The method ``narrow`` calls :func:`fit` with the width of each sublayer, which ``widths.py`` chooses
by :func:`forecast`. Those neurons of a sublayer are taken out whose work the others do best
(``elimination.py``). W_out and its bias solve a ridge regression on what the neurons that stay give
in the *narrowed* model. Its target is what the *original* model puts out there, and what the stream
that it is added to (``stream.py``) is short of in the narrowed model: so each sublayer makes up for
what was lost before it, in attention too (for one sublayer: arXiv 2602.05243). Where that sum is
normalized, an error counts by what it is divided by. All batches are on their way in the original
and narrowed, once for each set of widths (``abreast.py``); the sums of a sublayer, (f, f) and (f,
d), are held while it is its turn.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.linalg import cho_factor, cho_solve
from torch import Tensor
from torch.nn.functional import linear

from ffmerge.errors import InputError
from ffmerge.models import heap, ties
from ffmerge.models.offload import device_of
from ffmerge.models.sublayer import FeedForward
from ffmerge.models.ties import Key, SharedWeights
from ffmerge.passes.weights.abreast import Batch, Pass, abreast
from ffmerge.passes.weights.activations import Batches, positions
from ffmerge.passes.weights.elimination import Elimination, Matrix, eliminate
from ffmerge.passes.weights.least_squares import Regression
from ffmerge.passes.weights.stream import streams
from ffmerge.progress import Progress, silent

TOKENS = 32_768  # positions that W_out is solved over
FORECAST = 8_192  # positions that tell what a width costs
RIDGE = 1e-2  # of each neuron's own sum of squares
_TINY = 1e-6  # of the mean one: so much is added too, for neurons that are never active


@dataclass(frozen=True)
class Problem:
    """A sublayer's regression, once all positions are added up; in float64.

    ``damped`` (f, f) are the sums of products of its neurons, ridge included, ``weight`` (f, d) the
    best W_out of all of them; ``mean`` (f,) is what is hidden and ``target`` (d,) what is to be put
    out on average: None for a map without bias, which takes nothing from a mean. ``count`` are the
    positions, ``energy`` the sum of squares of what is to be put out.
    """

    damped: Matrix
    weight: Matrix
    mean: Matrix
    target: Matrix | None
    count: float

    def eliminated(self, width: int) -> Elimination:
        """Return which neurons go, the first first, down to a width."""
        return eliminate(self.damped, self.weight, width)

    def solved(self, kept: Any) -> tuple[Matrix, Matrix | None]:
        """Return W_out (width, d) and b_out (d,) of the neurons ``kept``."""
        factor = cho_factor(self.damped[np.ix_(kept, kept)], lower=True)
        weight = cho_solve(factor, self.damped[kept] @ self.weight)
        if self.target is None:
            return weight, None
        return weight, self.target - self.mean[kept] @ weight


def fit(
    model: Any,
    members: Sequence[FeedForward],
    plans: Sequence[Mapping[FeedForward, int]],
    batches: Batches,
    progress: Progress = silent,
) -> list[SharedWeights]:
    """Return for each plan the members' own weights at its widths; the model stays as it is.

    Raises:
        InputError: a member cannot be narrowed, or the data does not fit the model.
    """
    _check(model, members)
    by_path, known = {member.output: member for member in members}, streams(model, members)
    normalized = {member for member, stream in known.items() if stream.normalized}
    found: list[dict[FeedForward, dict[Key, Tensor]]] = [{} for _ in plans]
    with abreast(model, by_path, [stream.given for stream in known.values()]) as start:
        original = _started(model, members, batches, start, TOKENS)
        narrowed = [_again(original, start) for _ in plans]
        while True:
            member = by_path[original[0].at.path]
            solved = []
            for plan, parts, passes in zip(plans, found, narrowed, strict=True):
                asked = member, plan[member], original, passes, member in normalized
                parts[member], kept = _solved(model, *asked)
                solved.append((passes, parts[member], kept))
            progress("narrowing", len(found[0]), len(members))
            if len(found[0]) == len(members):
                return [_in_order(members, parts) for parts in found]
            for each in original:
                each.go_on()
            for passes, own, kept in solved:
                _go_on(member, passes, own, kept)


def forecast(
    model: Any, members: Sequence[FeedForward], batches: Batches, progress: Progress = silent
) -> dict[FeedForward, Matrix]:
    """Return what each width costs each member: by how many neurons are gone, from none on.

    That is the mean square of what its output misses, W_out solved for anew and all else as it is.

    Raises:
        InputError: as of :func:`fit`.
    """
    _check(model, members)
    by_path = {member.output: member for member in members}
    found: dict[FeedForward, Matrix] = {}
    with abreast(model, by_path, ()) as start:  # of the original nothing is short
        original = _started(model, members, batches, start, FORECAST)
        while True:
            member = by_path[original[0].at.path]
            problem = _problem(model, member, original, original)
            found[member] = problem.eliminated(1).errors / problem.count
            progress("forecasting", len(found), len(members))
            if len(found) == len(members):
                return found
            for each in original:
                each.go_on()
            heap.trim()


def _check(model: Any, members: Sequence[FeedForward]) -> None:
    """Refuse what is not narrowed: sublayers that run often, that share, that are not all there."""
    maps = {path for member in members for path in member.maps}
    for name in (name for tie in ties.ties(model) for name in tie.members):
        if name.rpartition(".")[0] in maps:
            raise InputError(f"{name} is shared with another layer already: it is not narrowed.")
    for member in members:
        if member.runs > 1:
            raise InputError(
                f"stack {member.stack!r} is shared already: one sublayer is run {member.runs} "
                "times, and only one that runs once is narrowed."
            )
    if device_of(model) != next(model.parameters()).device:
        raise InputError("narrow runs all batches side by side: leave out --offload.")


def _started(
    model: Any,
    members: Sequence[FeedForward],
    batches: Batches,
    start: Callable[[Batch], Pass],
    tokens: int,
) -> list[Pass]:
    """Return passes at their first stop, as many as bring so many positions there, or all."""
    passes: list[Pass] = []
    count = 0
    by_path = {member.output: member for member in members}
    for batch in batches:
        passes.append(start(batch))
        count += int(_counted(model, by_path[passes[-1].at.path], passes[-1]).sum())
        if count >= tokens:
            break
    if count < 2:
        raise InputError("narrow is fitted on data of two positions and more: give --data.")
    return passes


def _again(passes: Sequence[Pass], start: Callable[[Batch], Pass]) -> list[Pass]:
    """Return new passes of the same batches."""
    return [start(each.batch) for each in passes]


def _counted(model: Any, member: FeedForward, at: Pass) -> Tensor:
    """Return which positions count, where a pass stands."""
    counted = positions(model, at.batch, member.reads, at.at.out.shape[:-1])
    return counted.to(at.at.out.device)


def _in_order(
    members: Sequence[FeedForward], parts: Mapping[FeedForward, dict[Key, Tensor]]
) -> SharedWeights:
    """Return the members' own weights, in the order of the members."""
    return SharedWeights({}, [parts[member] for member in members])


def _solved(
    model: Any,
    member: FeedForward,
    width: int,
    original: Sequence[Pass],
    narrowed: Sequence[Pass],
    normalized: bool,
) -> tuple[dict[Key, Tensor], Any]:
    """Return a member's weights at a width, and which of its neurons stay."""
    problem = _problem(model, member, original, narrowed, normalized)
    kept = problem.eliminated(width).kept(width, member.d_ff)
    return _cut(model, member, kept, *problem.solved(kept)), kept


def _problem(
    model: Any,
    member: FeedForward,
    original: Sequence[Pass],
    narrowed: Sequence[Pass],
    normalized: bool = False,
) -> Problem:
    """Add up what the narrowed passes have hidden and what they are short of.

    Where the sum with the stream is ``normalized``, a position counts by what it is divided by.
    """
    weight, bias = _w_out(model, member)
    zeros = weight.new_zeros
    sums = Regression(zeros(member.d_ff, member.d_ff), zeros(member.d_ff, member.d_model))
    for one, other in zip(original, narrowed, strict=True):
        counted = _counted(model, member, one)
        hidden = other.at.given[counted].float()
        short = one.at.out[counted].float() - other.at.out[counted].float()
        if one.at.stream is not None and other.at.stream is not None:
            stream = one.at.stream.float() - other.at.stream.float()
            short += stream.view_as(one.at.out)[counted]
        sums.update(0, hidden, short, _weights(one, counted) if normalized else None)
    gram, cross = (_whole(sums.gram), sums.cross.double().cpu().numpy())
    hidden_mean, missing = sums.hidden[0].cpu().numpy(), sums.target[0].cpu().numpy()
    if bias is None:
        gram += sums.counts[0] * np.outer(hidden_mean, hidden_mean)
        cross += sums.counts[0] * np.outer(hidden_mean, missing)
    if not (np.isfinite(gram).all() and np.isfinite(cross).all()):
        raise InputError(
            f"layer {member.layer} of {member.stack!r} gives NaN or infinite values on this data."
        )
    diagonal = gram.diagonal()
    gram[np.diag_indices_from(gram)] += RIDGE * diagonal + (_TINY * diagonal.mean() or 1.0)
    old = weight.double().cpu().numpy()
    put_out = None
    if bias is not None:
        put_out = missing + bias.double().cpu().numpy() + hidden_mean @ old
    best = old + cho_solve(cho_factor(gram, lower=True), cross)
    return Problem(gram, best, hidden_mean, put_out, sums.counts[0])


def _weights(at: Pass, counted: Tensor) -> Tensor:
    """Return what an error counts at each position whose sum with the stream is normalized."""
    assert at.at.stream is not None
    total = at.at.stream.float().view_as(at.at.out) + at.at.out.float()
    return 1 / total[counted].var(-1).clamp_min(_TINY)


def _whole(lower: Tensor) -> Matrix:
    """Return the symmetric matrix of which the lower triangle is known, in float64."""
    part: Matrix = np.tril(lower.double().cpu().numpy())
    return part + np.tril(part, -1).T


def _w_out(model: Any, member: FeedForward) -> tuple[Tensor, Tensor | None]:
    """Return W_out (f, d) and b_out (d,) as they are, in float32."""
    weight = member.weights[member.keys.index((len(member.inputs), "weight"))]
    value = model.get_parameter(weight.name).detach().float()
    bias = model.get_submodule(member.output).bias
    return (
        value if weight.neurons == 0 else value.T,
        None if bias is None else bias.detach().float(),
    )


def _cut(
    model: Any, member: FeedForward, kept: Any, w_out: Matrix, b_out: Matrix | None
) -> dict[Key, Tensor]:
    """Return a member's weights of the neurons ``kept``, in the layout and type of its own."""
    parts: dict[Key, Tensor] = {}
    order, last = torch.from_numpy(kept), len(member.inputs)
    for key, weight in zip(member.keys, member.weights, strict=True):
        value = model.get_parameter(weight.name).detach()
        if key == (last, "weight"):
            new = torch.from_numpy(w_out if weight.neurons == 0 else w_out.T)
            parts[key] = new.to(value).contiguous()
        elif key == (last, "bias"):
            parts[key] = torch.from_numpy(b_out).to(value)
        else:
            parts[key] = weight.reordered(value, order)
    return parts


def _go_on(
    member: FeedForward, passes: Sequence[Pass], parts: Mapping[Key, Tensor], kept: Any
) -> None:
    """Have narrowed passes go on with what the narrowed member puts out."""
    for each in passes:
        each.go_on(_put_out(member, parts, kept, each.at.given))
    heap.trim()


def _put_out(member: FeedForward, parts: Mapping[Key, Tensor], kept: Any, hidden: Tensor) -> Tensor:
    """Return what the narrowed map f -> d makes of all that is hidden."""
    key = (len(member.inputs), "weight")
    weight = parts[key]
    if member.weights[member.keys.index(key)].neurons == 0:
        weight = weight.T
    order = torch.from_numpy(kept).to(hidden.device)
    return linear(hidden[..., order], weight, parts.get((key[0], "bias")))
