"""How long a layer norm of a sum takes on ONNX Runtime's CPU, as one operator and as two.

    python benchmarks/norms.py [--width 384] [--threads 1] [--turns 15]
    python benchmarks/norms.py --package FOLDER       # of a BERT

``add`` is an Add with a LayerNormalization behind it, which ONNX Runtime makes one operator,
``SkipLayerNormalization``; ``sum`` is the same with a Sum, which it leaves, as ``export --for cpu``
writes it. Of a package of that profile, ``sum`` is its graph and ``add`` the same with an Add for
each Sum. Medians of wall time, in turns.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

Sessions = dict[str, ort.InferenceSession]
ROWS = (1, 16, 128, 1024, 4096)
SIZES = ((16, 1), (128, 1), (128, 8))  # tokens and rows
LEAST = 0.02  # seconds of a turn


def session(model: onnx.ModelProto, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    return ort.InferenceSession(model.SerializeToString(), options)


def norm(op: str, width: int) -> onnx.ModelProto:
    """Return a layer norm of what ``op`` adds."""
    ones, rows = ", ".join(["1"] * width), f"float[b,s,{width}]"
    return onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 23]> norm ({rows} x, {rows} r) => ({rows} y) '
        f"<float[{width}] scale = {{{ones}}}, float[{width}] bias = {{{ones}}}> "
        f"{{ t = {op}(x, r) y = LayerNormalization <axis = -1> (t, scale, bias) }}"
    )


def whole(op: str, package: Path) -> onnx.ModelProto:
    """Return the graph of a package with ``op`` for each Sum."""
    model = onnx.load(package / "model.onnx")
    for node in model.graph.node:
        if node.op_type == "Sum":
            node.op_type = op
    return model


def measure(sessions: Sessions, feeds: dict[str, Any], turns: int) -> str:
    """Return the cells of a row: the median of each, and that of the ratios of a turn."""
    times: dict[str, list[float]] = {op: [] for op in sessions}
    for _ in range(turns):
        for op, opened in sessions.items():
            start, runs = time.perf_counter(), 0
            while time.perf_counter() - start < LEAST or runs < 3:
                opened.run(None, feeds)
                runs += 1
            times[op].append((time.perf_counter() - start) / runs * 1e6)
    ratio = statistics.median(b / a for a, b in zip(times["Add"], times["Sum"], strict=True))
    cells = [f"{statistics.median(times[op]):.0f} us" for op in sessions]
    return f"{' | '.join(cells)} | {ratio:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--package", type=Path)
    given = parser.parse_args()
    draw, sessions = np.random.default_rng(0), Sessions()
    feeds: dict[str, Any]
    for op in ("Add", "Sum"):
        model = whole(op, given.package) if given.package else norm(op, given.width)
        sessions[op] = session(model, given.threads)
    print("| tokens x rows | add | sum | ratio |\n|---|---|---|---|")
    if given.package:
        for length, batch in SIZES:
            ids = draw.integers(1000, 20000, (batch, length))
            feeds = {"attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
            cells = measure(sessions, {"input_ids": ids, **feeds}, given.turns)
            print(f"| {length} x {batch} | {cells} |", flush=True)
        return
    for rows in ROWS:
        feeds = {name: draw.standard_normal((1, rows, given.width), np.float32) for name in "xr"}
        print(f"| {rows} x 1 | {measure(sessions, feeds, given.turns)} |", flush=True)


if __name__ == "__main__":
    main()
