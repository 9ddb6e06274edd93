"""``share`` on a large file: time against a plain copy, and the memory it takes.

``python benchmarks/large_file.py [--gigabytes 3] [--runs 5]`` writes an ONNX file of MatMuls
whose external weights are half copies (as they are, stored transposed, or read through a
Transpose; an eighth is read through a Transpose and has no copy), shares it in a process of its
own, and prints a table. It needs twice the size on the disk.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

WIDTH = 2048  # a weight is WIDTH x WIDTH float32: 16.8 MB
KINDS = ("own", "turned", "own", "copy", "transposed", "own", "copy", "hidden")


def write_large(path: Path, weights: int, width: int = WIDTH) -> int:
    """Write the graph and stream its weights; return the bytes of the data file."""
    random = np.random.default_rng(0)
    nodes, initializers = [], []
    latest = np.empty(0)
    with open(path.with_name(path.name + "_data"), "wb") as file:
        for index in range(weights):
            kind = KINDS[index % len(KINDS)]
            if kind in ("own", "turned"):
                latest = random.standard_normal((width, width), np.float32) / width**0.5
            values = np.ascontiguousarray(latest.T if kind == "transposed" else latest)
            name = f"w{index}"
            initializers.append(_external(name, path.name + "_data", file.tell(), width))
            file.write(values.data)
            if kind in ("transposed", "hidden", "turned"):
                nodes.append(helper.make_node("Transpose", [name], [f"t{index}"], perm=[1, 0]))
                name = f"t{index}"
            out = f"x{index + 1}" if index + 1 < weights else "y"
            nodes.append(helper.make_node("MatMul", [f"x{index}", name], [out]))
        size = file.tell()
    names = [f"x{index}" for index in range(weights)] + ["y"]
    first, *between, last = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, width]) for name in names
    )
    graph = helper.make_graph(nodes, "large", [first], [last], initializers, value_info=between)
    opset = [helper.make_opsetid("", 20)]
    path.write_bytes(
        helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString()
    )
    return size


def _external(name: str, location: str, offset: int, width: int) -> TensorProto:
    tensor = onnx.TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[width, width])
    tensor.data_location = TensorProto.EXTERNAL
    values = {"location": location, "offset": offset, "length": 4 * width * width}
    for key, value in values.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


@contextmanager
def peak() -> Iterator[dict[str, int]]:
    """Fill in the peak bytes of this process: resident in all, and anonymous (sampled)."""
    found = {"resident": 0, "anonymous": 0}
    stop = threading.Event()

    def look() -> None:
        while True:
            lines = Path("/proc/self/status").read_text().splitlines()
            sizes = {line.split(":")[0]: line.split()[1] for line in lines if line.endswith("kB")}
            found["resident"] = 1024 * int(sizes["VmHWM"])
            found["anonymous"] = max(found["anonymous"], 1024 * int(sizes["RssAnon"]))
            if stop.wait(0.02):
                return

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()


def share_here(source: Path, target: Path) -> dict[str, float]:
    """Share in this process; return seconds and peak bytes."""
    from ffmerge.passes.graph.run import share_file

    with peak() as found:
        start = time.perf_counter()
        result = share_file(source, target)
        seconds = time.perf_counter() - start
    return {"seconds": seconds, **found, "written": sum(p.stat().st_size for p in result.files)}


def measure(folder: Path, weights: int, width: int = WIDTH, runs: int = 1) -> dict[str, Any]:
    """Return the bytes, the seconds of a copy and of ``share`` in turn, and its peak memory."""
    source, shared = folder / "large.onnx", folder / "shared.onnx"
    found: dict[str, Any] = {"bytes": write_large(source, weights, width), "copies": [], "all": []}
    for _ in range(runs):
        for path in (folder / "copy", shared, folder / "shared.onnx_data"):
            path.unlink(missing_ok=True)
        os.sync()
        start = time.perf_counter()
        subprocess.run(["cp", f"{source}_data", folder / "copy"], check=True)
        found["copies"].append(time.perf_counter() - start)
        (folder / "copy").unlink()
        os.sync()
        command = [sys.executable, __file__, "--share", source, shared]
        child = subprocess.run(command, check=True, capture_output=True, text=True)
        found |= json.loads(child.stdout)
        found["all"].append(found["seconds"])
    found["copy"] = statistics.median(found["copies"])
    found["seconds"] = statistics.median(found["all"])
    return found


def table(found: dict[str, Any]) -> str:
    """Return the figures as lines of Markdown."""
    ratio, memory = found["seconds"] / found["copy"], found["bytes"] / 100
    rows = [
        ("weights read", f"{found['bytes'] / 1e6:,.1f} MB"),
        ("weights written", f"{found['written'] / 1e6:,.1f} MB"),
        ("plain copy", f"{found['copy']:.2f} s; runs: {_runs(found['copies'])}"),
        ("share", f"{found['seconds']:.2f} s; runs: {_runs(found['all'])}"),
        ("ratio of the medians", f"{ratio:.2f} x the copy"),
        *(
            (f"peak {kind} memory", f"{found[kind] / 1e6:,.1f} MB, {found[kind] / memory:.1f} %")
            for kind in ("anonymous", "resident")
        ),
    ]
    lines = ["| what | figure |", "|---|---|", *(f"| {what} | {text} |" for what, text in rows)]
    return "\n".join(lines)


def _runs(seconds: Sequence[float]) -> str:
    return ", ".join(f"{each:.2f}" for each in seconds)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder else")
    parser.add_argument("--share", type=Path, nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.share:
        print(json.dumps(share_here(*arguments.share)))
        return
    folder = Path(tempfile.mkdtemp(prefix="ffmerge-large-", dir=arguments.folder))
    try:
        weights = round(arguments.gigabytes * 1e9 / (4 * WIDTH * WIDTH))
        print(table(measure(folder, weights, runs=arguments.runs)))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
