"""Memory and latency of a package, measured in a fresh process.

``python -m ffmerge.runtime_tests.footprint PACKAGE --provider cpu --threads 1`` prints one JSON
object. A fresh process, because memory that another model left behind would be counted or
reused.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ffmerge.errors import FfmergeError, RuntimeCheckError
from ffmerge.files import restored
from ffmerge.models.kv_cache import is_past
from ffmerge.models.manifest import Manifest
from ffmerge.runtime_tests.memory import growth
from ffmerge.runtime_tests.results import Footprint
from ffmerge.runtime_tests.runtimes.base import Placement
from ffmerge.runtime_tests.runtimes.registry import RUNTIMES, find_runtime

# y = Identity(x), ONNX opset 17: a first session that pays for the library's own start.
TRIVIAL = (
    b'\x08\x08:7\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12'
    b"\x04\n\x02\x08\x01b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\x11"
)
RUNS, SECONDS = 50, 2.0  # latency is taken over at most this many runs and about this long


def measure_footprint(
    folder: Path, provider: str = "cpu", threads: int = 1, kind: str = "onnx"
) -> Footprint:
    """Return what a new process measured; one thread, so that machines and days compare.

    ``kind`` is "onnx" for the graphs, or that of a variant of them, as another precision.

    Raises:
        RuntimeCheckError: the process failed; the message is its last line.
    """
    options = ["--provider", provider, "--threads", str(threads), "--kind", kind]
    doing = f"measuring {folder} ({kind})"
    found: Footprint = restored(
        Footprint, in_fresh_process(__spec__.name, [str(folder), *options], doing)
    )
    return found


def in_fresh_process(module: str, arguments: Sequence[str], doing: str) -> Any:
    """Return the JSON that ``python -m module`` prints.

    Raises:
        RuntimeCheckError: it failed; the message names what it was ``doing``, and its last line.
    """
    child = subprocess.run(
        [sys.executable, "-P", "-m", module, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
    )
    if child.returncode:
        lines = child.stderr.strip().splitlines() or [f"exit status {child.returncode}"]
        raise RuntimeCheckError(f"{doing} failed: {lines[-1]}")
    return json.loads(child.stdout)


def answer(work: Callable[..., Any], **arguments: Any) -> None:
    """Print what ``work`` returns as JSON, or exit with its error as one line."""
    try:
        print(json.dumps(work(**arguments), default=asdict))
    except FfmergeError as error:
        sys.exit(" ".join(str(error).split()))


def _measure_here(folder: Path, kind: str, provider: str, threads: int) -> Footprint:
    """Measure in this process: load, then run all graphs one after another, again and again."""
    served = Manifest.read(folder).served(kind)
    threads = min(threads, os.cpu_count() or 1)
    runtime = find_runtime(provider)
    trivial = runtime.open(TRIVIAL, threads=threads)
    trivial.run(["y"], {"x": np.zeros(1, np.float32)})

    before = runtime.resident()
    start = time.perf_counter()
    sessions = [runtime.open(folder / path, threads=threads) for path in served]
    load_s = time.perf_counter() - start
    rss, anonymous = growth(before, runtime.resident())
    silent = None
    if rss is None:
        silent = "this system has no /proc/self/smaps_rollup, or the engine does not tell"

    feeds = [graph.probe.draw(0, batch=1) for graph in served.values()]
    calls = [
        partial(session.run, graph.outputs, given)
        for session, graph, given in zip(sessions, served.values(), feeds, strict=True)
    ]
    times = _timed(calls)
    first_ms, *warm = map(sum, times)
    running, _ = growth(before, runtime.resident())
    profiles = [
        runtime.profile(folder / path, graph.outputs, given)
        for (path, graph), given in zip(served.items(), feeds, strict=True)
    ]
    return Footprint(
        rss_bytes=rss,
        anonymous_bytes=anonymous,
        running_bytes=running,
        memory_reason=silent,
        load_s=load_s,
        first_ms=first_ms,
        median_ms=statistics.median(warm),
        p95_ms=float(np.percentile(warm, 95)),
        tokens_per_s=_tokens_per_s(feeds, times),
        runs=len(warm),
        given="; ".join(map(_sizes, feeds)),
        threads=threads,
        device=sessions[0].device,
        placement=Placement.total(profiles),
    )


def _sizes(given: Mapping[str, Any]) -> str:
    """Return in words the sizes of the first input of a graph, and of the past if it takes one."""
    past = [name for name in given if is_past(name)]
    told = []
    for name in [*list(given)[:1], *past[:1]]:
        told.append(f"{name} {' x '.join(map(str, given[name].shape))}".rstrip())
    return ", ".join(told)


def _tokens_per_s(
    feeds: Sequence[Mapping[str, Any]], times: Sequence[Sequence[float]]
) -> float | None:
    """Return how often the graph with a cache runs in a second, warm; None if there is none."""
    for given, _, *warm in zip(feeds, *times, strict=True):
        if any(is_past(name) for name in given):
            return 1e3 / statistics.median(warm)
    return None


def _timed(calls: Sequence[Callable[[], Any]]) -> list[list[float]]:
    """Return of each run the milliseconds of each call; the first run is the one that warms up."""
    times: list[list[float]] = []
    end = time.perf_counter() + SECONDS
    while len(times) < 4 or (len(times) <= RUNS and time.perf_counter() < end):
        times.append([])
        for call in calls:
            start = time.perf_counter()
            call()
            times[-1].append(1e3 * (time.perf_counter() - start))
    return times


def main() -> None:
    """Print the footprint of the package named on the command line, as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, metavar="PACKAGE")
    parser.add_argument("--kind", default="onnx")
    parser.add_argument("--provider", choices=RUNTIMES, default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    answer(_measure_here, **vars(parser.parse_args()))


if __name__ == "__main__":
    main()
