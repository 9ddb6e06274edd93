"""From a checkpoint to a validated package under a size, in one call.

``ffmerge compress`` calls :func:`compress`, which opens the model, measures the ways to the size on
data (``passes/weights/target.py``), exports the best one and validates it. Where 8 bits do not fit,
a package of mixed bits is one more way, measured as it is. The new folder appears whole:
``package`` is what is shipped, ``checkpoint`` the narrowed model in PyTorch, if it was.
"""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ffmerge import progress
from ffmerge.commands import examples_of, open_checkpoint
from ffmerge.config import (
    CompressConfig,
    DataConfig,
    ExportConfig,
    LoadConfig,
    MergeConfig,
    parse_budget,
)
from ffmerge.errors import InputError
from ffmerge.exporter import package
from ffmerge.exporter.graphs import graphs
from ffmerge.exporter.package import Package
from ffmerge.files import refuse_existing, scratch, staged
from ffmerge.models import checkpoint
from ffmerge.models.companions import copy_companions
from ffmerge.models.examples import Examples
from ffmerge.models.float32 import float32_
from ffmerge.models.manifest import REFERENCE, FileRecord
from ffmerge.models.tasks import task_of
from ffmerge.passes.weights import merge as merging
from ffmerge.passes.weights.evaluate import score_for
from ffmerge.passes.weights.merge import Merge
from ffmerge.passes.weights.methods import Merged
from ffmerge.passes.weights.precision import bytes_of
from ffmerge.passes.weights.target import Way, ways
from ffmerge.progress import Progress
from ffmerge.runtime_tests.validate import validate
from ffmerge.serving import load_package

GRAPH = 1_500  # bytes of a graph for each weight: measured 400 (an encoder) to 1,220 (a Llama)
NARROWED = 1.15  # what the graph of a narrowed model takes, of the original's: measured 1.11
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


def compress(
    source: str, out: Path, config: CompressConfig, paths: DataConfig, options: LoadConfig
) -> Compressed:
    """Write the best package of the checkpoint ``source`` under a size into the new folder ``out``.

    Raises:
        InputError: the size is out of reach, or ``out`` exists.
    """
    refuse_existing(out)
    with progress.shown() as show, scratch(out) as wide, staged(out) as target:
        folder, model = open_checkpoint(source, options)
        float32_(model, wide)
        task = task_of(model, config.task)
        calibration, held_out = examples_of(paths, folder, task)
        assert calibration is not None and held_out is not None  # --data was asked for
        config, data = replace(config, task=task), (calibration, held_out)
        found = _package(model, folder, target, config, data, show)
        if found.shipped > found.size:  # what is beside the weights is known now
            beside = int(NARROWED * (found.shipped - found.ways[0].bytes))
            less = replace(config, size=f"{found.size - beside + _beside(model, folder)}B")
            for path in target.iterdir():
                shutil.rmtree(path)
            folder, model = open_checkpoint(source, options)
            (wide / "again").mkdir()
            float32_(model, wide / "again")
            again = _package(model, folder, target, less, data, show)
            found = replace(again, size=found.size)
        labelled = None
        if found.metric != "fidelity":
            labelled = held_out
        package_folder = target / "package"
        result = validate(package_folder, data=labelled, progress=lambda step: show(step, 0, 0))
    return replace(found, folder=out, ok=result.ok and found.shipped <= found.size)


def _package(
    model: Any,
    folder: Path,
    target: Path,
    config: CompressConfig,
    data: tuple[Examples, Examples],
    show: Progress,
) -> Compressed:
    """Choose a way by the second half of the data, and write its package and checkpoint."""
    calibration, held_out = data
    before = bytes_of(model, "fp32")
    limit = parse_budget(config.size, before)
    score = score_for(model, str(config.task), held_out, config.batch_size)
    show("measuring", 0, 0)
    original = score.measure(model)

    def narrower(kept: int) -> tuple[Merge, Merged]:
        budget = MergeConfig(
            method="narrow", budget=f"{kept}B", task=config.task, batch_size=config.batch_size
        )
        return merging.choose(model, calibration, held_out, budget, show)

    found = ways(model, limit, _beside(model, folder), score, narrower)
    written = None
    if not any(way.merge is None and way.dtype in ("fp32", "int8") for way in found):
        written = _mixed(model, folder, target, config, (limit, calibration), show)
    if written is not None:
        show("measuring", 0, 0)
        value = score.measure(load_package(written.path).float())
        found.append(Way("int4", written.manifest.bytes_unique, value, mixed=True))
        found.sort(key=lambda way: score.rank(way.value), reverse=True)
    best = found[0]
    if written is None or not best.mixed:
        shutil.rmtree(target / "package", ignore_errors=True)
        if best.merge is not None and best.merged is not None:
            merging.apply_(model, best.merge, best.merged)
            checkpoint.save(model, target / "checkpoint", folder)
        show("tracing and writing", 0, 0)
        export = ExportConfig(task=config.task, dtype=best.dtype)
        written = package.export(model, target / "package", export, folder, calibration)
    return Compressed(
        folder=target,
        size=limit,
        before=before,
        shipped=sum(file.bytes for file in _shipped(written)),
        files=tuple(file.path for file in _shipped(written)),
        metric=score.name,
        examples=len(held_out),
        original=original,
        ways=tuple(found),
        ok=False,
    )


def _mixed(
    model: Any,
    folder: Path,
    target: Path,
    config: CompressConfig,
    given: tuple[int, Examples],
    show: Progress,
) -> Package | None:
    """Write the package of 2, 4 and 8 bits by data that takes ``given`` bytes; None: none does."""
    limit, calibration = given
    if len(graphs(model, str(config.task))) > 1:  # bits are chosen for a single graph
        return None
    show("choosing bits", 0, 0)
    export = ExportConfig(task=config.task, dtype="int4", budget=f"{limit - _companions(folder)}B")
    try:
        written = package.export(model, target / "package", export, folder, calibration)
    except InputError:  # so few bytes that 2 bits do not do, or data that one graph does not take
        return None
    if sum(file.bytes for file in _shipped(written)) > limit:
        return None
    return written


def _shipped(written: Package) -> list[FileRecord]:
    """Return the files of a package that a runtime reads."""
    return [file for file in written.manifest.files if file.path not in _BESIDE]


def _beside(model: Any, folder: Path) -> int:
    """Return the bytes of what is shipped beside weights: tokenizer and such, and the graph."""
    count = sum(1 for _ in model.parameters())
    return _companions(folder) + GRAPH * (count + 10)


def _companions(folder: Path) -> int:
    """Return the bytes of the small files that travel: tokenizer, processor, configuration."""
    with TemporaryDirectory() as copied:
        copy_companions(folder, Path(copied))
        files = [path for path in Path(copied).rglob("*") if path.is_file()]
        return sum(path.stat().st_size for path in files)
