"""From a checkpoint to a validated package under a size, in one call.

``ffmerge compress`` calls :func:`compress`, which opens the model, measures the ways to the size on
data (``ways.py``), exports the best one and validates it. The work is done in steps that are kept
(``steps.py``). The new folder appears whole: ``package`` is what is shipped, ``checkpoint`` the
narrowed model in PyTorch, if it was.
"""

import shutil
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
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
    parse_budget,
)
from ffmerge.early import check_output
from ffmerge.errors import InputError
from ffmerge.exporter import package
from ffmerge.exporter.plan import make_plan
from ffmerge.files import scratch, size_text
from ffmerge.models import checkpoint
from ffmerge.models.float32 import float32_
from ffmerge.models.inputs import forward
from ffmerge.models.manifest import Manifest, MetricResult
from ffmerge.models.record import kind_of
from ffmerge.models.sizes import beside, check_reach, fitting, narrower
from ffmerge.models.tasks import task_of
from ffmerge.passes.weights.evaluate import score_for
from ffmerge.passes.weights.precision import bytes_of, shapes_of
from ffmerge.profiles import DEFAULT
from ffmerge.progress import Progress, announce
from ffmerge.runtime_tests import report
from ffmerge.runtime_tests.results import Validation, metric_row, stages
from ffmerge.runtime_tests.validate import validate
from ffmerge.steps import RESULT, Steps, call_of
from ffmerge.ways import BESIDE, MIXED, Run, Way, dtypes_for, export_config, ways_to

NARROWED = 1.15  # what the graph of a narrowed model takes, of the original's: measured 1.11
# Seconds of a step: so many times those of the data through the model once, and so many for tracing
# and for what is measured in a process of its own.
BITS_COST, NARROW_COST, EXPORT_COST = 8.0, 15.0, 0.15
AS_LONG = 150  # steps of training that take about as long as to take neurons out
TRACED = 4.0


@dataclass(frozen=True)
class Compressed:
    """What was shipped: the folder, its files for a runtime, the way there and the others.

    ``given`` says what the model was, ``original`` or, by an earlier merge, ``merged`` or
    ``narrowed``: ``before`` are the bytes of its weights in float32 and ``original`` its metric,
    and to its outputs fidelity is measured. ``shipped`` are the bytes of the files, ``ok`` whether
    the package holds and fits; where it does not hold, ``failed`` says why. The first of ``ways``
    is what is shipped.
    """

    folder: Path
    size: int
    before: int
    shipped: int
    files: tuple[str, ...]
    given: str
    metric: str
    examples: int
    original: float
    ways: tuple[Way, ...]
    failed: tuple[str, ...]
    ok: bool

    @property
    def measured(self) -> str:
        """The metric, of fidelity to what it is where that is no original."""
        if self.metric == "fidelity" and self.given != "original":
            return f"fidelity to the {self.given} model"
        return self.metric

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
        show("measuring", 0, 0)
        original = run.score.measure(run.model)
        ways = _measured(run, steps, "", beside(shapes_of(run.model), run.folder))
        found = _package(run, steps, ways, original)
        if found.shipped > found.size:  # what is beside the weights is known now
            taken = int(NARROWED * (found.shipped - found.ways[0].bytes))
            ways = _measured(run, steps, "again-", taken)
            found = _package(run, steps, ways, original, "again-best")
        found, result = _held(run, steps, ways, found)
        _report(found, result, _command(out.name, config, paths))
        shutil.rmtree(out, ignore_errors=True)
        found.folder.rename(out)
        (out / RESULT).unlink()
        steps.remove()
    ok = result.ok and found.shipped <= found.size
    return replace(found, folder=out, failed=_wrong(result), ok=ok)


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
        shapes = shapes_of(model, run.rows)
        taken = beside(shapes, run.folder)
    check_reach(shapes, run.limit, taken)
    room, found = run.limit - taken, [("measure the model as given", "", once, "")]
    dtypes = dtypes_for(config)
    fits, aim = fitting(shapes, room, dtypes), narrower(shapes, room, dtypes)
    ways = ways_to(run, room)
    found += _precisions(run, ways, str(fits), taken, once)
    if "mixed" in ways:
        cost = BITS_COST * once + TRACED
        found.append((f"export and measure {MIXED}", size_text(run.limit), cost, "mixed"))
    narrowings = [name for name in ways if name.startswith("narrowed")]
    for number, name in enumerate(narrowings, 1):
        assert aim is not None
        what = f"take neurons out of {aim[0]} and measure it"
        cost = NARROW_COST * once * (1 + config.tune / AS_LONG) + TRACED
        if aim[0] == "int4":
            what = f"take neurons out, export and measure {MIXED}"
            cost += BITS_COST * once
        if len(narrowings) > 1:
            what += f": {number} of {len(narrowings)}"
        found.append((what, size_text(run.limit), cost, name))
    megabytes = bytes_of(model, "fp32") / 1e6
    found.append(("export the best", "", EXPORT_COST * megabytes + TRACED, "best"))
    found.append(("validate it", "", EXPORT_COST * megabytes + TRACED, ""))
    planned = []
    for what, size, seconds, name in found:
        done = name != "" and steps.has(name)
        planned.append(Planned(what, size, seconds, done))
    return Outline(out, run.limit, bytes_of(model, "fp32"), tuple(planned))


def _precisions(
    run: Run, ways: Collection[str], fits: str, taken: int, once: float
) -> list[tuple[str, str, float, str]]:
    """Return the steps that measure the model in a precision: what, its size, seconds and name."""
    found = []
    for name, dtype in (("whole", fits), ("int8", "int8")):
        if name in ways:
            size = size_text(bytes_of(run.model, dtype, run.rows) + taken)
            found.append((f"measure {dtype}", size, once, name))
    return found


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


def _opened(
    source: str,
    wide: Path,
    config: CompressConfig,
    paths: DataConfig,
    options: LoadConfig,
    show: Progress,
) -> Run:
    """Open the checkpoint and the data; float32 weights lie in the folder ``wide``.

    Raises:
        InputError: nothing can be exported of the model for the task, or data cannot be read.
    """

    def opened() -> tuple[Path, Any]:
        folder, model = open_checkpoint(source, options)
        below = wide / str(len(list(wide.iterdir())))
        below.mkdir()
        float32_(model, below)
        return folder, model

    folder, model = opened()
    task = task_of(model, config.task)
    make_plan(model, ExportConfig(task=task, profile=config.profile), folder, None)
    calibration, held_out = examples_of(paths, folder, task)
    assert calibration is not None and held_out is not None  # --data was asked for
    return Run(
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


def _measured(run: Run, steps: Steps, attempt: str, taken: int) -> dict[str, Way]:
    """Return the ways to the size by the names of their steps, the best by the data first.

    About ``taken`` bytes of it are not for weights.

    Raises:
        InputError: no way leads there.
    """
    found = {}
    for name, make in ways_to(run, run.limit - taken).items():
        told = steps.do(f"{attempt}{name}", make)
        if told["value"] is not None:
            found[f"{attempt}{name}"] = Way(
                told["dtype"], told["bytes"], told["value"], told["text"]
            )
    if not found:
        raise InputError("no way to the size is left: give a larger one.")
    order = sorted(found, key=lambda name: run.score.rank(found[name].value), reverse=True)
    return {name: found[name] for name in order}


def _package(
    run: Run, steps: Steps, ways: Mapping[str, Way], original: float, step: str = "best"
) -> Compressed:
    """Write the package and checkpoint of the first way, as a step of its own."""
    best = next(iter(ways))
    steps.do(step, lambda folder: _best(run, ways[best], folder, steps.folder / best))
    written = Manifest.read(steps.folder / step / "package")
    files = [file for file in written.files if file.path not in BESIDE]
    return Compressed(
        folder=steps.folder / step,
        size=run.limit,
        before=bytes_of(run.model, "fp32"),
        shipped=sum(file.bytes for file in files),
        files=tuple(file.path for file in files),
        given=kind_of(run.model.config),
        metric=run.score.name,
        examples=len(run.held_out),
        original=original,
        ways=tuple(ways.values()),
        failed=(),
        ok=False,
    )


def _held(
    run: Run, steps: Steps, ways: Mapping[str, Way], found: Compressed
) -> tuple[Compressed, Validation]:
    """Return the package of the best way that holds and fits; if none does, of the best."""
    first = now = found, _validated(run, found)
    for name in [*ways][1:]:
        wrong = _unfit(*now)
        if wrong is None:
            return now
        announce(f"{now[0].ways[0].text} {wrong}; {ways[name].text} is tried instead")
        order = {name: ways[name], **ways}
        other = _package(run, steps, order, found.original, f"{name}-shipped")
        now = other, _validated(run, other)
    wrong = _unfit(*now)
    if wrong is None or now is first:
        return now
    announce(
        f"{now[0].ways[0].text} {wrong}; {found.ways[0].text} is shipped, the best by the data"
    )
    return first


def _unfit(found: Compressed, result: Validation) -> str | None:
    """Return what is wrong with a package, None if it holds and fits."""
    if not result.ok:
        return f"does not hold against PyTorch: {_wrong(result)[0].partition(';')[0]}"
    if found.shipped > found.size:
        return f"takes {size_text(found.shipped)}, more than the size"
    return None


def _wrong(result: Validation) -> tuple[str, ...]:
    """Return what of a package does not hold."""
    return tuple(each.reason for each in result.providers if each.reason)


def _validated(run: Run, found: Compressed) -> Validation:
    """Hold the package against PyTorch, and where there is a metric measure it."""
    labelled = None
    if found.metric != "fidelity":
        labelled = run.held_out
    return validate(
        found.folder / "package", data=labelled, progress=lambda step: run.show(step, 0, 0)
    )


def _command(name: str, config: CompressConfig, paths: DataConfig) -> str:
    """Return the command that writes such a folder, with what was given of its options."""
    command = f"ffmerge compress MODEL {name} --size {config.size} --data DATA"
    if paths.validation:
        command += " --validation OTHER"
    if config.task:
        command += f" --task {config.task}"
    if config.profile != DEFAULT:
        command += f" --for {config.profile}"
    if config.tune:
        command += f" --tune {config.tune}"
    return command


def _report(found: Compressed, result: Validation, command: str) -> None:
    """Write the report anew, with what the model that was given has on the data that chose."""
    by, data = "PyTorch", "the data that chose"
    metric = MetricResult(found.measured, found.original, found.examples)
    rows = [metric_row(found.given, by, data, metric)]
    merge = result.manifest.merge
    if merge and (found.folder / "checkpoint").exists():  # it was narrowed now
        rows += [row for row in stages(result.manifest) if row.stage == merge.stages[1]]
    if result.metric is not None:
        rows.append(metric_row("served", result.providers[0].name, data, result.metric))
    points = [report.Point(found.given, found.before, found.original)]
    for way in found.ways:
        points.append(report.Point(way.text, way.bytes, way.value, way is found.ways[0]))
    also = report.Extras([command], (), points, found.measured)
    report.write_report(found.folder / "package", result, None, rows, also)


def _best(run: Run, way: Way, folder: Path, made: Path) -> dict[str, Any]:
    """Put the package of a way into the folder, and the narrowed checkpoint if it has one."""
    model = run.model
    if (made / "checkpoint").exists():
        shutil.copytree(made / "checkpoint", folder / "checkpoint")
        model = checkpoint.load(folder / "checkpoint", run.trusted)
    if (made / "package").exists():
        shutil.copytree(made / "package", folder / "package")
        return {}
    run.show("tracing and writing", 0, 0)
    export = export_config(run, way.dtype)
    package.export(model, folder / "package", export, run.folder, run.calibration)
    return {}
