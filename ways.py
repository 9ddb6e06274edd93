"""The ways in which a model can be shipped under a size, each made and measured.

``compress.py`` measures these against each other and takes the best. A way is a precision of the
package, or bits that are mixed by data, and where those do not fit, fewer hidden neurons
(``narrow.py``). Of the precisions that fit as they are only the highest is a way
(``sizes.fitting``): a lower one loses more. The next higher one, narrowed until it fits
(``sizes.narrower``), may be better. Weights are rounded as in a package (``precision.py``); what is
mixed by data is measured as a package.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from ffmerge.config import CompressConfig, ExportConfig, MergeConfig
from ffmerge.errors import InputError
from ffmerge.exporter import package
from ffmerge.files import size_text
from ffmerge.models import checkpoint
from ffmerge.models.companions import companion_bytes
from ffmerge.models.examples import Examples
from ffmerge.models.manifest import REFERENCE, Manifest
from ffmerge.models.record import Narrowed, kind_of
from ffmerge.models.sizes import DTYPES, ON_GPU, check_reach, fitting, narrower
from ffmerge.models.ties import Unit
from ffmerge.passes.weights import merge as merging
from ffmerge.passes.weights.elimination import Matrix
from ffmerge.passes.weights.evaluate import Score
from ffmerge.passes.weights.precision import bytes_of, rounded, shapes_of
from ffmerge.profiles import profile_of
from ffmerge.progress import Progress, announce
from ffmerge.serving import load_package

MIXED = "2, 4 and 8 bits by data"
PLAIN = ("fp32", "fp16", "int8")  # where one of these fits, bits are not mixed
BESIDE = (REFERENCE, "README.md")  # what a runtime does not read
NONE: Mapping[str, Any] = {"value": None}  # a way that does not lead there
Make = Callable[[Path], Mapping[str, Any]]  # makes and measures a way, given its folder


@dataclass(frozen=True)
class Way:
    """A precision, its bytes and metric, and in words what is done to the model."""

    dtype: str
    bytes: int
    value: float
    text: str


@dataclass(frozen=True)
class Run:
    """What a call works with; ``open`` gives the model anew, ``costs`` are those of its widths."""

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
    costs: dict[Unit, Matrix] = field(default_factory=dict)

    @property
    def rows(self) -> bool:
        """Whether int8 multiplies rows where the package is to run."""
        return profile_of(self.config.profile).rows


def ways_to(run: Run, room: int) -> dict[str, Make]:
    """Return by the name of its step what makes and measures each way to the size.

    ``room`` are the bytes of it that weights may take; what is mixed is made to fit as a package.
    Where 8 bits do not fit, bits are mixed, and where 4 do not even in their widest blocks, after
    so many neurons are gone that those would fit as well, or a few more or less. What is mixed is
    measured as the package that is shipped.

    Raises:
        InputError: no way leads there.
    """
    shapes = shapes_of(run.model, run.rows)
    check_reach(shapes, run.limit, run.limit - room)
    dtypes = dtypes_for(run.config)
    fits, aim = fitting(shapes, room, dtypes), narrower(shapes, room, dtypes)
    found: dict[str, Make] = {}
    if fits not in PLAIN:
        found["mixed"] = partial(_mixed, run, fits)
    elif fits is not None:
        found["whole"] = partial(_whole, run, fits)
    if fits == "fp16":  # its bounds are tighter: int8 is shipped if it does not hold
        found["int8"] = partial(_whole, run, "int8")
    if fits == "int8" and fitting(shapes, room, ON_GPU) == "fp16":
        announce(
            "float16 fits as well and keeps more, but most processors are slower in it: "
            "for it ffmerge export MODEL OUT --dtype fp16"
        )
    if aim is not None and kind_of(run.model.config) == "narrowed":
        announce("the model is narrowed already: no more neurons are taken out of it")
    elif aim is not None:
        dtype, tries = aim
        for number, kept in enumerate(tries, 1):
            found[f"narrowed-{number}"] = partial(_narrowed, run, dtype, kept)
    return found


def dtypes_for(config: CompressConfig) -> tuple[str, ...]:
    """Return the precisions that are tried, the highest first: fp16 where a GPU is to run it."""
    if profile_of(config.profile).half_cache:
        return ON_GPU
    return DTYPES


def _whole(run: Run, dtype: str, folder: Path) -> Mapping[str, Any]:
    """Measure the model in a precision."""
    run.show("measuring", 0, 0)
    return vars(_measured(run, run.model, dtype, dtype))


def _mixed(run: Run, fits: str | None, folder: Path) -> Mapping[str, Any]:
    """Write the package of 2, 4 and 8 bits of so many bytes, or else of int4 if that ``fits``."""
    told = _with_mixed_bits(run, run.model, folder, MIXED)
    if told["value"] is None and fits is not None:
        shutil.rmtree(folder / "package", ignore_errors=True)
        return _as_package(run, run.model, folder, export_config(run, fits), fits)
    return told


def _narrowed(run: Run, dtype: str, kept: int, folder: Path) -> Mapping[str, Any]:
    """Save the model narrowed to some bytes of float32, and below 8 bits its mixed package.

    No value: nothing, or too little, can be narrowed.
    """
    budget = MergeConfig(
        method="narrow",
        budget=f"{kept}B",
        task=run.config.task,
        batch_size=run.config.batch_size,
        tune=run.config.tune,
    )
    try:
        merge, merged = merging.choose(
            run.model, run.calibration, run.held_out, budget, run.show, run.costs
        )
    except InputError as error:
        announce(f"no neurons are taken out: {error}")
        return NONE
    model = run.open()  # only now: a search holds one model
    merging.apply_(model, merge, merged)
    del merged
    checkpoint.save(model, folder / "checkpoint", run.folder)
    model = checkpoint.load(folder / "checkpoint", run.trusted)
    removed = _removed(merge.record.narrowed)
    if dtype == "int4":
        gone = 1 - merge.record.parameters_after / merge.record.parameters_before
        removed = f"narrowed by {100 * gone:.0f} %: {removed}"  # tells two tries apart
        return _with_mixed_bits(run, model, folder, f"{MIXED}, {removed}")
    return vars(_measured(run, model, dtype, f"{dtype}, {removed}"))


def _removed(narrowed: Sequence[Narrowed]) -> str:
    """Return how many neurons are left, by stack where there are several."""
    if len(narrowed) == 1:
        return narrowed[0].text
    return "; ".join(f"{each.stack} {each.text}" for each in narrowed)


def _with_mixed_bits(run: Run, model: Any, folder: Path, text: str) -> Mapping[str, Any]:
    """Write the model's package of 2, 4 and 8 bits that has the size; or no value."""
    run.show("choosing bits", 0, 0)
    limit = run.limit
    export = replace(export_config(run, "int4"), budget=f"{limit - companion_bytes(run.folder)}B")
    try:
        told = _as_package(run, model, folder, export, text)
    except InputError as error:  # 2 bits do not do, or one graph does not take the data
        announce(f"no {text}: {error}")
        return NONE
    written = Manifest.read(folder / "package")
    taken = sum(file.bytes for file in written.files if file.path not in BESIDE)
    if taken > limit:
        announce(f"no {text}: its files take {size_text(taken)}")
        return NONE
    return told


def _as_package(
    run: Run, model: Any, folder: Path, export: ExportConfig, text: str
) -> Mapping[str, Any]:
    """Write the model's package into a folder, and measure it as it is."""
    written = package.export(model, folder / "package", export, run.folder, run.calibration)
    run.show("measuring", 0, 0)
    value = run.score.measure(load_package(written.path).float())
    return vars(Way(export.dtypes[0], written.manifest.bytes_unique, value, text))


def export_config(run: Run, dtype: str) -> ExportConfig:
    return ExportConfig(task=run.config.task, dtype=dtype, profile=run.config.profile)


def _measured(run: Run, model: Any, dtype: str, text: str) -> Way:
    """Return a way by what the model as it is keeps in a precision."""
    if dtype == "fp32":
        value = run.score.measure(model)
    else:
        with rounded(model, dtype, run.rows):
            value = run.score.measure(model)
    return Way(dtype, bytes_of(model, dtype, run.rows), value, text)
