"""The rooms in order: what each command of the command line does, from paths to results."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from transformers.utils.logging import disable_progress_bar

from ffmerge.config import (
    CompareConfig,
    ExportConfig,
    MergeConfig,
    RecoverConfig,
    SimilarityConfig,
    ValidateConfig,
)
from ffmerge.errors import InputError
from ffmerge.exporter import package
from ffmerge.exporter.package import Package
from ffmerge.exporter.write import WEIGHTS
from ffmerge.files import (
    FIRST_PROCESS,
    plain,
    refuse_existing,
    scratch,
    staged,
    write_json,
    write_whole,
)
from ffmerge.heatmap import picture
from ffmerge.models import checkpoint, data, digits, tasks
from ffmerge.models.examples import from_arrays
from ffmerge.models.float32 import float32_
from ffmerge.models.manifest import Manifest, MetricResult
from ffmerge.models.offload import offload_
from ffmerge.models.source import resolve
from ffmerge.passes.weights import compare as comparing
from ffmerge.passes.weights import merge as merging
from ffmerge.passes.weights import processes
from ffmerge.passes.weights.compare import Comparison
from ffmerge.passes.weights.evaluate import score_for
from ffmerge.passes.weights.merge import Merge
from ffmerge.passes.weights.progress import Progress as ShowProgress
from ffmerge.passes.weights.recover import clone_sharing_parameters, recover_
from ffmerge.passes.weights.similarity import Similarity, similarities
from ffmerge.runtime_tests import report
from ffmerge.runtime_tests import validate as validation
from ffmerge.runtime_tests.footprint import measure_footprint
from ffmerge.runtime_tests.results import MetricRow, Validation, metric_row
from ffmerge.tables import cost_table

_DEMO_MODEL = Path(__file__).parent / "models" / "digits_vit"
_DEMO_K = 3
_DEMO_PICTURES: tuple[tuple[digits.Split, int], ...] = (
    ("calibration", 500), ("validation", 1000), ("test", 1000),
)  # fmt: skip


def merge(
    source: str,
    out: Path,
    config: MergeConfig,
    data_source: str | None = None,
    validation_source: str | None = None,
    expanded: bool = False,
    trust_remote_code: bool = False,
    recovery: RecoverConfig | None = None,
    device: str = "cpu",
    offload: bool = False,
) -> Merge:
    """Merge the checkpoint ``source`` and save it as the new folder ``out``.

    With ``recovery`` the merged model is then trained towards the original. Its state is kept in
    a hidden folder beside ``out`` until the end: the same call goes on after a kill. With
    ``offload`` the weights stay pages of the checkpoint, and a block's are on the device while it
    runs. Under torchrun every process calls this, and the first one writes.
    """
    refuse_existing(out)
    if recovery and not data_source:
        raise InputError("recovery follows the original on data: give --data.")
    with _progress() as show:
        folder = resolve(source, code=trust_remote_code)
        model = _on(device, checkpoint.load(folder, trust_remote_code), offload)
        task = tasks.check(config.task) if config.task else tasks.infer(model)
        calibration = data.read(data_source, folder, task) if data_source else None
        held_out = data.read(validation_source, folder, task) if validation_source else None
        if calibration and not held_out:
            calibration, held_out = calibration.halves()
        original = clone_sharing_parameters(model) if recovery else None
        result = merging.merge_(model, calibration, config, held_out, show)
        if recovery and calibration and held_out:
            recovery = replace(recovery, task=task)
            state = out.with_name(f".{out.name}.recovery")
            recover_(model, original, calibration, recovery, show, state)
            show("measuring", 0, 0)
            score = score_for(original, task, held_out, config.batch_size, config.criterion)
            metric = {**result.record.metric, "recovered": score.measure(model)}
            result = replace(result, record=replace(result.record, metric=metric))
            model.config.ffmerge = result.record.to_json()
        if FIRST_PROCESS:
            checkpoint.save(model, out, folder, expanded=expanded)
            shutil.rmtree(out.with_name(f".{out.name}.recovery"), ignore_errors=True)
    return result


def _on(device: str, model: Any, offload: bool) -> Any:
    processes.rank_and_world_size()  # gives each of several processes a GPU of its own
    try:
        torch.empty(0, device=device)
        if not offload:
            return model.to(device)
        offload_(model, device)
        return model
    except (RuntimeError, AssertionError) as error:  # the latter where PyTorch has no CUDA
        first = str(error).splitlines()[0]
        raise InputError(f"the model cannot be put on --device {device!r}: {first}") from error


def compare(
    source: str,
    config: CompareConfig,
    data_source: str,
    validation_source: str | None = None,
    trust_remote_code: bool = False,
) -> Comparison:
    """Compare merging of the checkpoint ``source`` with its rivals; nothing is written."""
    with _progress() as show:
        folder = resolve(source, code=trust_remote_code)
        model = checkpoint.load(folder, trust_remote_code)
        task = tasks.check(config.task) if config.task else tasks.infer(model)
        calibration = data.read(data_source, folder, task)
        held_out = data.read(validation_source, folder, task) if validation_source else None
        return comparing.compare(model, calibration, held_out, config, show)


def similarity(
    source: str,
    data_source: str,
    config: SimilarityConfig,
    out: Path | None = None,
    trust_remote_code: bool = False,
) -> tuple[tuple[Similarity, ...], list[Path]]:
    """Return how alike the sublayers of the checkpoint ``source`` are, and the files written.

    ``out`` is a picture of all stacks, or else a folder: a picture for each, and the numbers.

    Raises:
        InputError: ``out`` exists, is a file of another kind, or cannot be written.
    """
    if out:
        refuse_existing(out)
        if out.suffix not in ("", ".svg"):
            raise InputError(f"{out} is no .svg: end in that, or in no suffix for a folder.")
    with _progress() as show:
        folder = resolve(source, code=trust_remote_code)
        model = checkpoint.load(folder, trust_remote_code)
        examples = data.read(data_source, folder, tasks.infer(model))
        found = similarities(model, examples, config, show)
    if out is None:
        return found, []
    stacks = [stack.to_json() for stack in found]
    if out.suffix:
        return found, [write_whole(out, picture(stacks).encode())]
    with staged(out) as target:
        for stack in stacks:
            (target / f"{stack['name']}.svg").write_text(picture([stack]), "utf-8")
        write_json(target / "similarity.json", {"stacks": stacks})
    return found, sorted(out.iterdir())


def export(
    source: str,
    out: Path,
    config: ExportConfig,
    data_source: str | None = None,
    trust_remote_code: bool = False,
) -> Package:
    """Export the checkpoint ``source`` as the new package ``out``, with a few rows of the data.

    One of 16 bits is computed with in float32, whose weights are on disk beside ``out`` meanwhile.
    """
    with _progress() as show, scratch(out) as wide:
        folder = resolve(source, code=trust_remote_code)
        model = checkpoint.load(folder, trust_remote_code)
        float32_(model, wide)
        show("tracing and writing", 0, 0)
        result = package.export(model, out, config, folder, data_source)
        show("measuring", 0, 0)
        return replace(result, costs=_costs(result.manifest, out) if config.prepack else {})


def _costs(manifest: Manifest, folder: Path) -> dict[str, Any]:
    """Return bytes and footprint of the graphs and of their variants, by kind."""
    costs = {}
    for kind in dict.fromkeys(("onnx", *(variant.kind for variant in manifest.variants))):
        opened = {*manifest.served(kind), *(f"{path}_data" for path in manifest.served(kind))}
        opened |= {WEIGHTS} if kind == "onnx" else set()
        size = sum(file.bytes for file in manifest.files if file.path in opened)
        costs[kind] = {"bytes": size, **asdict(measure_footprint(folder, kind=kind))}
    return costs


def validate(folder: Path, config: ValidateConfig) -> Validation:
    """Validate a package, and write what was found into it."""
    with _progress() as show:
        return validation.validate(folder, config, progress=lambda step: show(step, 0, 0))


@dataclass(frozen=True)
class Demo:
    """The demo's packages before and after, and the metric in three ``stages``.

    ``ok`` is true when both packages compute what PyTorch computes.
    """

    before: Validation
    after: Validation
    stages: tuple[MetricRow, ...]
    merge: Merge

    @property
    def ok(self) -> bool:
        """Tell whether both packages hold."""
        return self.before.ok and self.after.ok

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; the method's and the export's losses are kept apart."""
        return plain(
            {
                "ok": self.ok,
                "before": report.summary(self.before),
                "after": report.summary(self.after),
                "losses": report.losses(self.stages, self.after.max_abs),
                "merge": self.merge.to_json(),
            }
        )

    def table(self) -> Any:
        """Return the before/after table for a terminal."""
        record, first = self.merge.record, self.stages[0]
        title = (
            f"ViT on digits: layers {report.layers_text(record.groups[0])} of 6 share one "
            f"feed-forward sublayer ({record.method}, untuned; {first.examples} test pictures)"
        )
        return cost_table(report.rows(self.before, self.after, self.stages), title)


def demo(out: Path) -> Demo:
    """Merge, export, validate and report the embedded model on the embedded data.

    Leaves ``original`` and ``merged`` packages, the merged ``checkpoint`` and ``report.html``
    in the new folder ``out``. Calibration pictures give the statistics, validation pictures
    choose the window, test pictures are only reported.
    """
    calibration, held_out, test = (
        from_arrays(digits.load(split, count=count)) for split, count in _DEMO_PICTURES
    )
    with staged(out) as folder, _progress() as show:
        original = checkpoint.load(_DEMO_MODEL)
        score = score_for(original, "image-classification", test, 100)
        first = package.export(original, folder / "original", source=_DEMO_MODEL, data=held_out)
        show("merging", 0, 0)
        merged = checkpoint.load(_DEMO_MODEL)
        result = merging.merge_(merged, calibration, MergeConfig(k=_DEMO_K), held_out, show)
        checkpoint.save(merged, folder / "checkpoint")
        second = package.export(
            merged, folder / "merged", source=folder / "checkpoint", data=held_out
        )
        show("validating", 0, 0)
        labels = {first.path: "The original ViT", second.path: "The merged ViT"}
        once = [
            replace(validation.check(path, examples=test), label=label)
            for path, label in labels.items()
        ]
        before, after = map(validation.measured_again, labels, once)
        for path, check in ((first.path, before), (second.path, after)):
            validation.write_validation(path, check)
        stages = []
        for stage, model in (("original", original), ("merged", merged)):
            metric = MetricResult(score.name, score.measure(model), len(test))
            stages.append(metric_row(stage, "PyTorch", "test pictures", metric))
        if after.metric:
            stages.append(metric_row("served", "cpu", "test pictures", after.metric))
        alike = [stack.to_json() for stack in similarities(original, calibration)]
        report.write_report(folder, after, before, stages, ["ffmerge demo"], alike)
    return Demo(before, after, tuple(stages), result)


@contextmanager
def _progress() -> Iterator[ShowProgress]:
    """Yield ``show(step, done, total)``, a bar on stderr; total 0 means: no end is known."""
    disable_progress_bar()  # transformers draws one for every file: one display is enough
    console = Console(stderr=True)
    shown = console.is_terminal and FIRST_PROCESS
    with Progress(console=console, transient=True, disable=not shown) as bars:
        tasks_by_step: dict[str, Any] = {}

        def show(step: str, done: int, total: int) -> None:
            name = step.partition(":")[0]  # behind it stands what changes, like a loss
            if name not in tasks_by_step:
                tasks_by_step[name] = bars.add_task(step, total=total or None)
            bars.update(tasks_by_step[name], description=step, completed=done)

        yield show
