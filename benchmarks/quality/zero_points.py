"""What zero points cost MatMulNBits: its time with and without them, one call after the other.

``python benchmarks/quality/zero_points.py`` on one thread, for products of 768 x 3,072 in 4 bits.
Prints a row for each block, accuracy level and number of rows: milliseconds of a call (a quarter
are faster), and the part of the time without zero points.
"""

import time

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

WIDTH, ROWS, BITS = 768, 3072, 4
CALLS = {1: 1500, 16: 200, 128: 40}  # by the rows that are multiplied


def session(block: int, level: int, zeros: bool) -> onnxruntime.InferenceSession:
    """Return a product by random codes."""
    random, blocks = np.random.default_rng(0), WIDTH // block
    stored = {
        "codes": random.integers(0, 256, (ROWS, blocks, block // 2), dtype=np.uint8),
        "scales": random.random((ROWS, blocks), dtype=np.float32) / 100,
    }
    if zeros:
        stored["zeros"] = random.integers(0, 256, (ROWS, blocks // 2), dtype=np.uint8)
    node = helper.make_node(
        "MatMulNBits", ["x", *stored], ["y"], domain="com.microsoft",
        K=WIDTH, N=ROWS, bits=BITS, block_size=block, accuracy_level=level,
    )  # fmt: skip
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", WIDTH])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", ROWS])
    tensors = [numpy_helper.from_array(array, name) for name, array in stored.items()]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "product", [x], [y], tensors)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


def main() -> None:
    """Print the table."""
    print("| block | level | rows | without | with | part |\n|---|---|---|---|---|---|")
    for block in (32, 64, 128):
        for level in (4, 0):
            both = [session(block, level, zeros) for zeros in (False, True)]
            for rows, calls in CALLS.items():
                x = np.random.default_rng(1).standard_normal((rows, WIDTH)).astype(np.float32)
                taken: list[list[float]] = [[], []]
                for _ in range(calls):
                    for opened, times in zip(both, taken, strict=True):
                        start = time.perf_counter()
                        opened.run(None, {"x": x})
                        times.append(time.perf_counter() - start)
                one, other = (1e3 * np.percentile(times, 25) for times in taken)
                cells = f"{one:.3f} | {other:.3f} | {other / one:.3f}"
                print(f"| {block} | {level} | {rows} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
