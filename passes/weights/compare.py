"""Is merging the right tool? The method and its rivals at equal size, on the same examples."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ffmerge.errors import InputError
from ffmerge.files import plain
from ffmerge.models import tasks
from ffmerge.models.data import Data, examples_for
from ffmerge.passes.weights import baselines, precision
from ffmerge.passes.weights.evaluate import Score, score_for
from ffmerge.passes.weights.merge import MergeConfig, merge_, sublayers
from ffmerge.passes.weights.recover import clone_sharing_parameters
from ffmerge.passes.weights.search import Progress, size_of

_OTHERS = ("residual", "calibrated", "permute", "copy-anchor", "drop-ffn")
_PRECISIONS = ("int8", "int4")


@dataclass(frozen=True)
class Row:
    """A model: how it was made, of which layers, its size and its metric."""

    name: str
    what: str
    bytes: int
    value: float


@dataclass(frozen=True)
class Comparison:
    """All that was measured, the original first and the method that was asked for second."""

    metric: str
    examples: int
    rows: tuple[Row, ...]
    verdict: str

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return plain(self)


def compare(
    model: Any,
    data: Data,
    validation: Data | None,
    config: MergeConfig,
    progress: Progress = lambda step, done, total: None,
) -> Comparison:
    """Return the metric of ``model`` merged by ``config``, and of its rivals; it stays as it is.

    Rivals of equal size: the other methods, and ``drop-ffn``, ``drop-layer`` and ``low-rank``,
    each with the window that is best for it. And what int8 and int4 do, to the original and to
    the merged model, with weights rounded as in a package. Without ``validation`` every other row
    of ``data`` measures.
    """
    if config.k is None:
        raise InputError("rivals are compared at one size: give the number k of layers to merge.")
    calibration = examples_for(model, data, config.task)
    held_out = examples_for(model, validation, config.task)
    if held_out is None:
        calibration, held_out = calibration.halves()
    task = config.task or tasks.infer(model)
    score = score_for(model, task, held_out, config.batch_size, config.criterion)
    rows = [Row("original", "", size_of(model)[1], score.measure(model))]
    for name in dict.fromkeys((config.method, *_OTHERS)):
        each = clone_sharing_parameters(model)
        found = merge_(each, calibration, replace(config, method=name), held_out, progress)
        layers = found.record.groups[0].layers
        size = found.record.bytes_after
        rows.append(Row(name, f"{layers[0]}-{layers[-1]}", size, found.record.metric["merged"]))
        if name == config.method:
            merged = each
    chosen = sublayers(model, config)
    removed = (config.k - 1) * sum(
        sum(model.get_parameter(w.name).numel() for w in members[0].weights)
        for members in chosen.values()
    )
    element = next(model.parameters()).element_size()
    batches = calibration.batches(config.batch_size)
    for rivals in (
        baselines.drop_layers(model, chosen, removed),
        baselines.factor(model, chosen, removed, batches, config.tokens),
    ):
        tried = []
        for rival in rivals:
            with rival.applied():
                size = rows[0].bytes - rival.removed * element
                tried.append(Row(rival.name, rival.what, size, score.measure(model)))
        rows.append(max(tried, key=lambda row: score.rank(row.value)))
    for dtype in _PRECISIONS:
        for name, each in (("original", model), (config.method, merged)):
            with precision.rounded(each, dtype):
                size, value = precision.bytes_of(each, dtype), score.measure(each)
            rows.append(Row(f"{name}, {dtype}", "", size, value))
    return Comparison(score.name, len(held_out), tuple(rows), _verdict(rows, score))


def _verdict(rows: Sequence[Row], score: Score) -> str:
    """Return in a sentence whether a model as small as the merged one, or smaller, is better."""
    rank = {row: score.rank(round(row.value, 4)) for row in rows}  # as it is shown
    merged = rows[1]
    rivals = [row for row in rows[2:] if row.bytes <= merged.bytes * 1.01]
    best = max(rivals, key=rank.__getitem__, default=merged)
    if rank[best] <= rank[merged]:
        return f"{merged.name} is the best of this size."
    return (
        f"{best.name} is better and no larger: {score.name} {best.value:.4f} against "
        f"{merged.value:.4f} of {merged.name}."
    )
