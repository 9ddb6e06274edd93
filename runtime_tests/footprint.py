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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ffmerge.errors import FfmergeError, RuntimeCheckError
from ffmerge.files import restored
from ffmerge.models import kv_cache
from ffmerge.models.manifest import Manifest
from ffmerge.runtime_tests.memory import growth
from ffmerge.runtime_tests.runtimes.base import Placement
from ffmerge.runtime_tests.runtimes.registry import RUNTIMES, find_runtime

# y = Identity(x), ONNX opset 17: a first session that pays for the library's own start.
TRIVIAL = (
    b'\x08\x08:7\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12'
    b"\x04\n\x02\x08\x01b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\x11"
)
RUNS, SECONDS = 50, 2.0  # latency is taken over at most this many runs and about this long


@dataclass(frozen=True)
class Footprint:
    """What the sessions of a package cost, one run of each at batch 1.

    A graph that generates makes one token; ``tokens_per_s`` counts those that a graph with a
    cache makes after a few others, and is None where there is none. The bytes are what creating
    the sessions added to the process: all resident memory, and its anonymous part (a weight that
    stays in the mapped file is resident, not anonymous). They are None where the system does not
    tell, and ``memory_reason`` says so. ``placement`` is where the nodes ran, over all the graphs.
    """

    rss_bytes: int | None
    anonymous_bytes: int | None
    memory_reason: str | None
    load_s: float
    first_ms: float
    median_ms: float
    p95_ms: float
    tokens_per_s: float | None
    runs: int
    threads: int
    device: str
    placement: Placement | None

    @property
    def file_bytes(self) -> int | None:
        """Return the resident bytes that a file backs, which the system may drop and read again."""
        if self.rss_bytes is None or self.anonymous_bytes is None:
            return None
        return self.rss_bytes - self.anonymous_bytes


def measure_footprint(
    folder: Path, provider: str = "cpu", threads: int = 1, kind: str = "onnx"
) -> Footprint:
    """Return what a new process measured; one thread, so that machines and days compare.

    ``kind`` is "onnx" for the graphs, or that of a variant of them.

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
    served = Manifest.read(folder).served(kind)
    threads = min(threads, os.cpu_count() or 1)
    runtime = find_runtime(provider)
    trivial = runtime.open(TRIVIAL, threads=threads)
    trivial.run(["y"], {"x": np.zeros(1, np.float32)})

    before = runtime.resident()
    start = time.perf_counter()
    sessions = [runtime.open(folder / path, threads=threads) for path in served]
    load_s = time.perf_counter() - start
    after = runtime.resident()

    runs = [
        (session, graph.outputs, graph.probe.draw(0, batch=1))
        for session, graph in zip(sessions, served.values(), strict=True)
    ]
    times: list[list[float]] = []  # of each run, the ms of each graph
    end = time.perf_counter() + SECONDS
    while len(times) < 4 or (len(times) <= RUNS and time.perf_counter() < end):
        times.append([])
        for session, outputs, feeds in runs:
            start = time.perf_counter()
            session.run(outputs, feeds)
            times[-1].append(1e3 * (time.perf_counter() - start))
    first_ms, *warm = map(sum, times)
    steps = [
        1e3 / statistics.median(ms)
        for (_, _, feeds), *ms in zip(runs, *times[1:], strict=True)
        if any(map(kv_cache.is_past, feeds))
    ]
    rss, anonymous = growth(before, after)
    silent = (
        "this system has no /proc/self/smaps_rollup, or the engine does not tell"
        if rss is None
        else None
    )
    placed = [
        runtime.place(folder / path, outputs, feeds)
        for path, (_, outputs, feeds) in zip(served, runs, strict=True)
    ]
    return Footprint(
        rss_bytes=rss,
        anonymous_bytes=anonymous,
        memory_reason=silent,
        load_s=load_s,
        first_ms=first_ms,
        median_ms=statistics.median(warm),
        p95_ms=float(np.percentile(warm, 95)),
        tokens_per_s=steps[0] if steps else None,
        runs=len(warm),
        threads=threads,
        device=sessions[0].device,
        placement=Placement.total(placed),
    )


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
