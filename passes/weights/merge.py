"""Merge feed-forward sublayers of one or several stacks: choose windows, compute, tie."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter
from typing import Any

from torch import nn

from ffmerge.errors import InputError
from ffmerge.files import plain
from ffmerge.models import tasks, ties
from ffmerge.models.data import Examples, from_arrays
from ffmerge.models.feedforward import FeedForward, proven, stacks
from ffmerge.models.plan import Group, MergeRecord, Window
from ffmerge.models.probe import Array
from ffmerge.models.ties import Sharing
from ffmerge.passes.weights import methods, statistics
from ffmerge.passes.weights.evaluate import score_for
from ffmerge.passes.weights.methods import Evidence
from ffmerge.passes.weights.settings import Settings

# The sublayers that one candidate would tie: for each stack of the search its members.
Choice = tuple[tuple[FeedForward, ...], ...]
Data = Examples | Mapping[str, Array] | None
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class MergeConfig:
    """Settings of a merge.

    Give ``window`` (first and last layer, inclusive; one for every stack, or by stack) or ``k``
    (every window of k layers is tried). ``stacks`` may be empty for a model's only stack, and for
    encoder and decoder. Each stack is searched alone, with those before it merged already; with
    ``sync`` all take the same layers. ``tokens`` are the positions the statistics of each stack
    are taken from, about 10,000 in the paper.
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


@dataclass(frozen=True)
class Candidate:
    """Layers that were tried, and the metric of the merged, untuned model."""

    groups: tuple[Group, ...]
    value: float


@dataclass(frozen=True)
class Merge:
    """What was done, and all that was tried on the way."""

    record: MergeRecord
    candidates: tuple[Candidate, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return plain({**vars(self.record), "candidates": self.candidates})


def merge_(
    model: Any,
    data: Data,
    config: MergeConfig,
    validation: Data = None,
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
    chosen = _stacks(model, config)
    together = [list(chosen)] if config.sync else [[name] for name in chosen]
    searches = [_choices({name: chosen[name] for name in names}, config) for names in together]
    tried = sum(map(len, searches))
    calibration, held_out = _examples(data), _examples(validation)
    if calibration is not None and held_out is None:
        calibration, held_out = calibration.halves()
    if calibration is None and (method.needs_data or tried > len(searches)):
        raise InputError(f"method {method.name!r} with {tried} windows to try needs data.")
    evidence = {name: Evidence(config.settings) for name in chosen}
    if calibration is not None and method.needs_data:
        batches = _watched(calibration, config.batch_size, progress)
        pairs: dict[str, list[tuple[FeedForward, FeedForward]]] = {name: [] for name in chosen}
        for members in (members for search in searches for choice in search for members in choice):
            pairs[members[0].stack] += config.settings.pairs(members)
        limits = config.tokens, config.settings.after
        moments = statistics.collect(model, pairs, batches, *limits)
        again = partial(calibration.batches, config.batch_size)
        evidence = {n: Evidence(config.settings, moments[n], again) for n in chosen}
    score = None
    if held_out is not None:
        task = config.task or tasks.infer(model)
        score = score_for(model, task, held_out, config.batch_size)
    before = _size(model)
    quality = value = score.measure(model) if score else None
    candidates: list[Candidate] = []
    groups: list[Group] = []

    def attempts(search: Sequence[Choice]) -> Iterator[tuple[float, Choice, list[Sharing]]]:
        for choice in search:
            shared = [method.merge(model, m, evidence[m[0].stack]) for m in choice]
            rank = 0.0
            if score:
                with ties.tied(model, choice, shared):
                    candidates.append(Candidate(_groups(choice), score.measure(model)))
                rank = score.rank(candidates[-1].value)
                progress("windows", len(candidates), tried)
            yield rank, choice, shared

    for search in searches:
        rank, choice, shared = max(attempts(search), key=itemgetter(0))  # the earliest of equals
        ties.tie_(model, choice, shared)
        groups += _groups(choice)
        value = score.rank(rank) if score else None
    metric = {"name": score.name if score else None, "before": quality, "merged": value}
    metric |= {"recovered": None, "examples": len(held_out or ())}
    after = _size(model)
    own = tuple(sorted({part for each in shared for part in each.parts}))
    sizes = (before[0], after[0], before[1], after[1])
    record = MergeRecord(method.name, tuple(groups), *sizes, metric, own)
    model.config.ffmerge = record.to_json()
    return Merge(record, tuple(candidates))


def _stacks(model: Any, config: MergeConfig) -> dict[str, tuple[FeedForward, ...]]:
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
    if (config.k is None) == (config.window is None):
        raise InputError("give either a window or the number k of layers to merge.")
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
    alike = [c for c in choices if all(len({_form(s) for s in members}) == 1 for members in c)]
    if not alike:
        raise InputError("no window holds sublayers of one size: they cannot share weights.")
    return alike


def _form(sublayer: FeedForward) -> tuple[Any, ...]:
    weights = [(w.neurons, w.blocks) for w in sublayer.weights]
    return (sublayer.d_model, sublayer.d_ff, *weights)


def _groups(choice: Choice) -> tuple[Group, ...]:
    return tuple(Group(m[0].stack, tuple(s.layer for s in m)) for m in choice)


def _examples(data: Data) -> Examples | None:
    return from_arrays(data) if isinstance(data, Mapping) else data


def _watched(examples: Examples, size: int, progress: Progress) -> Iterator[dict[str, Array]]:
    for done, batch in enumerate(examples.batches(size), 1):
        yield batch
        progress("statistics", min(done * size, len(examples)), len(examples))


def _size(model: nn.Module) -> tuple[int, int]:
    """Return parameters and bytes of ``model``, every shared parameter counted once."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters), sum(p.nbytes for p in parameters)
