"""How long the head of a decoder takes whose table is the embedding's, in the forms it may have.

    python benchmarks/head.py [--rows 1 2 8 64]

Forms: ``packed`` is ``x @ B``, a copy that ONNX Runtime packs; ``turned`` is ``(W @ x^T)^T``, whose
Transpose it puts into the product; ``kept`` the same with a Reshape between, which the sharing
passes write; ``columns`` is ``x @ B`` of a ``B`` that a caller may give, as ``export --for cpu``
has it, so that nothing is packed. Processor time of one thread for the sizes of SmolLM2-135M,
medians of 15 runs.
"""

import argparse
import statistics
import time

import numpy as np
import onnx
import onnxruntime as ort

VOCABULARY, WIDTH, RUNS = 49152, 576, 15
FORMS = {
    "packed": "y = MatMul (x, B)",
    "turned": "t = Transpose <perm = [1, 0]> (x)  z = MatMul (W, t)"
              "  y = Transpose <perm = [1, 0]> (z)",
    "kept": "t = Transpose <perm = [1, 0]> (x)  u = Reshape (t, sizes)  z = MatMul (W, u)"
            "  y = Transpose <perm = [1, 0]> (z)",
    "columns": "y = MatMul (x, B)",
}  # fmt: skip


def session(form: str, table: np.ndarray) -> ort.InferenceSession:
    """Return a session of the head in a form."""
    model = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 20]> head (float[n, {WIDTH}] x) => '
        f"(float[n, {VOCABULARY}] y) {{ {FORMS[form]} }}"
    )
    arrays = {"B": np.ascontiguousarray(table.T), "W": table, "sizes": np.array([WIDTH, -1])}
    for name in {name for node in model.graph.node for name in node.input} & set(arrays):
        model.graph.initializer.append(onnx.numpy_helper.from_array(arrays[name], name))
    if form == "columns":
        kind = onnx.TensorProto.FLOAT
        model.graph.input.append(onnx.helper.make_tensor_value_info("B", kind, [WIDTH, VOCABULARY]))
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    source = model.SerializeToString()
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def milliseconds(head: ort.InferenceSession, x: np.ndarray) -> float:
    """Return the median of a few runs."""
    times = []
    for _ in range(RUNS):
        start = time.process_time()
        head.run(None, {"x": x})
        times.append(time.process_time() - start)
    return 1e3 * statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 8, 64])
    rows = parser.parse_args().rows
    drawn = np.random.default_rng(0)
    table = drawn.standard_normal((VOCABULARY, WIDTH), np.float32)
    print("| rows | " + " | ".join(map(str, rows)) + " |")
    print("|---" * (len(rows) + 1) + "|")
    for form in FORMS:
        head = session(form, table)
        cells = []
        for count in rows:
            x = drawn.standard_normal((count, WIDTH), np.float32)
            cells.append(f"{milliseconds(head, x):.1f} ms")
        print(f"| {form} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
