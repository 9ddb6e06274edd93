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
from ffmerge.exporter.graphs import graphs
from ffmerge.files import scratch, size_text
from ffmerge.models import checkpoint
from ffmerge.models.companions import companion_bytes
from ffmerge.models.examples import Examples
from ffmerge.models.float32 import float32_
from ffmerge.models.inputs import forward
from ffmerge.models.manifest import REFERENCE, Manifest
from ffmerge.models.sizes import beside, check_reach, fitting, narrower
from ffmerge.models.tasks import task_of
from ffmerge.passes.weights import merge as merging
from ffmerge.passes.weights.evaluate import Score, score_for
from ffmerge.passes.weights.precision import bytes_of, shapes_of
from ffmerge.passes.weights.target import (
    Way,
    measured,
    takes_mixed,
    whole,
)
from ffmerge.progress import Progress
from ffmerge.runtime_tests.validate import validate
from ffmerge.serving import load_package
from ffmerge.steps import RESULT, Steps, call_of

NARROWED = 1.15  # what the graph of a narrowed model takes, of the original's: measured 1.11
MIXED = "2, 4 and 8 bits by data"
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
    with progress.shown() as show, scratch(_wide(out)) as wide:
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
    if fits is not None:
        size = size_text(bytes_of(model, fits) + taken)
        found.append((f"measure {fits}", size, once, ""))
    if takes_mixed(shapes, room) and len(graphs(model, str(run.config.task))) == 1:
        cost = BITS_COST * once + TRACED
        found.append((f"export and measure {MIXED}", size_text(run.limit), cost, "mixed"))
    if aim is not None:
        what = f"take neurons out of {aim[0]} and measure it"
        found.append((what, size_text(run.limit), NARROW_COST * once + TRACED, "narrowed"))
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
    shapes = shapes_of(model)
    taken = beside(shapes, run.folder)
    check_reach(shapes, limit, taken)
    room = limit - taken
    found = whole(model, room, score)
    aim = narrower(shapes, room)
    mixed, narrow = steps.folder / f"{attempt}mixed", steps.folder / f"{attempt}narrowed"
    if takes_mixed(shapes, room):
        told = steps.do(mixed.name, lambda folder: _mixed(run, folder, limit))
        found += _told(told)
    if aim is not None:
        needed = not found
        told = steps.do(narrow.name, lambda folder: _narrowed(run, folder, aim, needed))
        found += _told(told)
    found.sort(key=lambda way: score.rank(way.value), reverse=True)
    name = f"{attempt}best"
    steps.do(name, lambda folder: _best(run, found[0], folder, mixed, narrow))
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
        ways=tuple(found),
        ok=False,
    )


def _told(step: Mapping[str, Any]) -> list[Way]:
    """Return the way that a step has found, if it has."""
    if step["value"] is None:
        return []
    return [Way(step["dtype"], step["bytes"], step["value"], step["text"])]


def _mixed(run: _Run, folder: Path, limit: int) -> dict[str, Any]:
    """Write the package of 2, 4 and 8 bits that takes so many bytes; no value: there is none."""
    none = {"value": None}
    if len(graphs(run.model, str(run.config.task))) > 1:  # bits are chosen for a single graph
        return none
    run.show("choosing bits", 0, 0)
    budget = f"{limit - companion_bytes(run.folder)}B"
    export = replace(_export(run, "int4"), budget=budget)
    try:
        written = package.export(run.model, folder / "package", export, run.folder, run.calibration)
    except InputError:  # so few bytes that 2 bits do not do, or data that one graph does not take
        return none
    if sum(file.bytes for file in written.manifest.files if file.path not in _BESIDE) > limit:
        return none
    run.show("measuring", 0, 0)
    value = run.score.measure(load_package(written.path).float())
    return vars(Way("int4", written.manifest.bytes_unique, value, MIXED))


def _narrowed(run: _Run, folder: Path, aim: tuple[str, int], needed: bool) -> dict[str, Any]:
    """Save the model narrowed to some bytes of float32; no value: it cannot be."""
    dtype, kept = aim
    budget = MergeConfig(
        method="narrow",
        budget=f"{kept}B",
        task=run.config.task,
        batch_size=run.config.batch_size,
    )
    model = run.open()
    try:
        merge, merged = merging.choose(model, run.calibration, run.held_out, budget, run.show)
    except InputError:  # nothing, or too little, can be narrowed
        if needed:
            raise
        return {"value": None}
    merging.apply_(model, merge, merged)
    checkpoint.save(model, folder / "checkpoint", run.folder)
    return vars(measured(model, dtype, run.score, f"{dtype}, {merge.record.narrowed[0].text}"))


def _best(run: _Run, way: Way, folder: Path, mixed: Path, narrow: Path) -> dict[str, Any]:
    """Put the package of a way into the folder, and the narrowed checkpoint if it has one."""
    if way.text == MIXED:
        shutil.copytree(mixed / "package", folder / "package")
        return {}
    run.show("tracing and writing", 0, 0)
    model = run.model
    if way.text != way.dtype:
        shutil.copytree(narrow / "checkpoint", folder / "checkpoint")
        model = checkpoint.load(folder / "checkpoint", run.trusted)
    export = _export(run, way.dtype)
    package.export(model, folder / "package", export, run.folder, run.calibration)
    return {}


def _export(run: _Run, dtype: str) -> ExportConfig:
    return ExportConfig(task=run.config.task, dtype=dtype, profile=run.config.profile)
