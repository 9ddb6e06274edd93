"""How long a layer norm of a sum takes on ONNX Runtime's CPU, as one operator and as two.

    python benchmarks/norms.py [--width 384] [--threads 1] [--turns 15]

``add`` is an Add with a LayerNormalization behind it, which ONNX Runtime makes one operator,
``SkipLayerNormalization``; ``sum`` is the same with a Sum, which it leaves, as ``export --for cpu``
writes it. Medians of wall time, in turns.
"""

import argparse
import statistics
import time

import numpy as np
import onnx
import onnxruntime as ort

ROWS = (1, 16, 128, 1024, 4096)
LEAST = 0.02  # seconds of a turn


def session(op: str, width: int, threads: int) -> ort.InferenceSession:
    """Return a session of a norm of what ``op`` adds."""
    ones, rows = ", ".join(["1"] * width), f"float[b,s,{width}]"
    model = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 23]> norm ({rows} x, {rows} r) => ({rows} y) '
        f"<float[{width}] scale = {{{ones}}}, float[{width}] bias = {{{ones}}}> "
        f"{{ t = {op}(x, r) y = LayerNormalization <axis = -1> (t, scale, bias) }}"
    )
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    return ort.InferenceSession(model.SerializeToString(), options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=15)
    given = parser.parse_args()
    sessions = {op: session(op, given.width, given.threads) for op in ("Add", "Sum")}
    print("| rows | add | sum |\n|---|---|---|")
    for rows in ROWS:
        draw = np.random.default_rng(0).standard_normal
        feeds = {name: draw((1, rows, given.width), np.float32) for name in "xr"}
        times: dict[str, list[float]] = {op: [] for op in sessions}
        for _ in range(given.turns):
            for op, opened in sessions.items():
                start, runs = time.perf_counter(), 0
                while time.perf_counter() - start < LEAST:
                    opened.run(None, feeds)
                    runs += 1
                times[op].append((time.perf_counter() - start) / runs * 1e6)
        cells = [f"{statistics.median(times[op]):.0f} us" for op in sessions]
        print(f"| {rows} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
