"""What to merge: every candidate is merged, put in place and measured, and the best is kept.

The model keeps its own weights until the end: a group that grows is made anew of its members'
originals. A candidate runs only what comes after its first merged layer (``resume.py``). Several
processes (torchrun, ``accelerate launch``) share the candidates of a step, and before that the
batches of the statistics.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, pairwise
from typing import Any

from accelerate.utils import gather_object
from torch import nn

from ffmerge.errors import InputError
from ffmerge.files import size_text
from ffmerge.models import ties
from ffmerge.models.offload import device_of
from ffmerge.models.record import Group
from ffmerge.models.sublayer import FeedForward
from ffmerge.models.ties import SharedWeights
from ffmerge.passes.weights import activations, cost, precision, processes
from ffmerge.passes.weights.evaluate import Score
from ffmerge.passes.weights.methods import Evidence, Method
from ffmerge.passes.weights.recorded import Recorded
from ffmerge.passes.weights.resume import Resumed

# The sublayers that one candidate would tie, group by group.
Choice = tuple[tuple[FeedForward, ...], ...]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class State:
    """Groups of a model and what takes the place of their weights."""

    groups: Choice = ()
    shared: tuple[SharedWeights, ...] = ()


@dataclass(frozen=True)
class Candidate:
    """Groups that were tried; metric and bytes of the merged, untuned model."""

    groups: tuple[Group, ...]
    value: float
    bytes: int


@dataclass(frozen=True)
class Point:
    """A model on the size/quality frontier; ``dtype`` is that of its package, None: not rounded."""

    groups: tuple[Group, ...]
    value: float
    bytes: int
    dtype: str | None = None


@dataclass(frozen=True)
class Trials:
    """What every candidate is tried with, and in ``tried`` what came of it.

    ``batches`` gives the data for the statistics, whose costs it is told, ``tokens`` positions of
    it; None: there is none. Candidates whose statistics are more than ``memory`` bytes are tried in
    parts, each with a pass of its own. ``resumed`` runs the model behind what a candidate leaves as
    it is; ``recorded`` is what the sublayers read and put out, for methods that fit.
    """

    model: Any
    resumed: Resumed
    method: Method
    evidence: dict[str, Evidence]
    score: Score | None
    batches: Callable[[str], Any] | None
    tokens: int
    progress: Progress
    memory: float = cost.PAIRS
    recorded: Recorded | None = None
    tried: list[Candidate] = field(default_factory=list)

    def learn(self, choices: Sequence[Choice]) -> None:
        """Collect in one pass over the data what is not known yet, forget what is not needed."""
        if self.batches is None or not self.method.needs_data:
            return
        new = {}
        if self.recorded:
            self.recorded.begin([m for c in choices for members in c for m in members])
        for name, evidence in self.evidence.items():
            groups = [members for c in choices for members in c if members[0].stack == name]
            if not groups:
                continue
            pairs = [pair for members in groups for pair in evidence.settings.pairs(members)]
            wanted = {(a.layer, b.layer): (a, b) for a, b in pairs}
            known = evidence.moments.cross if evidence.moments else {}
            for pair in known.keys() - wanted.keys():
                del known[pair]
            if missing := [wanted[pair] for pair in wanted.keys() - known.keys()]:
                new[name] = missing
        if not new:
            return
        after = next(iter(self.evidence.values())).settings.after
        every = [pair for pairs in new.values() for pair in pairs]
        told = cost.cost_of(every).text(self.tokens, device_of(self.model))
        keep = self.recorded if processes.rank_and_world_size()[1] == 1 else None
        with self.resumed.behind(sublayer for pair in every for sublayer in pair):
            data = self.batches(told)
            found = activations.collect(self.model, new, data, self.tokens, after, keep)
            if self.recorded and not keep:  # a process has seen its share, and fits to all
                self.recorded.fill(new, self.batches("recorded"))
        for name, moments in found.items():
            if before := self.evidence[name].moments:
                moments = before.joined(moments)
            self.evidence[name] = replace(self.evidence[name], moments=moments)

    def attempt(self, choice: Choice, rest: State = State()) -> tuple[Candidate, State]:
        """Return a candidate and its state: ``choice`` merged while ``rest`` is in place."""
        changed = [sublayer for members in choice for sublayer in members]
        with ties.tied(self.model, rest.groups, rest.shared), self.resumed.behind(changed):
            recorded = None if rest.groups else self.recorded
            shared = [
                self.method.merge(
                    self.model, members, replace(self.evidence[members[0].stack], recorded=recorded)
                )
                for members in choice
            ]
            with ties.tied(self.model, choice, shared):
                value = self.score.measure(self.model) if self.score else 0.0
                size = size_of(self.model)[1]
        state = State((*rest.groups, *choice), (*rest.shared, *shared))
        return Candidate(groups_of(state.groups), value, size), state

    def best(
        self,
        options: Sequence[tuple[Choice, State]],
        rank: Callable[[Candidate], float],
        step: str = "windows",
    ) -> tuple[Candidate, State]:
        """Try all, every process its share; return the highest in rank, the earliest of equals.

        All processes return the same: who has not tried the winner merges it again.
        """
        first, every = 0, 1
        if len(options) > 1:
            joined = processes.join()
            first, every = joined.process_index, joined.num_processes
        mine: dict[int, Candidate] = {}
        kept: dict[int, State] = {}
        parts = self._parts([choice for choice, _ in options])
        for part in parts:
            self.learn([options[number][0] for number in part])
            for number in (n for n in part if n % every == first):
                mine[number], state = self.attempt(*options[number])
                if not kept or rank(mine[number]) > rank(mine[next(iter(kept))]):
                    kept = {number: state}
                self.progress(step, number + 1, len(options))
        found = dict(sorted(gather_object([*mine.items()]) if every > 1 else mine.items()))
        self.tried.extend(found.values() if self.score else ())
        winner = max(found, key=lambda number: rank(found[number]))
        if every > 1 and winner not in parts[-1]:
            self.learn([options[winner][0]])
        return found[winner], kept.get(winner) or self.attempt(*options[winner])[1]

    def _parts(self, choices: Sequence[Choice]) -> list[list[int]]:
        """Return the choices, by number, in parts whose statistics fit the memory, if one does."""
        parts: list[list[int]] = [[]]
        pairs: list[tuple[FeedForward, FeedForward]] = []
        for number, choice in enumerate(choices):
            settings = self.evidence[choice[0][0].stack].settings
            own = [pair for members in choice for pair in settings.pairs(members)]
            if parts[-1] and cost.cost_of([*pairs, *own]).bytes > self.memory:
                parts.append([])
                pairs = []
            parts[-1].append(number)
            pairs += own
        return parts

    def rank(self, value: float) -> float:
        """Return a measure so that higher is better; what is not a number is worst."""
        ranked = self.score.rank(value) if self.score else 0.0
        return -math.inf if math.isnan(ranked) else ranked


def shrink(
    trials: Trials,
    units: Sequence[tuple[FeedForward, ...]],
    now: Candidate,
    limit: int,
    adjacent: bool,
    auto: bool,
) -> tuple[State, Point, tuple[Point, ...]]:
    """Join units step by step until the model has ``limit`` bytes; return state, point, frontier.

    ``now`` is the model as it is. A step joins the two units, groups or single layers of one form,
    that cost least in quality for each byte they save; ``adjacent``: only neighbours in their
    stack. With ``auto`` every step is measured in each precision of a package too; the best that
    fits wins, and the search ends when further joins could only be worse: neither joining nor
    rounding is expected to improve a model.

    Raises:
        InputError: the limit is out of reach, or nothing need be merged for it.
    """
    if not auto:
        if now.bytes <= limit:
            raise InputError(f"the model has {size_text(now.bytes)}: it is within that budget.")
        least = now.bytes - _removable(trials.model, units, adjacent)
        if least > limit:
            raise _out_of_reach(limit, least)
    states, frontier = [State()], list[tuple[int, Point]]()
    while True:
        state = states[-1]
        points = _points(trials, state, now) if auto else [Point(**vars(now))]
        frontier += [(len(states) - 1, point) for point in points]
        fitting = [at for at in frontier if at[1].bytes <= limit]
        found = max(fitting, key=lambda at: trials.rank(at[1].value), default=None)
        if found and trials.rank(found[1].value) >= trials.rank(now.value):
            break
        options = [
            ((joined,), _without(state, joined)) for joined in _joins(units, adjacent)
        ]  # what grows is merged from its own weights, all other groups in place
        if not options:
            break

        def worth(candidate: Candidate, now: Candidate = now) -> float:
            saved = now.bytes - candidate.bytes
            lost = trials.rank(now.value) - trials.rank(candidate.value)
            return -lost / saved if saved > 0 else -math.inf

        now, state = trials.best(options, worth, f"joining: {size_text(now.bytes)}")
        units = _joined(units, state.groups[-1])
        states.append(state)
    if not found:
        raise _out_of_reach(limit, min(point.bytes for _, point in frontier))
    return states[found[0]], found[1], tuple(point for _, point in frontier)


def size_of(model: nn.Module) -> tuple[int, int]:
    """Return parameters and bytes of ``model``, every shared parameter counted once."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters), sum(p.nbytes for p in parameters)


def form(sublayer: FeedForward) -> tuple[Any, ...]:
    """Return what must be equal in sublayers that are to share weights."""
    weights = [(w.neurons, w.blocks) for w in sublayer.weights]
    return (sublayer.d_model, sublayer.d_ff, *weights)


def groups_of(choice: Choice) -> tuple[Group, ...]:
    """Return a choice as data."""
    return tuple(Group(m[0].stack, tuple(s.layer for s in m)) for m in choice)


def _points(trials: Trials, state: State, now: Candidate) -> list[Point]:
    """Return a state in each precision of a package: fp32 as measured, the others rounded."""
    points = []
    with ties.tied(trials.model, state.groups, state.shared):
        for dtype in precision.DTYPES:
            size, value = precision.bytes_of(trials.model, dtype), now.value
            if dtype != "fp32" and trials.score:
                with precision.rounded(trials.model, dtype):
                    value = trials.score.measure(trials.model)
            points.append(Point(now.groups, value, size, dtype))
    return points


def _joins(units: Sequence[tuple[FeedForward, ...]], adjacent: bool) -> list[tuple[Any, ...]]:
    """Return what could be joined next, members in layer order."""
    pairs = pairwise(units) if adjacent else combinations(units, 2)
    return [
        tuple(sorted(a + b, key=lambda s: s.layer))
        for a, b in pairs
        if a[0].stack == b[0].stack and form(a[0]) == form(b[0])
    ]


def _joined(
    units: Sequence[tuple[FeedForward, ...]], group: tuple[FeedForward, ...]
) -> list[tuple[FeedForward, ...]]:
    """Return the units with ``group`` in the place of the first of those it is made of."""
    return [
        group if unit[0] is group[0] else unit
        for unit in units
        if unit[0] is group[0] or unit[0] not in group
    ]


def _without(state: State, joined: tuple[FeedForward, ...]) -> State:
    """Return the state without the groups that ``joined`` is made of."""
    kept = [
        (group, shared)
        for group, shared in zip(state.groups, state.shared, strict=True)
        if group[0] not in joined
    ]
    return State(tuple(group for group, _ in kept), tuple(shared for _, shared in kept))


def _removable(model: nn.Module, units: Sequence[tuple[FeedForward, ...]], adjacent: bool) -> int:
    """Return the bytes of all members but one of every group, with all joined that can be."""
    while joins := _joins(units, adjacent):
        units = _joined(units, joins[0])
    others = [member for _, *others in units for member in others]
    return sum(model.get_parameter(w.name).nbytes for member in others for w in member.weights)


def _out_of_reach(limit: int, least: int) -> InputError:
    return InputError(
        f"a budget of {size_text(limit)} is out of reach: with all layers joined that can be, the "
        f"smallest size is {size_text(least)} ({least:,} bytes)."
    )
