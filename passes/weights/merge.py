"""Merge the feed-forward sublayers of one window: choose it, compute the shared weights, tie."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ffmerge.errors import InputError
from ffmerge.models import tasks, ties
from ffmerge.models.data import Examples, from_arrays
from ffmerge.models.feedforward import FeedForward, find, prove, stacks
from ffmerge.models.plan import Group, MergeRecord
from ffmerge.models.probe import Array
from ffmerge.passes.weights import methods, statistics
from ffmerge.passes.weights.evaluate import Score, score_for

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class MergeConfig:
    """Settings of a merge.

    Give ``window`` (first and last layer, inclusive) or ``k`` (every window of k layers is
    tried). ``stack`` may stay None when the model has one. ``tokens`` are the positions the
    statistics are taken from, about 10,000 in the paper.
    """

    k: int | None = None
    window: tuple[int, int] | None = None
    stack: str | None = None
    method: str = "permute"
    tokens: int = 10_000
    batch_size: int = 32
    task: str | None = None


@dataclass(frozen=True)
class Candidate:
    """A window that was tried, and the metric of the merged, untuned model."""

    layers: tuple[int, ...]
    value: float


@dataclass(frozen=True)
class Merge:
    """What was done, and every window that was tried on the way."""

    record: MergeRecord
    candidates: tuple[Candidate, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        tried = [{"layers": list(c.layers), "value": c.value} for c in self.candidates]
        return {**self.record.to_json(), "candidates": tried}


def merge_(
    model: Any,
    data: Examples | Mapping[str, Array] | None,
    config: MergeConfig,
    validation: Examples | Mapping[str, Array] | None = None,
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
    sublayers = _stack(model, config.stack)
    windows = _windows(sublayers, config)
    calibration, held_out = _split(data, validation)
    if calibration is None and (method.needs_data or len(windows) > 1):
        raise InputError(f"method {method.name!r} with {len(windows)} windows to try needs data.")
    moments = None
    if calibration is not None and method.needs_data:
        layers = [s.layer for s in sublayers]
        pairs = statistics.window_pairs(layers, windows)
        wanted = [s for s in sublayers if any(s.layer in pair for pair in pairs)]
        batches = _watched(calibration, config.batch_size, progress)
        moments = statistics.collect(model, wanted, pairs, batches, config.tokens)
    score = None
    if held_out is not None:
        task = config.task or tasks.infer(model)
        score = score_for(model, task, held_out, config.batch_size)
    before = _size(model)
    quality = score.measure(model) if score else None
    candidates = []
    if score:
        for done, window in enumerate(windows):
            members = [sublayers[i] for i in window]
            with ties.tied(model, members, method.merge(model, members, moments)):
                candidates.append(Candidate(tuple(m.layer for m in members), score.measure(model)))
            progress("windows", done + 1, len(windows))
    best = _best(candidates, score) if score else 0
    members = [sublayers[i] for i in windows[best]]
    ties.tie_(model, members, method.merge(model, members, moments))
    metric = {
        "name": score.name if score else None,
        "before": quality,
        "merged": candidates[best].value if score else None,
        "recovered": None,
        "examples": len(held_out) if held_out else 0,
    }
    group = Group(members[0].stack, tuple(m.layer for m in members))
    after = _size(model)
    record = MergeRecord(method.name, (group,), before[0], after[0], before[1], after[1], metric)
    model.config.ffmerge = record.to_json()
    return Merge(record, tuple(candidates))


def _stack(model: Any, name: str | None) -> tuple[FeedForward, ...]:
    """Return the sublayers to choose from, each proved to be one."""
    if getattr(model.config, "ffmerge", None):
        raise InputError("this model is merged already: start from the original checkpoint.")
    by_name = stacks(find(model))
    if not by_name:
        raise InputError(f"no feed-forward sublayer found in {type(model).__name__}.")
    if name is None and len(by_name) > 1:
        raise InputError(f"the model has several stacks ({', '.join(by_name)}): choose one.")
    if name is not None and name not in by_name:
        raise InputError(f"no stack {name!r} in the model: it has {', '.join(by_name)}.")
    chosen = by_name[name or next(iter(by_name))]
    for sublayer, proved in zip(chosen, prove(model, chosen), strict=True):
        if not proved:
            raise InputError(
                f"{sublayer.path} looks like a feed-forward sublayer, but reordering its hidden "
                "neurons changes its output: it cannot be merged."
            )
    return chosen


def _windows(sublayers: Sequence[FeedForward], config: MergeConfig) -> list[range]:
    """Return the windows to try, as positions in the stack: all starts 0 to N - k."""
    layers = [sublayer.layer for sublayer in sublayers]
    n = len(layers)
    if (config.k is None) == (config.window is None):
        raise InputError("give either a window or the number k of layers to merge.")
    if config.window is not None:
        first, end = config.window
        if first not in layers or end not in layers or end <= first:
            raise InputError(
                f"window {first}-{end} is out of range: the stack has layers {layers[0]} to "
                f"{layers[-1]}."
            )
        return [range(layers.index(first), layers.index(end) + 1)]
    k = config.k or 0
    if not 2 <= k <= n:
        raise InputError(f"k = {k} does not fit: the stack has {n} layers, so k is 2 to {n}.")
    return [range(start, start + k) for start in range(n - k + 1)]


def _split(
    data: Examples | Mapping[str, Array] | None, validation: Examples | Mapping[str, Array] | None
) -> tuple[Examples | None, Examples | None]:
    calibration = from_arrays(data) if isinstance(data, Mapping) else data
    held_out = from_arrays(validation) if isinstance(validation, Mapping) else validation
    if calibration is not None and held_out is None:
        return calibration.halves()
    return calibration, held_out


def _watched(examples: Examples, size: int, progress: Progress) -> Iterator[dict[str, Array]]:
    for done, batch in enumerate(examples.batches(size)):
        progress("statistics", done * size, len(examples))
        yield batch
    progress("statistics", len(examples), len(examples))


def _best(candidates: Sequence[Candidate], score: Score) -> int:
    """Return the place of the best candidate, the earliest of equals."""
    ranks = [score.rank(c.value) for c in candidates]
    return ranks.index(max(ranks))


def _size(model: nn.Module) -> tuple[int, int]:
    """Return parameters and bytes of ``model``, every shared parameter counted once."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters), sum(p.nbytes for p in parameters)
