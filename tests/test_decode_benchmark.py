"""What the decoding benchmark counts, on a graph counted by hand."""

from pathlib import Path
from typing import Any

import decode
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def test_a_token_reads_each_weight_once_and_one_row_of_what_is_only_looked_up(
    tmp_path: Path,
) -> None:
    def weight(name: str, *shape: int, dtype: Any = np.float32) -> onnx.TensorProto:
        return numpy_helper.from_array(np.zeros(shape, dtype), name)

    weights = [
        weight("shared", 8, 8), weight("positions", 100, 8), weight("table", 50, 8),
        weight("codes", 8, 16, dtype=np.int8),
    ]  # fmt: skip
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["a"]),  # the head multiplies by it as well
        helper.make_node("Gather", ["positions", "ids"], ["b"]),
        helper.make_node("Add", ["a", "b"], ["x"]),
        helper.make_node("MatMul", ["x", "shared"], ["y"]),
        helper.make_node("MatMul", ["y", "shared"], ["z"]),
        helper.make_node("Gemm", ["z", "table"], ["logits"], transB=1),
        helper.make_node("MatMulInteger", ["q", "codes"], ["r"]),
    ]
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, [1]),
         helper.make_tensor_value_info("q", TensorProto.INT8, [1, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 50])],
        weights,
    )  # fmt: skip
    onnx.save(helper.make_model(graph), tmp_path / "g.onnx")
    expected = 4 * 8 * 8 + 4 * 8 + 4 * 50 * 8 + 8 * 16
    assert decode.bytes_touched(tmp_path / "g.onnx") == expected
