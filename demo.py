"""``ffmerge demo``: the whole pipeline on a model and pictures that ffmerge ships."""

from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Group
from transformers.utils.logging import disable_progress_bar

from ffmerge import progress
from ffmerge.config import ExportConfig, MergeConfig
from ffmerge.exporter.package import export
from ffmerge.files import plain, staged
from ffmerge.models import checkpoint, digits
from ffmerge.models.examples import Examples, from_arrays
from ffmerge.models.manifest import MetricResult
from ffmerge.passes.weights.evaluate import Score, score_for
from ffmerge.passes.weights.merge import Merge, merge_
from ffmerge.passes.weights.precision import bytes_of, rounded
from ffmerge.passes.weights.similarity import similarity
from ffmerge.runtime_tests import report
from ffmerge.runtime_tests import validate as validation
from ffmerge.runtime_tests.results import MetricRow, Validation, metric_row
from ffmerge.runtime_tests.rows import losses, rows, summary
from ffmerge.runtime_tests.words import layers_text
from ffmerge.tables import cost_table, points_table

MODEL = Path(__file__).parent / "models" / "digits_vit"
K = 3
TEST = "test pictures"
PLAIN = ExportConfig(profile="portable")  # the page of examples/web runs it on WebGPU, too


@dataclass(frozen=True)
class Demo:
    """The demo's packages before and after, and the metric in three ``stages``.

    ``points`` are other ways to a smaller model. ``ok`` is true when both packages compute what
    PyTorch computes.
    """

    before: Validation
    after: Validation
    stages: tuple[MetricRow, ...]
    merge: Merge
    points: tuple[report.Point, ...]

    @property
    def ok(self) -> bool:
        """Tell whether both packages hold."""
        return self.before.ok and self.after.ok

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; the method's and the export's losses are kept apart."""
        return plain(
            {
                "ok": self.ok,
                "before": summary(self.before),
                "after": summary(self.after),
                "losses": losses(self.stages, self.after.max_abs),
                "merge": self.merge.to_json(),
                "points": self.points,
            }
        )

    def table(self) -> Any:
        """Return the before/after table for a terminal, and what else there is."""
        record, first = self.merge.record, self.stages[0]
        title = (
            f"ViT on digits: layers {layers_text(record.groups[0])} of 6 share one "
            f"feed-forward sublayer ({record.method}, untuned; {first.examples} test pictures)"
        )
        costs = cost_table(rows(self.before, self.after, self.stages), title)
        return Group(costs, points_table(self.points, str(first.name), first.examples))


def demo(out: Path) -> Demo:
    """Merge, export, validate and report the embedded model on the embedded data.

    Leaves ``original`` and ``merged`` packages, the merged ``checkpoint`` and ``report.html``
    in the new folder ``out``. Calibration pictures give the statistics, validation pictures
    choose the window, test pictures are only reported.
    """
    disable_progress_bar()  # transformers draws one for every file: one display is enough
    calibration = from_arrays(digits.load("calibration", count=500))
    held_out = from_arrays(digits.load("validation", count=1000))
    test = from_arrays(digits.load("test", count=1000))
    with staged(out) as folder, progress.shown() as show:
        original = checkpoint.load(MODEL)
        score = score_for(original, "image-classification", test, 100)
        first = export(original, folder / "original", PLAIN, source=MODEL, data=held_out)
        show("merging", 0, 0)
        merged = checkpoint.load(MODEL)
        result = merge_(merged, calibration, MergeConfig(k=K), held_out, show)
        checkpoint.save(merged, folder / "checkpoint")
        second = export(merged, folder / "merged", PLAIN, folder / "checkpoint", held_out)
        show("validating", 0, 0)
        before, after = _validated(
            {first.path: "The original ViT", second.path: "The merged ViT"}, test
        )
        stages = []
        for stage, model in (("original", original), ("merged", merged)):
            metric = MetricResult(score.name, score.measure(model), len(test))
            stages.append(metric_row(stage, "PyTorch", TEST, metric))
        if after.metric:
            stages.append(metric_row("served", "cpu", TEST, after.metric))
        alike = [stack.to_json() for stack in similarity(original, calibration)]
        show("narrowing", 0, 0)
        narrowed = checkpoint.load(MODEL)
        budget = f"{result.record.bytes_after}B"
        merge_(narrowed, calibration, MergeConfig(method="narrow", budget=budget), held_out)
        models = {"original": original, "merged": merged, "narrowed": narrowed}
        points = _points(models, score, show)
        also = report.Extras(["ffmerge demo"], alike, points, str(score.name))
        report.write_report(folder, after, before, stages, also)
    return Demo(before, after, tuple(stages), result, points)


def _points(
    models: dict[str, Any], score: Score, show: progress.Progress
) -> tuple[report.Point, ...]:
    """Return each model in each precision, the largest first."""
    points = []
    for name, model in models.items():
        for dtype in ("fp32", "int8", "int4"):
            show(f"measuring {name}, {dtype}", 0, 0)
            with ExitStack() as stack:
                if dtype != "fp32":
                    stack.enter_context(rounded(model, dtype))
                value, size = score.measure(model), bytes_of(model, dtype)
            points.append(report.Point(f"{name}, {dtype}", size, value))
    points.sort(key=lambda point: (-point.bytes, point.value))
    found: list[report.Point] = []
    least = 0.0
    for point in reversed(points):
        found.append(replace(point, best=point.value > least))
        least = max(least, point.value)
    return tuple(reversed(found))


def _validated(labels: dict[Path, str], test: Examples) -> list[Validation]:
    """Return what was found of each package, whose costs are measured twice, some time apart."""
    found = []
    for path, label in labels.items():
        found.append(replace(validation.check_package(path, examples=test), label=label))
    again = []
    for path, once in zip(labels, found, strict=True):
        again.append(validation.measured_again(path, once))
        validation.write_validation(path, again[-1])
    return again
