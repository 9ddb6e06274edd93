"""Merge feed-forward sublayers of one or several stacks, so that they share their weights.

:func:`merge_` finds the stacks and what may be tied (``windows.py``), takes statistics of the data
(``evidence.py``), lets the search try candidates (``search.py``), which calls a method for each
(``methods.py``), and ties the best in the model (``models/ties.py``). :func:`choose` is all of that
but the tie: the model stays as it is, and other methods can be compared with.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ffmerge.config import MergeConfig, parse_budget
from ffmerge.errors import InputError
from ffmerge.files import plain, size_text
from ffmerge.models import narrowed, tasks, ties
from ffmerge.models.data import Data, examples_for
from ffmerge.models.examples import Examples, with_held_out
from ffmerge.models.finite import check_merged, check_weights
from ffmerge.models.notebook import html_of
from ffmerge.models.record import MergeRecord, merge_record
from ffmerge.models.sublayer import FeedForward
from ffmerge.models.ties import SharedWeights, Unit
from ffmerge.passes.weights import methods, rivals
from ffmerge.passes.weights.cache import ActivationCache
from ffmerge.passes.weights.calibrated import TOKENS
from ffmerge.passes.weights.elimination import Matrix
from ffmerge.passes.weights.evaluate import Score, score_for, warn_near_chance
from ffmerge.passes.weights.evidence import Statistics
from ffmerge.passes.weights.methods import (
    METHODS,
    Merged,
    Method,
    groups_of,
    in_place,
    narrowed_of,
    size_of,
)
from ffmerge.passes.weights.search import Candidate, Trials, search_budget, search_widths
from ffmerge.passes.weights.windows import NARROW, Choice, Stacks, find_stacks, windows
from ffmerge.progress import Progress, silent

__all__ = ["Merge", "choose", "merge_", "rivals"]  # rivals are registered by being imported


@dataclass(frozen=True, repr=False)
class Merge:
    """What was done, all that was tried, and of a budget the size and quality after each step."""

    record: MergeRecord
    candidates: tuple[Candidate, ...]
    frontier: tuple[Candidate, ...] = ()

    def __repr__(self) -> str:
        return f"<Merge: {self.record!r}, {len(self.candidates)} tried>"

    def _repr_html_(self) -> str:
        record, metric = self.record, self.record.metric
        rows = [
            ("parameters", f"{record.parameters_before:,}", f"{record.parameters_after:,}"),
            ("bytes", size_text(record.bytes_before), size_text(record.bytes_after)),
        ]
        if metric["name"]:
            rows.append((metric["name"], f"{metric['before']:.4f}", f"{metric['merged']:.4f}"))
        return html_of([(repr(record), ("", "before", "after"), rows)])

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        tried = plain({"candidates": self.candidates, "frontier": self.frontier})
        for candidate in tried["candidates"]:
            del candidate["dtype"]  # of the frontier only
        for candidate in (*tried["candidates"], *tried["frontier"]):
            if not candidate["narrowed"]:
                del candidate["narrowed"]
        return {**self.record.to_json(), **tried}


def merge_(
    model: Any,
    data: Data | None,
    config: MergeConfig,
    validation: Data | None = None,
    progress: Progress = silent,
) -> Merge:
    """Make k sublayers of ``model`` share one set of weights, in place.

    ``data`` gives the statistics and ``validation`` the metric that chooses the window; without
    ``validation`` the rows of ``data`` at even places do the one and those at odd places the
    other. ``data`` may be None for a method that needs none and a window that is given.

    Raises:
        InputError: the window does not fit the model, or the data does not.
    """
    methods.get(config.method)
    calibration, held_out = with_held_out(
        examples_for(model, data, config.task), examples_for(model, validation, config.task)
    )
    merge, merged = choose(model, calibration, held_out, config, progress)
    apply_(model, merge, merged)
    return merge


def apply_(model: Any, merge: Merge, merged: Merged) -> None:
    """Put what was chosen in its place in the model, and its record into the configuration."""
    for members, weights in merged.items():
        assert isinstance(weights, SharedWeights)  # the method's result can be saved
        ties.tie_(model, [members], [weights])
    if merge.record.narrowed and not merge.record.groups:
        narrowed.settle_config_(model)
    if merged:
        model.config.ffmerge = merge.record.to_json()


def choose(
    model: Any,
    calibration: Examples | None,
    held_out: Examples | None,
    config: MergeConfig,
    progress: Progress = silent,
    costs: dict[Unit, Matrix] | None = None,
) -> tuple[Merge, Merged]:
    """Return what :func:`merge_` would do, and what would take the place of which weights.

    ``held_out`` measures; without it nothing is, and there must be one window. ``costs`` are what
    widths cost, kept from one narrowing of a model by the same data to the next: empty at first.

    Raises:
        InputError: as :func:`merge_`.
    """
    check_weights(model)
    method, stacks = METHODS[config.method], find_stacks(model, config)
    _check_fits(method, config)
    searches = _searches(model, stacks, method, config)
    if calibration is None:
        _check_needs_no_data(method, searches)
    score = _score(model, held_out, config)
    statistics = Statistics(model, calibration, _watched(method, stacks), config, progress)
    trials = Trials(model, method, statistics, score, progress, tune=config.tune, costs=costs)
    before = trials.measured({})
    if score and held_out is not None:
        warn_near_chance(model, score.name, before.value, len(held_out))
    frontier: tuple[Candidate, ...] = ()
    chosen: dict[str, Any] = {}
    if config.budget:
        limit = parse_budget(config.budget, before.bytes)
        members = [member for layers in stacks.values() for member in layers]
        merged, now, frontier, chosen = _search_size(trials, members, before, limit, config)
    else:
        now, merged = _search_windows(trials, searches)
    check_merged(method.name, _tensors_of(merged))
    metric = _metric(score, before, now) | {**chosen, "examples": len(held_out or ())}
    record = _record(model, method, merged, metric)
    return Merge(record, tuple(trials.tried), frontier), merged


def _score(model: Any, held_out: Examples | None, config: MergeConfig) -> Score | None:
    """Return what candidates are measured by, None without data."""
    if held_out is not None:
        task = tasks.task_of(model, config.task)
        return score_for(model, task, held_out, config.batch_size, config.criterion)
    if config.budget:
        raise InputError("a budget is met by measuring what is lost: it needs data.")
    return None


def _metric(score: Score | None, before: Candidate, now: Candidate) -> dict[str, Any]:
    """Return what the record says of the metric, None of what was not measured."""
    if score is None:
        return {"before": None, "merged": None, "recovered": None, "name": None}
    return {"before": before.value, "merged": now.value, "recovered": None, "name": score.name}


def _tensors_of(merged: Merged) -> Iterator[Mapping[Any, Tensor]]:
    """Yield what was made to be shared, and what each layer has for itself."""
    for weights in merged.values():
        if isinstance(weights, SharedWeights):
            yield weights.shared
            yield from weights.own


def _watched(method: Method, stacks: Stacks) -> Stacks:
    """Return the sublayers of which all that goes through them is held at a time."""
    if method.name == NARROW:
        return {name: members[:1] for name, members in stacks.items()}
    return stacks


def _check_fits(method: Method, config: MergeConfig) -> None:
    """Refuse what narrowing has no use for."""
    if method.name != NARROW:
        return
    if config.window is not None:
        raise InputError("narrow takes neurons of all layers: give a budget instead of a window.")
    if config.auto_precision:
        raise InputError("narrow does not choose a precision: leave out auto_precision.")


def _check_needs_no_data(method: Method, searches: Sequence[Sequence[Choice]]) -> None:
    """Refuse without data a method that reads statistics, and windows to choose from."""
    tried = sum(map(len, searches))
    if method.statistics or tried > len(searches):
        raise InputError(f"method {method.name!r} with {tried} windows to try needs data.")


def _record(model: Any, method: Method, merged: Merged, metric: dict[str, Any]) -> MergeRecord:
    """Return the record of a merge of a model that is still as it was.

    What shares its weights when it is narrowed still does.
    """
    name, groups, own = method.name, groups_of(merged), methods.own_parts(merged)
    before = merge_record(model.config)
    if before:
        name, groups, own = f"{before.method}, {name}", before.groups, before.own
    parameters, size = size_of(model)
    with in_place(model, merged):
        left, smaller = size_of(model, merged)
    return MergeRecord(
        method=name,
        groups=groups,
        parameters_before=parameters,
        parameters_after=left,
        bytes_before=size,
        bytes_after=smaller,
        metric=metric,
        own=own,
        narrowed=narrowed_of(merged),
    )


def _searches(
    model: Any, stacks: Stacks, method: Method, config: MergeConfig
) -> list[list[Choice]]:
    """Return the choices of each search: all stacks take the same layers, or each its own."""
    if config.budget:
        return []
    if method.choices:
        return [method.choices(model, stacks, config.k or 0)]
    if config.sync:
        return [windows(stacks, config)]
    return [windows({name: members}, config) for name, members in stacks.items()]


def _search_size(
    trials: Trials,
    members: Sequence[FeedForward],
    before: Candidate,
    limit: int,
    config: MergeConfig,
) -> tuple[Merged, Candidate, tuple[Candidate, ...], dict[str, Any]]:
    """Search for a model of ``limit`` bytes: groups, candidate, frontier, and the precision.

    What is said of the precision is empty unless it is chosen with the groups.
    """
    if trials.method.name == NARROW:
        return *search_widths(trials, tuple(members), before, limit), {}
    units = [(member,) for member in members]
    merged, now, frontier = search_budget(trials, units, before, limit, config.auto_precision)
    chosen = {}
    if config.auto_precision:
        chosen = {"dtype": now.dtype, "rounded": now.value}
    now = next(point for point in frontier if point.groups == now.groups)  # not rounded
    return merged, now, frontier, chosen


def _search_windows(
    trials: Trials, searches: Sequence[Sequence[Choice]]
) -> tuple[Candidate, Merged]:
    """Search stack by stack, those before merged already; return the last candidate, all groups."""
    tried = [choice for choices in searches for choice in choices]
    if len(searches) > 1:
        # later stacks are aligned by what the original computes, so before one is merged
        trials.statistics.memory = math.inf
        trials.learn(tried)
    elif len(tried) > 1:
        trials.cache = _cache(trials.model, tried, trials.statistics)
    merged: Merged = {}
    with ExitStack() as stack:
        for choices in searches:
            options = [(choice, Merged()) for choice in choices]
            now, made = trials.best(options, lambda candidate: trials.rank(candidate.value))
            stack.enter_context(in_place(trials.model, made))
            merged |= made
    return now, merged


def _cache(model: Any, tried: Sequence[Choice], statistics: Statistics) -> ActivationCache:
    """Return a cache of what all sublayers that are tried read and put out."""
    found: dict[str, list[FeedForward]] = {}
    for choice in tried:
        for members in choice:
            known = found.setdefault(members[0].stack, [])
            known += [member for member in members if member not in known]
    return ActivationCache(model, found, statistics.batches, TOKENS)
