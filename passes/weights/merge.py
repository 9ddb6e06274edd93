"""Merge feed-forward sublayers of one or several stacks: choose windows, compute, tie."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ffmerge.errors import InputError
from ffmerge.files import plain
from ffmerge.models import tasks, ties
from ffmerge.models.data import Data, examples_for
from ffmerge.models.examples import Examples
from ffmerge.models.inputs import StopForward, forward
from ffmerge.models.offload import device_of
from ffmerge.models.probe import Array
from ffmerge.models.prove import proven
from ffmerge.models.record import MergeRecord, Window, parse_budget
from ffmerge.models.sublayer import FeedForward, stacks
from ffmerge.passes.weights import cost, methods
from ffmerge.passes.weights.evaluate import score_for
from ffmerge.passes.weights.methods import Evidence
from ffmerge.passes.weights.recorded import Recorded
from ffmerge.passes.weights.resume import Resumed
from ffmerge.passes.weights.search import (
    Candidate,
    Choice,
    Point,
    Progress,
    State,
    Trials,
    form,
    shrink,
    size_of,
)
from ffmerge.passes.weights.settings import Settings

ByName = Mapping[str, tuple[FeedForward, ...]]


@dataclass(frozen=True)
class MergeConfig:
    """Settings of a merge.

    Give ``window`` (first and last layer, inclusive; one for every stack, or by stack), ``k``
    (every window of k layers is tried) or ``budget`` (a size such as ``60MB``, or ``-25%``: layers
    are joined one by one, the best measured first, until the model is that small). ``stacks`` may
    be empty for a model's only stack, and for encoder and decoder. For ``k`` each stack is searched
    alone, with those before it merged already, or with ``sync`` all take the same layers; for
    ``budget`` all stacks compete. ``adjacent`` joins neighbours only; ``dtype="auto"`` chooses the
    precision of the package too, whose size then is the budget's. ``criterion`` is what chooses:
    ``metric``, where there is one, or ``fidelity`` to the original, which needs no labels.
    ``tokens`` are the positions the statistics of each stack are taken from, about 10,000 in the
    paper.
    """

    k: int | None = None
    window: Window | Mapping[str, Window] | None = None
    stacks: tuple[str, ...] = ()
    sync: bool = False
    method: str = "calibrated"
    tokens: int = 10_000
    batch_size: int = 32
    task: str | None = None
    settings: Settings = field(default_factory=Settings)
    budget: str | None = None
    adjacent: bool = True
    dtype: str | None = None
    criterion: str = "metric"


@dataclass(frozen=True)
class Merge:
    """What was done, all that was tried, and of a budget the size and quality after each step."""

    record: MergeRecord
    candidates: tuple[Candidate, ...]
    frontier: tuple[Point, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return plain(
            {**vars(self.record), "candidates": self.candidates, "frontier": self.frontier}
        )


def merge_(
    model: Any,
    data: Data | None,
    config: MergeConfig,
    validation: Data | None = None,
    progress: Progress = lambda step, done, total: None,
) -> Merge:
    """Make k sublayers of ``model`` share one set of weights, in place.

    ``data`` gives the statistics and ``validation`` the metric that chooses the window; without
    ``validation`` the rows of ``data`` at even places do the one and those at odd places the
    other. ``data`` may be None for a method that needs none and a window that is given.

    Raises:
        InputError: the window does not fit the model, or the data does not.
    """
    method = methods.get(config.method)
    chosen = sublayers(model, config)
    together = [list(chosen)] if config.sync else [[name] for name in chosen]
    searches = [_choices({name: chosen[name] for name in names}, config) for names in together]
    tried = [choice for search in searches for choice in search]
    calibration = examples_for(model, data, config.task)
    held_out = examples_for(model, validation, config.task)
    if calibration is not None and held_out is None:
        calibration, held_out = calibration.halves()
    if calibration is None and (method.needs_data or len(tried) > len(searches)):
        raise InputError(f"method {method.name!r} with {len(tried)} windows to try needs data.")
    evidence, watched = dict.fromkeys(chosen, Evidence(config.settings)), None
    if calibration is not None:
        size = _rows(model, calibration, config, chosen)
        watched = partial(_watched, calibration, size, progress)
        again = partial(calibration.batches, size)
        evidence = dict.fromkeys(chosen, Evidence(config.settings, None, again))
    score = None
    if held_out is not None:
        task = config.task or tasks.infer(model)
        score = score_for(model, task, held_out, config.batch_size, config.criterion)
    elif config.budget:
        raise InputError("a budget is met by measuring what is lost: it needs data.")
    parameters, size = size_of(model)
    now = before = Candidate((), score.measure(model) if score else 0.0, size)
    resumed = Resumed(model, (s for members in chosen.values() for s in members))
    if resumed.reason:
        progress(f"candidates run the whole model: {resumed.reason}", 0, 0)
    # what stacks to come are aligned by is taken from the original, so before one is merged
    memory = math.inf if len(searches) > 1 else cost.room(device_of(model))
    # of use to several candidates, while nothing else is merged
    shared = method.fits and len(searches) == 1 and len(tried) > 1
    recorded = Recorded(model, config.settings.tokens) if shared else None
    trials = Trials(
        model, resumed, method, evidence, score, watched, config.tokens, progress, memory, recorded
    )
    metric: dict[str, Any] = {"name": score.name if score else None}
    frontier: tuple[Point, ...] = ()
    if config.budget:
        units = [(sublayer,) for members in chosen.values() for sublayer in members]
        limit, auto = parse_budget(config.budget, size), config.dtype == "auto"
        state, point, frontier = shrink(trials, units, before, limit, config.adjacent, auto)
        ties.tie_(model, state.groups, state.shared)
        metric |= {"dtype": point.dtype, "rounded": point.value} if auto else {}
        groups = point.groups
        now = next(Candidate(p.groups, p.value, 0) for p in frontier if p.groups == groups)
    else:
        groups = ()
        if len(searches) > 1:
            trials.learn(tried)
        for search in searches:
            options = [(choice, State()) for choice in search]
            now, state = trials.best(options, lambda candidate: trials.rank(candidate.value))
            ties.tie_(model, state.groups, state.shared)
            groups += now.groups
    metric |= {"before": before.value, "merged": now.value} if score else {}
    metric = {"before": None, "merged": None, "recovered": None} | metric
    metric["examples"] = len(held_out or ())
    left, smaller = size_of(model)
    own = tuple(sorted({part for each in state.shared for part in each.parts}))
    record = MergeRecord(method.name, groups, parameters, left, size, smaller, metric, own)
    if groups:
        model.config.ffmerge = record.to_json()
    return Merge(record, tuple(trials.tried), frontier)


def sublayers(model: Any, config: MergeConfig) -> dict[str, tuple[FeedForward, ...]]:
    """Return the sublayers to choose from by stack, each proved to be one."""
    if getattr(model.config, "ffmerge", None):
        raise InputError("this model is merged already: start from the original checkpoint.")
    found, left = proven(model)
    by_name = stacks(found)
    if not by_name:
        why = [f"{part.path} is left alone: {part.reason}" for part in left]
        why.append("no feed-forward sublayer is found in it")
        raise InputError(f"{type(model).__name__} cannot be merged: {why[0]}.")
    names = config.stacks
    if isinstance(config.window, Mapping):
        names = names or tuple(config.window)
        if set(names) != set(config.window):
            raise InputError("give a window for each of the stacks, or one for all of them.")
    if not names:
        if len(by_name) > 1 and not model.config.is_encoder_decoder:
            raise InputError(f"the model has several stacks ({', '.join(by_name)}): choose one.")
        names = tuple(by_name)
    for name in names:
        if name not in by_name:
            raise InputError(f"no stack {name!r} in the model: it has {', '.join(by_name)}.")
    return {name: by_name[name] for name in names}


def _choices(by_name: Mapping[str, tuple[FeedForward, ...]], config: MergeConfig) -> list[Choice]:
    """Return what to try: the given windows, or all windows of k layers of every stack alike."""
    if sum(given is not None for given in (config.k, config.window, config.budget)) != 1:
        raise InputError("give either a window, the number k of layers to merge, or a budget.")
    if config.budget is None and config.dtype:
        raise InputError("a precision is chosen for a budget: give one.")
    if config.dtype not in (None, "auto") or (config.sync and config.budget):
        raise InputError("for a budget dtype is auto or none, and stacks are not in step.")
    if config.budget:
        return []
    numbers = {name: [s.layer for s in members] for name, members in by_name.items()}
    given, k = config.window, config.k or 0
    spans: list[list[Sequence[int]]] = [[]]
    for name, layers in numbers.items():
        runs, has = by_name[name][0].runs, f"stack {name!r} has"
        if given is not None:
            first, last = given[name] if isinstance(given, Mapping) else given
            if first not in layers or last not in layers or last <= first:
                where = f"{has} layers {layers[0]} to {layers[-1]}"
                raise InputError(f"window {first}-{last} is out of range: {where}.")
            spans[0].append(range(first, last + 1))
        elif len(layers) == 1 and runs > 1:
            raise InputError(f"stack {name!r} is shared already: one sublayer is run {runs} times.")
        elif not 2 <= k <= len(layers):
            size = len(layers)
            raise InputError(f"k = {k} does not fit: {has} {size} layers, so k is 2 to {size}.")
    if given is None:
        common = sorted(set.intersection(*map(set, numbers.values())))
        spans = [[common[i : i + k]] * len(numbers) for i in range(len(common) - k + 1)]
    choices = [
        tuple(
            tuple(s for s in members if s.layer in layers)
            for members, layers in zip(by_name.values(), windows, strict=True)
        )
        for windows in spans
    ]
    alike = [c for c in choices if all(len({form(s) for s in members}) == 1 for members in c)]
    if not alike:
        raise InputError("no window holds sublayers of one size: they cannot share weights.")
    return alike


def _watched(
    examples: Examples, size: int, progress: Progress, told: str
) -> Iterator[dict[str, Array]]:
    for done, batch in enumerate(examples.batches(size), 1):
        yield batch
        progress(f"statistics: {told}", min(done * size, len(examples)), len(examples))


def _rows(model: Any, examples: Examples, config: MergeConfig, chosen: ByName) -> int:
    """Return how many rows go through the model at a time: few, where what is watched is large."""
    size = config.batch_size
    row = {name: array[:1] for name, array in next(examples.batches(size)).items()}
    lengths: list[int] = []

    def look(_: Any, args: Any, out: Tensor) -> None:
        lengths.append(out.numel() // out.shape[-1])
        raise StopForward

    for members in chosen.values():
        handle = model.get_submodule(members[0].output).register_forward_hook(look)
        with torch.no_grad():
            forward(model, row)
        handle.remove()
    width = sum(n * cost.width_of(m) for n, m in zip(lengths, chosen.values(), strict=True))
    return min(size, max(1, cost.BATCH // width))
