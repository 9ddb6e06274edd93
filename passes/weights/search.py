"""What to merge: every candidate is merged, put in place and measured, and the best is kept.

``merge_`` hands over the choices of a search (``windows.py``) or a budget. For each candidate the
statistics are there already (``evidence.py``), the method makes the weights (``methods.py``), and
the score is taken of the model in which they stand (``evaluate.py``). The model keeps its own
weights: a group that grows is made anew of its members' originals. Several processes (torchrun,
``accelerate launch``) share the candidates of a step, and before that the batches of the
statistics.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from accelerate.utils import gather_object
from torch import nn

from ffmerge.errors import InputError
from ffmerge.files import size_text
from ffmerge.models.record import Group, Narrowed
from ffmerge.models.ties import SharedWeights, Unit
from ffmerge.passes.weights import narrow, precision, widths
from ffmerge.passes.weights.cache import ActivationCache
from ffmerge.passes.weights.elimination import Matrix
from ffmerge.passes.weights.evaluate import Score
from ffmerge.passes.weights.evidence import Statistics
from ffmerge.passes.weights.methods import (
    Merged,
    Method,
    groups_of,
    in_place,
    narrowed_of,
    size_of,
)
from ffmerge.passes.weights.processes import join
from ffmerge.passes.weights.windows import Choice, Members, shape_key
from ffmerge.progress import Progress

Option = tuple[Choice, Merged]  # what to merge, while what stands in the model


@dataclass(frozen=True)
class Candidate:
    """Groups that were tried, or widths; metric and bytes of the merged, untuned model.

    On the frontier of a budget ``dtype`` is the precision of a package; None: not rounded.
    """

    groups: tuple[Group, ...]
    value: float
    bytes: int
    dtype: str | None = None
    narrowed: tuple[Narrowed, ...] = ()


@dataclass
class Trials:
    """Tries candidates on one model; in ``tried`` is what came of them.

    Without a ``score`` all are equally good. There is a ``cache`` only where nothing else stands in
    the model while a candidate is tried: it holds what the original computes.
    """

    model: Any
    method: Method
    statistics: Statistics
    score: Score | None
    progress: Progress
    cache: ActivationCache | None = None
    tune: int = 0  # steps for each sublayer that is narrowed, once widths are chosen
    costs: dict[Unit, Matrix] | None = None  # of widths, as :func:`widths.chosen` takes them

    def __post_init__(self) -> None:
        """Begin with nothing tried."""
        self.tried: list[Candidate] = []

    def attempt(self, choice: Choice, standing: Merged) -> tuple[Candidate, Merged]:
        """Return a candidate and all its groups: ``choice`` merged while ``standing`` is there."""
        merged = dict(standing)
        with in_place(self.model, standing):
            made: Merged = {}
            for members in choice:
                evidence = self.statistics.evidence(members[0].stack, self.cache)
                made[members] = self.method.merge(self.model, members, evidence)
            merged |= made
            with in_place(self.model, made):
                candidate = self.measured(merged)
        return candidate, merged

    def measured(self, merged: Merged) -> Candidate:
        """Return the model as it is, in which ``merged`` stands, as a candidate."""
        value = 0.0
        if self.score:
            value = self.score.measure(self.model)
        size = size_of(self.model, merged)[1]
        return Candidate(groups_of(merged), value, size, narrowed=narrowed_of(merged))

    def best(
        self, options: Sequence[Option], worth: Callable[[Candidate], float], step: str = "windows"
    ) -> tuple[Candidate, Merged]:
        """Try all, every process its share; return what is worth most, the earliest of equals.

        All processes return the same: who has not tried the winner merges it again.
        """
        first, every = 0, 1
        if len(options) > 1:
            state = join()
            first, every = state.process_index, state.num_processes
        mine: dict[int, Candidate] = {}
        kept: dict[int, Merged] = {}
        parts = self.statistics.parts([choice for choice, _ in options])
        for part in parts:
            self.learn([options[number][0] for number in part])
            for number in part:
                if number % every != first:
                    continue
                mine[number], merged = self.attempt(*options[number])
                if not kept or worth(mine[number]) > worth(mine[next(iter(kept))]):
                    kept = {number: merged}
                self.progress(step, number + 1, len(options))
        found = mine
        if every > 1:
            found = dict(sorted(gather_object([*mine.items()])))
        if self.score:
            self.tried.extend(found.values())
        winner = max(found, key=lambda number: worth(found[number]))
        if every > 1 and winner not in parts[-1]:
            self.learn([options[winner][0]])
        return found[winner], kept.get(winner) or self.attempt(*options[winner])[1]

    def learn(self, choices: Sequence[Choice]) -> None:
        """Have the statistics of these choices, if the method reads any."""
        if self.method.statistics and self.statistics.data:
            self.statistics.learn(choices)

    def rank(self, value: float) -> float:
        """Return a measure so that higher is better; what is not a number is worst."""
        if math.isnan(value):
            return -math.inf
        if self.score is None:
            return 0.0
        return self.score.rank(value)

    def rounded(self, now: Candidate, merged: Merged) -> list[Candidate]:
        """Return a candidate in each precision of a package: fp32 as measured, others rounded."""
        points = []
        with in_place(self.model, merged):
            for dtype in precision.DTYPES:
                size, value = precision.bytes_of(self.model, dtype), now.value
                if dtype != "fp32" and self.score:
                    with precision.rounded(self.model, dtype):
                        value = self.score.measure(self.model)
                points.append(Candidate(now.groups, value, size, dtype))
        return points


def search_budget(
    trials: Trials, units: Sequence[Members], now: Candidate, limit: int, auto: bool
) -> tuple[Merged, Candidate, tuple[Candidate, ...]]:
    """Join units until the model has ``limit`` bytes; return groups, candidate and frontier.

    ``units`` are groups or single layers, ``now`` is the model as it is. A step joins the two
    neighbours of one shape that cost least in quality for each byte they save. With ``auto`` every
    step is measured in each precision of a package too; the best that fits wins, and the search
    ends when further joins could only be worse: neither joining nor rounding is expected to improve
    a model.

    Raises:
        InputError: the limit is out of reach, or nothing need be merged for it.
    """
    if not auto:
        _check_reach(trials.model, units, now, limit)
    states: list[Merged] = [{}]
    frontier: list[tuple[int, Candidate]] = []
    while True:
        merged = states[-1]
        points = [now]
        if auto:
            points = trials.rounded(now, merged)
        frontier += [(len(states) - 1, point) for point in points]
        fitting = [at for at in frontier if at[1].bytes <= limit]
        found = max(fitting, key=lambda at: trials.rank(at[1].value), default=None)
        if found and trials.rank(found[1].value) >= trials.rank(now.value):
            break
        joins = _joins(units)
        if not joins:
            break
        now, merged = _cheapest_join(trials, joins, now, merged)
        units = _joined(units, [*merged][-1])
        states.append(merged)
    if not found:
        raise _out_of_reach(limit, min(point.bytes for _, point in frontier))
    return states[found[0]], found[1], tuple(point for _, point in frontier)


def search_widths(
    trials: Trials, members: Members, now: Candidate, limit: int
) -> tuple[Merged, Candidate, tuple[Candidate, ...]]:
    """Take neurons until the model has ``limit`` bytes; return as :func:`search_budget`.

    Measured are the widths that are forecast to cost least, and once more where they are tuned.

    Raises:
        InputError: the limit is out of reach, or nothing need be narrowed for it.
    """
    if now.bytes <= limit:
        raise _within(now.bytes)
    model, data = trials.model, trials.statistics
    size = model.get_parameter(members[0].weights[0].name).element_size()
    remove = -(-(now.bytes - limit) // size)
    least = now.bytes - size * widths.most(model, members)
    if least > limit:
        raise _out_of_reach(limit, least, "with as few neurons as can be")
    chosen = widths.chosen(model, members, remove, data.batches, trials.progress, trials.costs)
    tried: list[tuple[Candidate, Merged]] = []
    for steps in dict.fromkeys((0, trials.tune)):
        change = narrow.fit(model, members, chosen, data.batches(), trials.progress, steps)
        tried.append(_narrowed(trials, members, change))
    best, merged = max(tried, key=lambda each: trials.rank(each[0].value))
    candidates = [candidate for candidate, _ in tried]
    trials.tried += candidates
    return merged, best, (now, *candidates)


def _narrowed(trials: Trials, members: Members, change: SharedWeights) -> tuple[Candidate, Merged]:
    """Return what narrowed members are as a candidate."""
    merged: Merged = {members: change}
    with in_place(trials.model, merged):
        return trials.measured(merged), merged


def _cheapest_join(
    trials: Trials, joins: Sequence[Members], now: Candidate, merged: Merged
) -> tuple[Candidate, Merged]:
    """Try all joins; return the one that costs least for each byte it saves."""

    def worth(candidate: Candidate) -> float:
        saved = now.bytes - candidate.bytes
        lost = trials.rank(now.value) - trials.rank(candidate.value)
        return -lost / saved if saved > 0 else -math.inf

    options: list[Option] = []
    for joined in joins:  # what grows is merged from its own weights, all other groups in place
        others = {group: each for group, each in merged.items() if group[0] not in joined}
        options.append(((joined,), others))
    return trials.best(options, worth, f"joining: {size_text(now.bytes)}")


def _joins(units: Sequence[Members]) -> list[Members]:
    """Return what could be joined next: neighbours of one shape in one stack."""
    return [
        a + b
        for a, b in pairwise(units)
        if a[0].stack == b[0].stack and shape_key(a[0]) == shape_key(b[0])
    ]


def _joined(units: Sequence[Members], group: Members) -> list[Members]:
    """Return the units with ``group`` in the place of the first of those it is made of."""
    left = []
    for unit in units:
        if unit[0] is group[0]:
            left.append(group)
        elif unit[0] not in group:
            left.append(unit)
    return left


def _check_reach(model: nn.Module, units: Sequence[Members], now: Candidate, limit: int) -> None:
    """Refuse a limit that needs no join, or that all joins together do not reach."""
    if now.bytes <= limit:
        raise _within(now.bytes)
    while joins := _joins(units):
        units = _joined(units, joins[0])
    least = now.bytes
    for _, *others in units:
        for weight in (weight for member in others for weight in member.weights):
            least -= model.get_parameter(weight.name).nbytes
    if least > limit:
        raise _out_of_reach(limit, least)


def _within(size: int) -> InputError:
    return InputError(f"the model has {size_text(size)}: it is within that budget.")


def _out_of_reach(
    limit: int, least: int, how: str = "with all layers joined that can be"
) -> InputError:
    return InputError(
        f"a budget of {size_text(limit)} is out of reach: {how}, the "
        f"smallest size is {size_text(least)} ({least:,} bytes)."
    )
