"""Does a package keep its promises on this machine? Parity, task metric, memory, latency.

``ffmerge validate`` and ``ffmerge.validate`` are :func:`validate`: it checks the package on every
runtime that is asked for (:func:`check_package`), measures the package it was made smaller than,
and writes ``validation.json``, ``report.html`` and ``report.md`` into it. The reference is read
once; on each runtime, and at each of its optimization levels, a graph is opened once.
Nothing here needs torch.
"""

import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from ffmerge.config import ValidateConfig
from ffmerge.errors import InputError, NotInstalled, RuntimeCheckError
from ffmerge.files import read_json, write_whole
from ffmerge.models.data import Data, as_examples
from ffmerge.models.examples import Examples, from_arrays
from ffmerge.models.manifest import Manifest
from ffmerge.runtime_tests import report
from ffmerge.runtime_tests.decode import Served, check_generation
from ffmerge.runtime_tests.footprint import measure_footprint
from ffmerge.runtime_tests.locate import locate
from ffmerge.runtime_tests.metric import measure_metric, measure_texts, writes
from ffmerge.runtime_tests.parity import parity_of, refuse_without_outputs
from ffmerge.runtime_tests.reference import Reference, read_reference
from ffmerge.runtime_tests.results import (
    GIVEN,
    ROWS,
    ProviderResult,
    Validation,
    metric_row,
    model_bytes,
    sharing,
)
from ffmerge.runtime_tests.runtimes.base import Runtime
from ffmerge.runtime_tests.runtimes.registry import RUNTIMES, find_runtime
from ffmerge.runtime_tests.tolerance import for_dtype, row_of
from ffmerge.runtime_tests.translation import why_not

NAME = "validation.json"
WRITTEN = (report.REPORT, report.TEXT, NAME)
Progress = Callable[[str], None]  # is told each step as it begins


def validate(
    folder: str | Path,
    config: ValidateConfig = ValidateConfig(),
    data: Data | None = None,
    progress: Progress = lambda step: None,
) -> Validation:
    """Return what the package in ``folder`` does on this machine, and write it into the package.

    ``data`` are examples to measure the task's metric on, by default those that ``config`` names.
    Every runtime is checked at each of its optimization levels. One that is absent, falls back
    or fails is a result that is not ok, and the others still run. With ``installed`` all others
    that are installed are checked as well, and the rest is listed as not tested. ``similarity`` is
    a ``similarity.json``, whose heat maps are drawn in the report; ``against`` the package this one
    was made smaller than, whose costs stand beside its own.

    A run that fails leaves what one that held has written, and writes beside it.

    Raises:
        InputError: the package is not whole, a provider is unknown, or data cannot be read.
        RuntimeCheckError: the package ``against`` does not run.
    """
    folder = Path(folder)
    manifest, before = Manifest.read(folder), None
    stacks = _read_stacks(config.similarity)
    original = _read_original(config.against, folder, manifest)
    examples = None
    if data is None:
        data = config.data
    if data is not None:
        examples = as_examples(data, folder, manifest.task, config)
    result = check_package(folder, config, examples, progress)
    failed = not result.ok and _held_before(folder)
    name = NAME
    if failed:
        name = report.beside(NAME)
    write_validation(folder, result, name)
    if original and config.against:
        progress(f"measuring {config.against}")
        before = _costs(config.against, original, result, config.threads)
        result = replace(result, sharing=sharing(before, result))
        write_validation(folder, result, name)
    commands = [*report.made_by(manifest, folder.name), _command(folder, config, examples)]
    report.write_report(folder, result, before, None, report.Extras(commands, stacks), failed)
    if not failed:
        for each in WRITTEN:
            (folder / report.beside(each)).unlink(missing_ok=True)
    return result


def written(folder: Path, validation: Validation) -> tuple[str, ...]:
    """Return the names of the files that :func:`validate` has just written into the package."""
    failed = tuple(report.beside(each) for each in WRITTEN)
    if not validation.ok and all((folder / name).is_file() for name in failed):
        return failed
    return WRITTEN


def _held_before(folder: Path) -> bool:
    """Say whether the report that lies in the package is of a run that held."""
    try:
        found = read_json(folder / NAME)
    except InputError:
        return False
    return isinstance(found, dict) and found.get("ok") is True


def check_package(
    folder: Path,
    config: ValidateConfig = ValidateConfig(),
    examples: Examples | None = None,
    progress: Progress = lambda step: None,
) -> Validation:
    """Return what :func:`validate` finds on every runtime; this writes nothing."""
    manifest = Manifest.read(folder)
    progress("checking the files")
    manifest.check_files(folder)
    refuse_without_outputs(folder, manifest)
    names = list(config.providers)
    if config.installed:
        names += RUNTIMES
    runtimes = {name: find_runtime(name) for name in names}
    reference = read_reference(folder, manifest)
    results: list[ProviderResult] = []
    absent: dict[str, str] = {}
    for name, runtime in runtimes.items():
        for kind in kinds_on(runtime, manifest):
            result = _new(runtime, manifest, kind)
            try:
                one = manifest.of_kind(kind)
                _check_on(runtime, result, one, reference, examples, progress)
                _locate(runtime, result, one, reference)
                progress(f"measuring memory and latency on {result.label}")
                result.footprint = measure_footprint(
                    folder, name, config.threads, result.kind or "onnx"
                )
                result.device = result.footprint.device
            except NotInstalled as error:
                if name not in config.providers:
                    absent[name] = str(error)
                    continue
                result.stopped = str(error)
            except RuntimeCheckError as error:
                result.stopped = _why_stopped(error, runtime, manifest)
            results.append(result)
    why = None
    if writes(manifest):
        why = why_not(folder)
    name = f"{manifest.model_type} of {manifest.parameters:,} parameters"
    return Validation(manifest, tuple(results), absent, why, _environment(), label=name)


def kinds_on(runtime: Runtime, manifest: Manifest) -> Sequence[str]:
    """Return which graphs of a package are checked on a runtime, of several profiles or precisions.

    On ONNX Runtime's CPU all. Elsewhere, of several profiles, those for that provider, else the
    portable ones: it need not have the operators of others.
    """
    if runtime.name == "cpu" or len(manifest.profiles) == 1:
        return manifest.kinds
    own = [each for each in manifest.profiles if each in runtime.name]  # cuda-tf32, web-webgpu
    plain = [each for each in manifest.profiles if each == "portable"]
    return own or plain or manifest.profiles


def _why_stopped(error: RuntimeCheckError, runtime: Runtime, manifest: Manifest) -> str:
    """Return the message of a runtime, with the way on where the graphs are for another one."""
    meant = [each for each in manifest.profiles if each in runtime.name or each == "portable"]
    if meant:
        return str(error)
    return f"{error} Its graphs are those for {manifest.profile}: export it --for portable."


def _new(runtime: Runtime, manifest: Manifest, kind: str) -> ProviderResult:
    """Return the result of a runtime on one of the kinds of a package, before any check."""
    result = ProviderResult(
        name=runtime.name,
        requested=runtime.requested,
        arithmetic=runtime.arithmetic,
        optimization=runtime.levels,
    )
    if len(manifest.profiles) > 1:
        result.profile = kind
    elif len(manifest.dtypes) > 1:
        result.dtype = kind
    return result


def measured_again(folder: Path, validation: Validation) -> Validation:
    """Return the validation with the cost of two runs, some seconds apart.

    The faster run counts, with the 95th percentile of the slower: what another process took from
    one of them shows as noise and not as a change.
    """
    results = []
    for result in validation.providers:
        if result.footprint:
            runs = [
                result.footprint,
                measure_footprint(folder, result.name, kind=result.kind or "onnx"),
            ]
            fastest = min(runs, key=lambda run: run.median_ms)
            slowest = max(run.p95_ms for run in runs)
            result = replace(result, footprint=replace(fastest, p95_ms=slowest))
        results.append(result)
    return replace(validation, providers=tuple(results))


def _check_on(
    runtime: Runtime,
    result: ProviderResult,
    manifest: Manifest,
    reference: Reference,
    examples: Examples | None,
    progress: Progress,
) -> None:
    """Fill in what is found on one runtime: at each level, each graph is opened once."""
    tolerance = for_dtype(row_of(manifest), runtime.arithmetic)
    together = manifest.served()
    for level in runtime.levels:
        progress(f"comparing with PyTorch on {result.label}, optimization {level}")
        sessions = {}
        for graph in manifest.graphs:
            session = runtime.open(reference.folder / graph.path, level)
            result.outputs += parity_of(graph, session, reference, level, tolerance)
            result.used = runtime.requested  # open lets no other one through
            if graph.path in together:
                sessions[graph.path] = session
        served = [(graph, sessions[path]) for path, graph in together.items()]
        if stored := reference.greedy():
            result.generation.append(check_generation(served, stored, level, tolerance))
    # the last level is the one that serves
    _measure(result, served, manifest, reference, examples)


def _measure(
    result: ProviderResult,
    served: Served,
    manifest: Manifest,
    reference: Reference,
    examples: Examples | None,
) -> None:
    """Fill in the task metric, and what is measured of written texts, on the data there are."""
    data = {GIVEN: examples}
    if manifest.metric:
        rows = from_arrays(reference.labelled(manifest))
        data = {ROWS: rows, GIVEN: examples}
        result.sample = measure_metric(served, manifest, rows)
    if examples:
        result.metric = measure_metric(served, manifest, examples)
    if not writes(manifest) or why_not(reference.folder):
        return
    for which, rows_there in data.items():
        if rows_there and (chrf := measure_texts(reference.folder, served, rows_there)):
            result.texts.append(metric_row(result.kind or manifest.dtype, result.name, which, chrf))


def _locate(
    runtime: Runtime,
    result: ProviderResult,
    manifest: Manifest,
    reference: Reference,
) -> None:
    """Fill in where the graphs leave PyTorch that have an output which is off.

    Also if only elements are that are spared: they are where no node is off.
    """
    bound = for_dtype(row_of(manifest), runtime.arithmetic).node
    for graph in manifest.graphs:
        own = [output for output in result.outputs if output.graph == graph.path]
        wrong = [output for output in own if not output.ok] or [o for o in own if o.out]
        failed = next(iter(wrong), None)
        if failed:
            case = None
            if failed.worst:
                case = failed.worst.case
            found = locate(graph, reference, runtime, failed.optimization, bound, case)
            if found:
                result.divergences.append(found)


def write_validation(folder: Path, validation: Validation, name: str = NAME) -> Path:
    """Write ``validation.json`` into the package, whole or not at all; return its path."""
    text = json.dumps(validation.to_json(), indent=2, ensure_ascii=False, allow_nan=False)
    return write_whole(folder / name, f"{text}\n".encode())


def _read_stacks(path: Path | None) -> Sequence[Mapping[str, Any]]:
    """Return the stacks in a ``similarity.json``."""
    if path is None:
        return ()
    found = read_json(path)
    if not isinstance(found, dict) or "stacks" not in found:
        raise InputError(f"{path} is not what ffmerge similarity --out writes.")
    stacks: Sequence[Mapping[str, Any]] = found["stacks"]
    return stacks


def _read_original(path: Path | None, folder: Path, manifest: Manifest) -> Manifest | None:
    """Return the manifest of the package that this one was made smaller than."""
    if path is None:
        return None
    original = Manifest.read(path)
    if model_bytes(original) <= model_bytes(manifest):
        raise InputError(f"--against {path} is not larger than {folder}: nothing was removed.")
    return original


def _costs(folder: Path, manifest: Manifest, beside: Validation, threads: int) -> Validation:
    """Return what another package costs, where ``beside`` ran first; if nowhere, only its size."""
    label, results = folder.resolve().name, list[ProviderResult]()
    for result in beside.providers:
        if result.footprint and not results:
            cost = measure_footprint(folder, result.name, threads)
            results.append(ProviderResult(result.name, result.requested, footprint=cost))
    return Validation(manifest, tuple(results), label=label)


def _command(folder: Path, config: ValidateConfig, examples: Examples | None) -> str:
    """Return the command that validates the package like this."""
    command = f"ffmerge validate {folder.name}"
    for name in config.providers:
        command += f" --provider {name}"
    command += " --all" * config.installed + " --data DATA" * (examples is not None)
    if config.against:
        command += f" --against {config.against.resolve().name}"
    return command


def _environment() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "onnxruntime": ort.__version__,
        "numpy": np.__version__,
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": _processor(),
        "processors": os.cpu_count(),
    }


def _processor() -> str:
    """Return the processor's model name; Linux leaves it out of ``platform.processor``."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
