"""Fewer hidden neurons in every sublayer, and W_out solved for anew: closed form, front to back.

The method ``narrow`` calls :func:`fit` with the width of each sublayer, which ``widths.py`` chooses
by :func:`forecast`. Those neurons of a sublayer are taken out whose work the others do best
(``elimination.py``). W_out and its bias solve a ridge regression on what the neurons that stay give
in the *narrowed* model. Its target is what the *original* model puts out there, and what the stream
that it is added to (``stream.py``) is short of in the narrowed model: so each sublayer makes up for
what was lost before it, in attention too (for one sublayer: arXiv 2602.05243). Where that sum is
normalized, an error counts by what it is divided by. All batches are on their way in the original
and narrowed (``abreast.py``); the sums of a sublayer, (f, f) and (f,
d), are held while it is its turn.

Sublayers that share their weights (a unit) are narrowed as one at the turn of the first: the sums
are those of all, of the later ones what is hidden in the original, taken in a pass before. A bias
of its own each gets at its own turn.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy.linalg import cho_factor, cho_solve
from torch import Tensor
from torch.nn.functional import linear

from ffmerge.errors import FfmergeWarning, InputError
from ffmerge.models.sublayer import FeedForward
from ffmerge.models.ties import Key, SharedWeights, Unit
from ffmerge.passes.weights.abreast import Batch, Pass, abreast
from ffmerge.passes.weights.activations import Batches, positions
from ffmerge.passes.weights.elimination import Elimination, Matrix, eliminate
from ffmerge.passes.weights.least_squares import Regression
from ffmerge.passes.weights.stream import streams
from ffmerge.passes.weights.tuning import Function, as_function, tune
from ffmerge.passes.weights.units import units_of
from ffmerge.progress import Progress, silent

TOKENS = 32_768  # positions that W_out is solved over
FORECAST = 8_192  # positions that tell what a width costs
PutsOut = Callable[[Pass], Tensor]
RIDGE = 1e-2  # of each neuron's own sum of squares
_TINY = 1e-6  # of the mean one: so much is added too, for neurons that are never active


@dataclass(frozen=True)
class Problem:
    """The regression of a unit, once all positions of its members are added up; in float64.

    ``damped`` (f, f) are the sums of products of its neurons, ridge included, ``weight`` (f, d) the
    best W_out of all of them; ``mean`` (f,) is what is hidden and ``target`` (d,) what is to be put
    out on average: None for a map without bias, which takes nothing from a mean. ``count`` are the
    positions.
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


@dataclass(frozen=True)
class Turn:
    """The turn of one member: passes of the original and narrowed model that stand at it.

    ``unit`` are all that use its weights; ``normalized`` says that its sum with the stream is.
    """

    model: Any
    unit: Unit
    member: FeedForward
    original: Sequence[Pass]
    narrowed: Sequence[Pass]
    normalized: bool = False


@dataclass(frozen=True)
class Cuts:
    """What is known before a unit's turn, and what was made at it.

    ``ahead`` are the sums of a unit's later members, ``made`` by its id what takes the place of a
    Parameter, so that what is one stays one; of a unit that had its turn ``kept`` are the neurons
    and ``w_out`` (width, d), in float64.
    """

    ahead: dict[Unit, Regression]
    made: dict[int, Tensor] = field(default_factory=dict)
    kept: dict[Unit, Any] = field(default_factory=dict)
    w_out: dict[Unit, Matrix] = field(default_factory=dict)


def fit(
    model: Any,
    members: Sequence[FeedForward],
    widths: Mapping[FeedForward, int],
    batches: Batches,
    progress: Progress = silent,
    steps: int = 0,
) -> SharedWeights:
    """Return the members' own weights at these widths; the model stays as it is.

    With ``steps`` each sublayer is then trained alone (``tuning.py``), before the next is solved.

    Raises:
        InputError: a member cannot be narrowed, or the data does not fit the model.
    """
    units = units_of(model, members)
    by_path, reads = {member.output: member for member in members}, []
    if steps:  # what a sublayer reads is kept for its training only
        reads = [member.inputs[0] for member in members]
    normalized, given = _sums_with_stream(model, members)
    parts: dict[FeedForward, dict[Key, Tensor]] = {}
    cuts = Cuts({})
    if any(len(unit) > 1 for unit in units.values()):
        batches = _look_ahead_(cuts, model, units, batches)
    with abreast(model, by_path, given, reads) as start:
        original = _started(model, members, batches, start, TOKENS)
        narrowed = [start(each.batch) for each in original]
        while True:
            member = by_path[original[0].at.path]
            turn = Turn(model, units[member], member, original, narrowed, member in normalized)
            parts[member], puts_out = _solved(turn, widths[member], steps, cuts)
            progress("narrowing", len(parts), len(members))
            if len(parts) == len(members):
                return SharedWeights({}, [parts[each] for each in members])
            for each in original:
                each.go_on()
            for each in narrowed:
                each.go_on(puts_out(each))


def forecast(
    model: Any, members: Sequence[FeedForward], batches: Batches, progress: Progress = silent
) -> dict[Unit, Matrix]:
    """Return what each width costs each unit: by how many neurons are gone, from none on.

    That is the mean square of what the outputs of its members miss, added up, W_out solved for anew
    and all else as it is.

    Raises:
        InputError: as of :func:`fit`.
    """
    units = units_of(model, members)
    sums: dict[Unit, Regression] = {}
    seen: Counter[Unit] = Counter()
    found: dict[Unit, Matrix] = {}
    with closing(_turns(model, units, batches, FORECAST)) as turns:
        for turn in turns:
            unit = turn.unit
            _add(sums.setdefault(unit, _no_sums(turn)), turn)
            seen[unit] += 1
            if seen[unit] == len(unit):
                problem = _problem(turn, sums.pop(unit))
                found[unit] = problem.eliminated(1).errors / problem.count * len(unit)
            progress("forecasting", seen.total(), len(members))
    return found


def _turns(
    model: Any,
    units: Mapping[FeedForward, Unit],
    batches: Batches,
    tokens: int,
    normalized: Collection[FeedForward] = (),
    given: Iterable[str] = (),
) -> Generator[Turn, None, None]:
    """Yield the turn of each member in the original model, of which nothing is short."""
    by_path = {member.output: member for member in units}
    with abreast(model, by_path, given) as start:
        passes = _started(model, [*units], batches, start, tokens)
        for done in range(1, len(units) + 1):
            member = by_path[passes[0].at.path]
            yield Turn(model, units[member], member, passes, passes, member in normalized)
            if done < len(units):
                for each in passes:
                    each.go_on()


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


def _counted(model: Any, member: FeedForward, at: Pass) -> Tensor:
    """Return which positions count, where a pass stands."""
    counted = positions(model, at.batch, member.reads, at.at.out.shape[:-1])
    return counted.to(at.at.out.device)


def _solved(turn: Turn, width: int, steps: int, cuts: Cuts) -> tuple[dict[Key, Tensor], PutsOut]:
    """Return a member's weights at a width, and what puts out what they do, where a pass stands."""
    unit = turn.unit
    if unit in cuts.kept:
        b_out = _bias_left(turn, cuts.kept[unit], cuts.w_out[unit])
    else:
        sums = cuts.ahead.pop(unit, None) or _no_sums(turn)
        _add(sums, turn)
        problem = _problem(turn, sums)
        cuts.kept[unit] = problem.eliminated(width).kept(width, turn.member.d_ff)
        cuts.w_out[unit], b_out = problem.solved(cuts.kept[unit])
    kept = cuts.kept[unit]
    parts = _cut(turn, cuts, b_out)
    function = None
    if steps:
        function = _function(turn)
    if function is None:
        return parts, lambda each: _put_out(turn.member, parts, kept, each.at.given)
    tuned = tune(function, parts, *_examples(turn), steps)
    return tuned, lambda each: function(tuned, each.at.read).to(each.at.out)


def _function(turn: Turn) -> Function | None:
    """Return the member as a function of its weights, if it is known what lies between them."""
    own = {}
    for key, weight in zip(turn.member.keys, turn.member.weights, strict=True):
        own[key] = turn.model.get_parameter(weight.name).detach()
    at, found = turn.original[0].at, None
    why = "no activation of transformers gives what lies between its maps"
    if len(turn.unit) > 1:
        why = "other layers share its weights"
    elif at.read is not None:
        found = as_function(turn.member, own, at.read, at.given)
    if found is None:
        warnings.warn(
            f"layer {turn.member.layer} of {turn.member.stack!r} is not trained: {why}.",
            FfmergeWarning,
            stacklevel=2,
        )
    return found


def _examples(turn: Turn) -> tuple[Tensor, Tensor, Tensor]:
    """Return at all positions what the member reads, what it should put out, what that counts."""
    read, target, counts = [], [], []
    for one, other in zip(turn.original, turn.narrowed, strict=True):
        assert other.at.read is not None  # else there is no function to train
        counted = _counted(turn.model, turn.member, one)
        read.append(other.at.read[counted].float())
        target.append(other.at.out[counted].float() + _short(one, other)[counted])
        weights = torch.ones(len(read[-1]), device=read[-1].device)
        if turn.normalized:
            weights = _weights(one, counted)
        counts.append(weights)
    return torch.cat(read), torch.cat(target), torch.cat(counts)


def _short(one: Pass, other: Pass) -> Tensor:
    """Return what a narrowed pass is short of where it stands, the stream's part included."""
    short = one.at.out.float() - other.at.out.float()
    if one.at.stream is not None and other.at.stream is not None:
        short += (one.at.stream.float() - other.at.stream.float()).view_as(short)
    return short


def _look_ahead_(
    cuts: Cuts, model: Any, units: Mapping[FeedForward, Unit], batches: Batches
) -> list[Batch]:
    """Add up what the later members of all units have hidden in the original; return the batches.

    Where the sum with the stream is normalized, positions count as they do in :func:`fit`.
    """
    normalized, given = _sums_with_stream(model, [*units])
    batches_seen: list[Batch] = []
    with closing(_turns(model, units, batches, TOKENS, normalized, given)) as turns:
        for turn in turns:
            batches_seen = [each.batch for each in turn.original]
            if turn.member != turn.unit[0]:
                _add(cuts.ahead.setdefault(turn.unit, _no_sums(turn)), turn)
    return batches_seen


def _sums_with_stream(
    model: Any, members: Sequence[FeedForward]
) -> tuple[set[FeedForward], list[str]]:
    """Return whose sum with the stream is normalized, and the modules that are given a stream."""
    known = streams(model, members)
    normalized = {member for member, stream in known.items() if stream.normalized}
    return normalized, [stream.given for stream in known.values()]


def _no_sums(turn: Turn) -> Regression:
    """Return the sums of no positions."""
    zeros = _w_out(turn.model, turn.member)[0].new_zeros
    f, d = turn.member.d_ff, turn.member.d_model
    return Regression(zeros(f, f), zeros(f, d))


def _mean_of(turn: Turn) -> int:
    """Return the number under which a regression keeps the means of the member.

    Members with one bias have one mean.
    """
    bias = turn.model.get_submodule(turn.member.output).bias
    return turn.member.layer if bias is None else id(bias)


def _add(sums: Regression, turn: Turn) -> None:
    """Add up what the narrowed passes have hidden and what they are short of.

    Where the sum with the stream is ``normalized``, a position counts by what it is divided by.
    """
    for one, other in zip(turn.original, turn.narrowed, strict=True):
        counted = _counted(turn.model, turn.member, one)
        hidden = other.at.given[counted].float()
        weights = None
        if turn.normalized:
            weights = _weights(one, counted)
        number = _mean_of(turn)
        sums.update(number, hidden, _short(one, other)[counted], weights)


def _problem(turn: Turn, sums: Regression) -> Problem:
    """Return the regression of all that was added up, with the bias of the member of this turn."""
    model, member = turn.model, turn.member
    weight, bias = _w_out(model, member)
    gram, cross = (_whole(sums.gram), sums.cross.double().cpu().numpy())
    if bias is None:
        for number, count in sums.counts.items():
            mean = sums.hidden[number].cpu().numpy()
            gram += count * np.outer(mean, mean)
            cross += count * np.outer(mean, sums.target[number].cpu().numpy())
    if not (np.isfinite(gram).all() and np.isfinite(cross).all()):
        raise InputError(
            f"layer {member.layer} of {member.stack!r} gives NaN or infinite values on this data."
        )
    diagonal = gram.diagonal()
    gram[np.diag_indices_from(gram)] += RIDGE * diagonal + (_TINY * diagonal.mean() or 1.0)
    old = weight.double().cpu().numpy()
    number = _mean_of(turn)
    put_out, hidden_mean = None, sums.hidden[number].cpu().numpy()
    if bias is not None:
        put_out = sums.target[number].cpu().numpy() + hidden_mean @ old
        put_out += bias.double().cpu().numpy()
    best = old + cho_solve(cho_factor(gram, lower=True), cross)
    return Problem(gram, best, hidden_mean, put_out, sum(sums.counts.values()))


def _bias_left(turn: Turn, kept: Any, w_out: Matrix) -> Matrix | None:
    """Return b_out (d,) of a member whose W_out (width, d) stands: the mean of what is missing."""
    if turn.model.get_submodule(turn.member.output).bias is None:
        return None
    rests, counts = [], []
    for one, other in zip(turn.original, turn.narrowed, strict=True):
        counted = _counted(turn.model, turn.member, one)
        target = other.at.out[counted].float() + _short(one, other)[counted]
        hidden = other.at.given[counted].double().cpu().numpy()
        rests.append(target.double().cpu().numpy() - hidden[:, kept] @ w_out)
        weights = torch.ones(len(target))
        if turn.normalized:
            weights = _weights(one, counted)
        counts.append(weights.double().cpu().numpy())
    left: Matrix = np.average(np.concatenate(rests), 0, np.concatenate(counts))
    return left


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


def _cut(turn: Turn, cuts: Cuts, b_out: Matrix | None) -> dict[Key, Tensor]:
    """Return a member's weights of the neurons that stay, in the layout and type of its own."""
    parts: dict[Key, Tensor] = {}
    w_out, last = cuts.w_out[turn.unit], len(turn.member.inputs)
    order = torch.from_numpy(cuts.kept[turn.unit])
    for key, weight in zip(turn.member.keys, turn.member.weights, strict=True):
        parameter = turn.model.get_parameter(weight.name)
        if id(parameter) not in cuts.made:
            value = parameter.detach()
            if key == (last, "weight"):
                new = torch.from_numpy(w_out if weight.neurons == 0 else w_out.T)
                new = new.to(value).contiguous()
            elif key == (last, "bias"):
                new = torch.from_numpy(b_out).to(value)
            else:
                new = weight.reordered(value, order)
            cuts.made[id(parameter)] = new
        parts[key] = cuts.made[id(parameter)]
    return parts


def _put_out(member: FeedForward, parts: Mapping[Key, Tensor], kept: Any, hidden: Tensor) -> Tensor:
    """Return what the narrowed map f -> d makes of all that is hidden."""
    key = (len(member.inputs), "weight")
    weight = parts[key]
    if member.weights[member.keys.index(key)].neurons == 0:
        weight = weight.T
    order = torch.from_numpy(kept).to(hidden.device)
    return linear(hidden[..., order], weight, parts.get((key[0], "bias")))
