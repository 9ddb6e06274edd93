"""From a checkpoint to a validated package under a size, in one call.

``ffmerge compress`` calls :func:`compress`, which opens the model, measures the ways to the size on
data (``passes/weights/target.py``), exports the best one and validates it. Where 8 bits do not fit,
a package of mixed bits is one more way, measured as it is. The work is done in steps that are kept
(``steps.py``). The new folder appears whole: ``package`` is what is shipped, ``checkpoint`` the
narrowed model in PyTorch, if it was.
"""

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ffmerge import __version__, progress
from ffmerge.commands import examples_of, open_checkpoint
from ffmerge.config import (
    CompressConfig,
    DataConfig,
    ExportConfig,
    LoadConfig,
    MergeConfig,
    parse_budget,
)
from ffmerge.early import check_output
from ffmerge.errors import InputError
from ffmerge.exporter import package
from ffmerge.files import scratch, size_text
from ffmerge.models import checkpoint
from ffmerge.models.companions import companion_bytes
from ffmerge.models.examples import Examples
from ffmerge.models.float32 import float32_
from ffmerge.models.inputs import forward
from ffmerge.models.manifest import REFERENCE, Manifest, MetricResult
from ffmerge.models.sizes import beside, check_reach, fitting, narrower
from ffmerge.models.tasks import task_of
from ffmerge.passes.weights import merge as merging
from ffmerge.passes.weights.evaluate import Score, score_for
from ffmerge.passes.weights.precision import bytes_of, shapes_of
from ffmerge.passes.weights.target import Way, measured, takes_mixed
from ffmerge.progress import Progress
from ffmerge.runtime_tests import report
from ffmerge.runtime_tests.results import Validation, metric_row, stages
from ffmerge.runtime_tests.validate import validate
from ffmerge.serving import load_package
from ffmerge.steps import RESULT, Steps, call_of

NARROWED = 1.15  # what the graph of a narrowed model takes, of the original's: measured 1.11
MIXED = "2, 4 and 8 bits by data"
NONE: Mapping[str, Any] = {"value": None}  # a way that does not lead there
# Seconds of a step: so many times those of the data through the model once, and so many for tracing
# and for what is measured in a process of its own.
BITS_COST, NARROW_COST, EXPORT_COST = 8.0, 15.0, 0.15
TRACED = 4.0
_BESIDE = (REFERENCE, "README.md")  # what a runtime does not read


@dataclass(frozen=True)
class Compressed:
    """What was shipped: the folder, its files for a runtime, the way there and the others.

    ``before`` are the bytes of the original's weights in float32, ``shipped`` those of the files,
    ``original`` the metric of the original, ``ok`` whether the package was valid and fits.
    """

    folder: Path
    size: int
    before: int
    shipped: int
    files: tuple[str, ...]
    metric: str
    examples: int
    original: float
    ways: tuple[Way, ...]
    ok: bool

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        tried = []
        for way in self.ways:
            tried.append({"what": way.text, "bytes": way.bytes, "value": way.value})
        return {**vars(self), "folder": str(self.folder), "ways": tried}


@dataclass(frozen=True)
class Planned:
    """A step to come: what it does, the size it gives in words, seconds; ``done`` it is there."""

    what: str
    size: str
    seconds: float
    done: bool


@dataclass(frozen=True)
class Outline:
    """What a call would do; ``size`` may be shipped, ``before`` are the float32 weights."""

    folder: Path
    size: int
    before: int
    steps: tuple[Planned, ...]

    @property
    def seconds(self) -> float:
        """About how long the steps take that are not done."""
        return sum(step.seconds for step in self.steps if not step.done)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        steps = [vars(step) for step in self.steps]
        told = {**vars(self), "folder": str(self.folder), "seconds": self.seconds}
        return {**told, "steps": steps}


def compress(
    source: str,
    out: Path,
    config: CompressConfig,
    paths: DataConfig,
    options: LoadConfig,
    overwrite: bool = False,
) -> Compressed:
    """Write the best package of the checkpoint ``source`` under a size into the folder ``out``.

    What is done is kept beside it until the end: the same call goes on where one was stopped.
    With ``overwrite`` all is done anew, and replaces what an earlier call has put there.

    Raises:
        InputError: the size is out of reach, or ``out`` exists.
    """
    check_output(out, overwrite)
    steps = _steps(source, out, config, paths, options, overwrite)
    with progress.shown() as show, steps.held(), scratch(_wide(out)) as wide:
        run = _opened(source, wide, config, paths, options, show)
        found = _package(run, steps, "", run.limit)
        if found.shipped > found.size:  # what is beside the weights is known now
            taken = int(NARROWED * (found.shipped - found.ways[0].bytes))
            less = run.limit - taken + beside(shapes_of(run.model), run.folder)
            found = replace(_package(run, steps, "again-", less), size=found.size)
        labelled = None
        if found.metric != "fidelity":
            labelled = run.held_out
        result = validate(
            found.folder / "package", data=labelled, progress=lambda step: show(step, 0, 0)
        )
        _report(
            found, result, f"ffmerge compress MODEL {out.name} --size {config.size} --data DATA"
        )
        shutil.rmtree(out, ignore_errors=True)
        found.folder.rename(out)
        (out / RESULT).unlink()
        steps.remove()
    return replace(found, folder=out, ok=result.ok and found.shipped <= found.size)


def outline(
    source: str,
    out: Path,
    config: CompressConfig,
    paths: DataConfig,
    options: LoadConfig,
    overwrite: bool = False,
) -> Outline:
    """Return what the same call of :func:`compress` would do; nothing is written.

    Raises:
        InputError: the size is out of reach, or ``out`` exists.
    """
    check_output(out, overwrite)
    steps = _steps(source, out, config, paths, options, overwrite)
    with progress.shown() as show, scratch(_wide(out)) as wide:
        run = _opened(source, wide, config, paths, options, show)
        model = run.model
        batch = next(run.held_out.batches(config.batch_size))
        began = time.monotonic()
        with torch.no_grad():
            forward(model, batch)
        batches = -(-len(run.held_out) // config.batch_size)
        once = batches * (time.monotonic() - began)  # the data that chooses, through the model
        shapes = shapes_of(model)
        taken = beside(shapes, run.folder)
    check_reach(shapes, run.limit, taken)
    room, found = run.limit - taken, [("measure the original", "", once, "")]
    fits, aim = fitting(shapes, room), narrower(shapes, room)
    ways = _ways(run, room, run.limit)
    if "whole" in ways:
        size = size_text(bytes_of(model, str(fits)) + taken)
        found.append((f"measure {fits}", size, once, "whole"))
    if "mixed" in ways:
        cost = BITS_COST * once + TRACED
        found.append((f"export and measure {MIXED}", size_text(run.limit), cost, "mixed"))
    if aim is not None:
        what, cost = f"take neurons out of {aim[0]} and measure it", NARROW_COST * once + TRACED
        if aim[0] == "int4":
            what = f"take neurons out, export and measure {MIXED}"
            cost += BITS_COST * once
        found.append((what, size_text(run.limit), cost, "narrowed"))
    megabytes = bytes_of(model, "fp32") / 1e6
    found.append(("export the best", "", EXPORT_COST * megabytes + TRACED, "best"))
    found.append(("validate it", "", EXPORT_COST * megabytes + TRACED, ""))
    planned = []
    for what, size, seconds, name in found:
        done = name != "" and steps.has(name)
        planned.append(Planned(what, size, seconds, done))
    return Outline(out, run.limit, bytes_of(model, "fp32"), tuple(planned))


def _steps(
    source: str,
    out: Path,
    config: CompressConfig,
    paths: DataConfig,
    options: LoadConfig,
    overwrite: bool,
) -> Steps:
    given = {"version": __version__, **vars(config), **vars(paths), **vars(options)}
    return Steps(out, call_of(given, source, paths.data, paths.validation), overwrite)


def _wide(out: Path) -> Path:
    """Return where float32 weights of a checkpoint of 16 bits lie meanwhile."""
    return out.with_name(f".{out.name}.wide")


@dataclass(frozen=True)
class _Run:
    """What a call works with; ``open`` gives the model anew."""

    model: Any
    folder: Path
    open: Callable[[], Any]
    config: CompressConfig
    calibration: Examples
    held_out: Examples
    score: Score
    limit: int
    show: Progress
    trusted: bool


def _opened(
    source: str,
    wide: Path,
    config: CompressConfig,
    paths: DataConfig,
    options: LoadConfig,
    show: Progress,
) -> _Run:
    """Open the checkpoint and the data; float32 weights lie in the folder ``wide``."""

    def opened() -> tuple[Path, Any]:
        folder, model = open_checkpoint(source, options)
        below = wide / str(len(list(wide.iterdir())))
        below.mkdir()
        float32_(model, below)
        return folder, model

    folder, model = opened()
    task = task_of(model, config.task)
    calibration, held_out = examples_of(paths, folder, task)
    assert calibration is not None and held_out is not None  # --data was asked for
    return _Run(
        model=model,
        folder=folder,
        open=lambda: opened()[1],
        config=replace(config, task=task),
        calibration=calibration,
        held_out=held_out,
        score=score_for(model, task, held_out, config.batch_size),
        limit=parse_budget(config.size, bytes_of(model, "fp32")),
        show=show,
        trusted=options.trust_remote_code,
    )


def _package(run: _Run, steps: Steps, attempt: str, limit: int) -> Compressed:
    """Choose a way by the second half of the data, and write its package and checkpoint."""
    model, score = run.model, run.score
    run.show("measuring", 0, 0)
    before, original = bytes_of(model, "fp32"), score.measure(model)
    room = limit - _taken(run)
    found = {}
    for name, make in _ways(run, room, limit).items():
        told = steps.do(f"{attempt}{name}", make)
        if told["value"] is not None:
            found[f"{attempt}{name}"] = Way(
                told["dtype"], told["bytes"], told["value"], told["text"]
            )
    if not found:
        raise InputError("no way to the size is left: give a larger one.")
    order = sorted(found, key=lambda name: score.rank(found[name].value), reverse=True)
    best, name = order[0], f"{attempt}best"
    steps.do(name, lambda folder: _best(run, found[best], folder, steps.folder / best))
    written = Manifest.read(steps.folder / name / "package")
    files = [file for file in written.files if file.path not in _BESIDE]
    return Compressed(
        folder=steps.folder / name,
        size=limit,
        before=before,
        shipped=sum(file.bytes for file in files),
        files=tuple(file.path for file in files),
        metric=score.name,
        examples=len(run.held_out),
        original=original,
        ways=tuple(found[each] for each in order),
        ok=False,
    )


def _taken(run: _Run) -> int:
    """Return about the bytes beside the weights of the model."""
    return beside(shapes_of(run.model), run.folder)


def _ways(run: _Run, room: int, limit: int) -> dict[str, Callable[[Path], Mapping[str, Any]]]:
    """Return by the name of its step what makes and measures each way to the size.

    Where 8 bits do not fit, bits are mixed, and where 4 do not even in their widest blocks, after
    so many neurons are gone that those would fit as well. What is mixed is measured as the package
    that is shipped.

    Raises:
        InputError: no way leads there.
    """
    shapes = shapes_of(run.model)
    check_reach(shapes, limit, limit - room)
    fits, aim = fitting(shapes, room), narrower(shapes, room)
    ways: dict[str, Callable[[Path], Mapping[str, Any]]] = {}
    if takes_mixed(shapes, room):
        ways["mixed"] = partial(_mixed, run, fits, limit)
    elif fits is not None:
        ways["whole"] = partial(_whole, run, fits)
    if aim is not None:
        ways["narrowed"] = partial(_narrowed, run, *aim, limit)
    return ways


def _whole(run: _Run, dtype: str, folder: Path) -> Mapping[str, Any]:
    """Measure the model in a precision."""
    run.show("measuring", 0, 0)
    return vars(measured(run.model, dtype, run.score, dtype))


def _mixed(run: _Run, fits: str | None, limit: int, folder: Path) -> Mapping[str, Any]:
    """Write the package of 2, 4 and 8 bits of so many bytes, or else of int4 if that ``fits``."""
    told = _with_mixed_bits(run, run.model, limit, folder, MIXED)
    if told["value"] is None and fits is not None:
        shutil.rmtree(folder / "package", ignore_errors=True)
        return _as_package(run, run.model, folder, _export(run, fits), fits)
    return told


def _narrowed(run: _Run, dtype: str, kept: int, limit: int, folder: Path) -> Mapping[str, Any]:
    """Save the model narrowed to some bytes of float32, and below 8 bits its mixed package.

    No value: nothing, or too little, can be narrowed.
    """
    budget = MergeConfig(
        method="narrow",
        budget=f"{kept}B",
        task=run.config.task,
        batch_size=run.config.batch_size,
    )
    model = run.open()
    try:
        merge, merged = merging.choose(model, run.calibration, run.held_out, budget, run.show)
    except InputError:
        return NONE
    merging.apply_(model, merge, merged)
    checkpoint.save(model, folder / "checkpoint", run.folder)
    model = checkpoint.load(folder / "checkpoint", run.trusted)
    removed = merge.record.narrowed[0].text
    if dtype == "int4":
        return _with_mixed_bits(run, model, limit, folder, f"{MIXED}, {removed}")
    return vars(measured(model, dtype, run.score, f"{dtype}, {removed}"))


def _with_mixed_bits(
    run: _Run, model: Any, limit: int, folder: Path, text: str
) -> Mapping[str, Any]:
    """Write the model's package of 2, 4 and 8 bits that takes so many bytes; or no value."""
    run.show("choosing bits", 0, 0)
    export = replace(_export(run, "int4"), budget=f"{limit - companion_bytes(run.folder)}B")
    try:
        told = _as_package(run, model, folder, export, text)
    except InputError:  # so few bytes that 2 bits do not do, or data that one graph does not take
        return NONE
    written = Manifest.read(folder / "package")
    if sum(file.bytes for file in written.files if file.path not in _BESIDE) > limit:
        return NONE
    return told


def _as_package(
    run: _Run, model: Any, folder: Path, export: ExportConfig, text: str
) -> Mapping[str, Any]:
    """Write the model's package into a folder, and measure it as it is."""
    written = package.export(model, folder / "package", export, run.folder, run.calibration)
    run.show("measuring", 0, 0)
    value = run.score.measure(load_package(written.path).float())
    return vars(Way(export.dtype, written.manifest.bytes_unique, value, text))


def _report(found: Compressed, result: Validation, command: str) -> None:
    """Write the report anew, with what the original kept on the data that chose."""
    by, data = "PyTorch", "the data that chose"
    metric = MetricResult(found.metric, found.original, found.examples)
    rows = [metric_row("original", by, data, metric)]
    rows += [row for row in stages(result.manifest) if row.stage == "merged"]
    if result.metric is not None:
        rows.append(metric_row("served", result.providers[0].name, data, result.metric))
    points = [report.Point("original", found.before, found.original)]
    for way in found.ways:
        points.append(report.Point(way.text, way.bytes, way.value, way is found.ways[0]))
    also = report.Extras([command], (), points, found.metric)
    report.write_report(found.folder / "package", result, None, rows, also)


def _best(run: _Run, way: Way, folder: Path, made: Path) -> dict[str, Any]:
    """Put the package of a way into the folder, and the narrowed checkpoint if it has one."""
    model = run.model
    if (made / "checkpoint").exists():
        shutil.copytree(made / "checkpoint", folder / "checkpoint")
        model = checkpoint.load(folder / "checkpoint", run.trusted)
    if (made / "package").exists():
        shutil.copytree(made / "package", folder / "package")
        return {}
    run.show("tracing and writing", 0, 0)
    export = _export(run, way.dtype)
    package.export(model, folder / "package", export, run.folder, run.calibration)
    return {}


def _export(run: _Run, dtype: str) -> ExportConfig:
    return ExportConfig(task=run.config.task, dtype=dtype, profile=run.config.profile)
