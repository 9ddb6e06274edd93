"""Is merging the right tool? The method and its rivals at equal size, on the same examples.

Every method is searched as ``merge_`` would (``merge.choose``), the rivals of ``rivals.py`` among
them, and the model stays as it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ffmerge.config import CompareConfig, MergeConfig
from ffmerge.errors import InputError
from ffmerge.files import plain
from ffmerge.models import tasks
from ffmerge.models.data import Data, examples_for
from ffmerge.models.examples import with_held_out
from ffmerge.models.finite import check_weights
from ffmerge.models.record import ALREADY, MergeRecord, merge_record
from ffmerge.passes.weights import methods, precision
from ffmerge.passes.weights.evaluate import Score, score_for
from ffmerge.passes.weights.merge import choose
from ffmerge.passes.weights.methods import Merged, in_place, size_of
from ffmerge.progress import Progress, silent

_OTHERS = (
    "residual", "calibrated", "narrow", "permute", "copy-anchor", "drop-ffn", "drop-layer",
    "low-rank",
)  # fmt: skip
_PRECISIONS = ("int8", "int4")


@dataclass(frozen=True)
class Compared:
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
    rows: tuple[Compared, ...]
    verdict: str

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return plain(self)


def compare(
    model: Any,
    data: Data,
    validation: Data | None,
    config: CompareConfig,
    progress: Progress = silent,
) -> Comparison:
    """Return the metric of ``model`` merged by ``config``, and of its rivals; it stays as it is.

    Rivals of equal size: the other methods, and ``drop-ffn``, ``drop-layer`` and ``low-rank``,
    each with the window that is best for it. And what int8 and int4 do, to the original and to
    the merged model, with weights rounded as in a package. Without ``validation`` every other row
    of ``data`` measures.
    """
    if config.k is None:
        raise InputError("rivals are compared at one size: give the number k of layers to merge.")
    methods.get(config.method)
    check_weights(model)
    if merge_record(model.config):
        raise InputError(ALREADY)
    asked = MergeConfig(**{"sync": True, **vars(config)})  # as drop-layer has to
    calibration, held_out = with_held_out(
        examples_for(model, data, config.task), examples_for(model, validation, config.task)
    )
    assert calibration is not None and held_out is not None  # data was given
    task = tasks.task_of(model, config.task)
    score = score_for(model, task, held_out, config.batch_size, asked.criterion)
    rows = [Compared("original", "", size_of(model)[1], score.measure(model))]
    merged: dict[str, Merged] = {"original": {}}
    for name in dict.fromkeys((config.method, *_OTHERS)):
        each = replace(asked, method=name)
        found, merged[name] = choose(model, calibration, held_out, each, progress)
        record = found.record
        layers = _layers(record, config.k)
        rows.append(Compared(name, layers, record.bytes_after, record.metric["merged"]))
    for dtype in _PRECISIONS:
        for name in ("original", config.method):
            with in_place(model, merged[name]), precision.rounded(model, dtype):
                size, value = precision.bytes_of(model, dtype), score.measure(model)
            rows.append(Compared(f"{name}, {dtype}", "", size, value))
    return Comparison(score.name, len(held_out), tuple(rows), _verdict(rows, score))


def _layers(record: MergeRecord, k: int) -> str:
    """Return the window of the first stack; nothing for a method that changes all layers."""
    if record.narrowed:
        return ""
    layers = record.groups[0].layers
    return "" if len(layers) > k else f"{layers[0]}-{layers[-1]}"


def _verdict(rows: Sequence[Compared], score: Score) -> str:
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
