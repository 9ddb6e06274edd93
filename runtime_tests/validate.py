"""Does a package keep its promises on this machine? Parity, task metric, memory, latency."""

import json
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from ffmerge.errors import NotInstalled, RuntimeCheckError
from ffmerge.files import plain, write_whole
from ffmerge.models.data import Data, as_examples
from ffmerge.models.examples import from_arrays
from ffmerge.models.manifest import Manifest, MetricResult
from ffmerge.runtime_tests.footprint import Footprint, measure_footprint
from ffmerge.runtime_tests.locate import Divergence
from ffmerge.runtime_tests.metric import (
    GIVEN,
    OWN,
    Examples,
    MetricRow,
    measure_metric,
    measure_texts,
    writes,
)
from ffmerge.runtime_tests.parity import (
    OutputParity,
    check_generation,
    check_nodes,
    check_parity,
)
from ffmerge.runtime_tests.reference import read_reference
from ffmerge.runtime_tests.replay import Generation
from ffmerge.runtime_tests.runtimes.base import Placement
from ffmerge.runtime_tests.runtimes.registry import RUNTIMES, find_runtime
from ffmerge.runtime_tests.sharing import Sharing, model_bytes, sharing
from ffmerge.runtime_tests.translation import why_not

NAME = "validation.json"
PLACED = 0.9  # the fraction of the compute nodes that a runtime must take to count as used


@dataclass(frozen=True)
class ProviderResult:
    """What was found on one runtime; ``used`` is None when it did not run.

    ``generation`` is greedy decoding at each optimization level, ``divergences`` the first node of
    each graph that is off, and ``metric`` the task metric if there were data. ``sample`` is that
    on the real rows that the package holds, and ``texts`` what is measured of written texts.
    """

    name: str
    requested: str
    used: str | None
    device: str | None
    arithmetic: str
    optimization: tuple[str, ...]
    outputs: tuple[OutputParity, ...]
    generation: tuple[Generation, ...]
    divergences: tuple[Divergence, ...]
    metric: MetricResult | None
    sample: MetricResult | None
    texts: tuple[MetricRow, ...]
    footprint: Footprint | None
    ok: bool
    reason: str | None

    def worst(self) -> list[OutputParity]:
        """Return of each graph and optimization level the output that fails, or is farthest off."""
        return [
            max(each, key=lambda o: (not o.ok, o.max_abs or 0))
            for _, each in groupby(self.outputs, lambda o: (o.graph, o.optimization))
        ]


@dataclass(frozen=True)
class NotTested:
    """A runtime that was not asked for by name, and the reason why it is not on this machine."""

    name: str
    requested: str
    reason: str


@dataclass(frozen=True)
class Validation:
    """What was found on every runtime that was asked for; ``ok`` if all of them hold.

    ``metric`` is that of the first runtime that measured one; ``metrics`` are all that are known,
    from the original to each runtime. Those on other data are not to be compared.
    """

    ok: bool
    providers: tuple[ProviderResult, ...]
    not_tested: tuple[NotTested, ...]
    metric: MetricResult | None
    metrics: tuple[MetricRow, ...]
    not_measured: str | None
    environment: dict[str, Any]
    package: dict[str, Any]
    sharing: Sharing | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; a number that is NaN or infinite becomes null."""
        return plain({**vars(self), "providers": [_provider_json(p) for p in self.providers]})


def validate(
    folder: str | Path,
    providers: Sequence[str] = ("cpu",),
    data: Data | None = None,
    threads: int = 1,
    progress: Callable[[str], None] = lambda step: None,
    installed: bool = False,
) -> Validation:
    """Return what the package in ``folder`` does on this machine; writes nothing.

    Every runtime is checked at each of its optimization levels. One that is absent, falls back
    or fails is a result that is not ok, and the others still run. With ``installed`` all others
    that are installed are checked as well, and the rest is listed as not tested. ``threads`` is
    for the memory and latency, and ``progress`` is told each step as it begins.

    Raises:
        InputError: the package is not whole, or a provider is unknown.
    """
    folder = Path(folder)
    manifest = Manifest.read(folder)
    progress("checking the files")
    manifest.check_files(folder)
    examples = None
    if data is not None:
        examples = as_examples(data, folder, manifest.task)
    for name in providers:
        find_runtime(name)
    results: list[ProviderResult] = []
    absent: list[NotTested] = []
    for name in dict.fromkeys((*providers, *(RUNTIMES if installed else ()))):
        try:
            results.append(_validate_on(name, folder, manifest, threads, progress, examples))
        except NotInstalled as error:
            if name in providers:
                results.append(_failed(name, str(error)))
            else:
                absent.append(NotTested(name, find_runtime(name).requested, str(error)))
    return Validation(
        ok=bool(results) and all(r.ok for r in results),
        providers=tuple(results),
        not_tested=tuple(absent),
        metric=next((result.metric for result in results if result.metric), None),
        metrics=tuple(_metrics(manifest, results)),
        not_measured=why_not(folder) if writes(manifest) else None,
        environment=_environment(),
        package={
            "bytes_total": sum(file.bytes for file in manifest.files),
            "bytes_model": model_bytes(manifest),
            "initializer_bytes": manifest.bytes_total,
            "initializer_bytes_unique": manifest.bytes_unique,
            "parameters": manifest.parameters,
            "dtype": manifest.dtype,
        },
    )


def measure_against(
    validation: Validation, manifest: Manifest, against: Path, threads: int = 1
) -> tuple[Validation, Footprint | None]:
    """Return the validation with what sharing kept beside the package ``against``, and its cost.

    Measured where the package of ``manifest`` ran first; if nowhere, nothing is.

    Raises:
        InputError: ``against`` is no package.
        RuntimeCheckError: it does not run there.
    """
    before = Manifest.read(against)
    ran = next((p for p in validation.providers if p.footprint), None)
    if not ran or not ran.footprint:
        return validation, None
    cost = measure_footprint(against, ran.name, threads)
    sizes = model_bytes(before), model_bytes(manifest)
    kept = sharing(against.resolve().name, *sizes, cost.rss_bytes, ran.footprint.rss_bytes)
    return replace(validation, sharing=kept), cost


def write_validation(folder: Path, validation: Validation) -> Path:
    """Write ``validation.json`` into the package, whole or not at all; return its path."""
    text = json.dumps(validation.to_json(), indent=2, ensure_ascii=False, allow_nan=False)
    return write_whole(folder / NAME, f"{text}\n".encode())


def _validate_on(
    name: str,
    folder: Path,
    manifest: Manifest,
    threads: int,
    progress: Callable[[str], None],
    examples: Examples | None,
) -> ProviderResult:
    runtime = find_runtime(name)
    outputs: list[OutputParity] = []
    generated: list[Generation] = []
    try:
        for level in runtime.levels:
            progress(f"comparing with PyTorch on {name}, optimization {level}")
            outputs += check_parity(folder, manifest, name, level)
            decoded = check_generation(folder, manifest, name, level)
            generated += [decoded] if decoded else []
        progress(f"comparing nodes with PyTorch's on {name}")
        divergences = check_nodes(folder, manifest, name, outputs)
        labelled = read_reference(folder).labelled(manifest) if manifest.metric else {}
        rows = from_arrays(labelled) if labelled else None
        progress(f"measuring memory and latency on {name}")
        footprint = measure_footprint(folder, name, threads)
    except NotInstalled:
        raise
    except RuntimeCheckError as error:
        return _failed(name, str(error), outputs)
    failed = (o for o in outputs if not o.ok)
    reasons = [f"{o.graph}: {o.name} ({o.optimization}): {o.reason}" for o in failed]
    reasons += [f"{g.reason} ({g.optimization})" for g in generated if g.reason]
    reasons += map(str, divergences)
    reasons += _elsewhere(runtime.requested, footprint.placement)
    return replace(
        _failed(name, "; ".join(reasons), outputs),
        generation=tuple(generated),
        divergences=tuple(divergences),
        metric=measure_metric(folder, manifest, name, examples) if examples else None,
        sample=measure_metric(folder, manifest, name, rows) if rows else None,
        texts=tuple(measure_texts(folder, manifest, name, {OWN: rows, GIVEN: examples})),
        footprint=footprint,
        device=footprint.device,
        ok=not reasons,
        reason="; ".join(reasons) or None,
    )


def _metrics(manifest: Manifest, results: Sequence[ProviderResult]) -> Iterator[MetricRow]:
    """Yield the metric of the original and the merged model, the exported one and each runtime."""
    along = dict(manifest.merge.metric) if manifest.merge else {}
    stages = {"before": "original", "merged": "merged", "recovered": "recovered"}
    for key, stage in stages.items():
        if along.get("name") and along.get(key) is not None:
            of = along["name"], along[key], along.get("examples", 0)
            yield MetricRow(stage, "PyTorch", "merge's validation data", *of)
    if manifest.metric:
        yield MetricRow("exported", "PyTorch", OWN, *vars(manifest.metric).values())
    for data, field in ((OWN, "sample"), (GIVEN, "metric")):
        for result in results:
            if found := getattr(result, field):
                yield MetricRow(manifest.dtype, result.name, data, *vars(found).values())
    for result in results:
        yield from result.texts


def _failed(name: str, reason: str, outputs: Sequence[OutputParity] = ()) -> ProviderResult:
    runtime = find_runtime(name)
    return ProviderResult(
        name=name,
        requested=runtime.requested,
        used=runtime.requested if outputs else None,  # open lets no other one through
        device=None,
        arithmetic=runtime.arithmetic,
        optimization=runtime.levels,
        outputs=tuple(outputs),
        generation=(),
        divergences=(),
        metric=None,
        sample=None,
        texts=(),
        footprint=None,
        ok=False,
        reason=reason,
    )


def _elsewhere(requested: str, placement: Placement | None) -> list[str]:
    """Return the reason why a runtime that took few of the nodes was not really used."""
    if placement is None or placement.fraction(requested) >= PLACED:
        return []
    counts = placement.counts()
    others = ", ".join(
        f"{count} {op} on {part}"
        for part, ops in placement.compute.items()
        for op, count in ops.items()
        if part != requested
    )
    return [
        f"{requested} ran {counts.get(requested, 0)} of {sum(counts.values())} compute nodes, at "
        f"least {PLACED:.0%} are needed; elsewhere: {others}"
    ]


def _provider_json(result: ProviderResult) -> dict[str, Any]:
    cost = vars(result.footprint) if result.footprint else {}
    memory = ("rss_bytes", "anonymous_bytes", "memory_reason")
    backed = result.footprint.file_bytes if result.footprint else None
    held = getattr(cost.get("placement"), "device_bytes", None)
    silent = None if held is not None else "the engine has no other device, or does not tell"
    latency = {"first": "first_ms", "median": "median_ms", "p95": "p95_ms", "runs": "runs"}
    return {
        **{key: value for key, value in vars(result).items() if key != "footprint"},
        "memory": {
            **{key.removeprefix("memory_"): cost.get(key) for key in memory},
            "file_bytes": backed,
            "device_bytes": held,
            "device_reason": silent,
        },
        "latency_ms": {key: cost.get(field) for key, field in latency.items()},
        "tokens_per_s": cost.get("tokens_per_s"),
        "load_s": cost.get("load_s"),
        "threads": cost.get("threads"),
        "placement": cost.get("placement"),
    }


def _environment() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "onnxruntime": ort.__version__,
        "numpy": np.__version__,
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": _processor(),
        "threads": os.cpu_count(),
    }


def _processor() -> str:
    """Return the processor's model name; Linux leaves it out of ``platform.processor``."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
