"""ONNX graphs written as text with numpy weights, and what ONNX Runtime computes with them."""

from collections import Counter
from typing import Any

import ml_dtypes  # noqa: F401  (numpy learns bfloat16 and its kind)
import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
from onnx import numpy_helper

# two layers, whose weights and biases a test gives
TWO_LAYERS = """(float[2,64] x) => (float[2,64] y) {
    a = MatMul(x, W1)  b = Add(a, B1)  c = Relu(b)  d = MatMul(c, W2)  y = Add(d, B2)}"""
# Gemm against MatMul on the same numbers, sums of 64 products of N(0, 1)
GEMM = 3e-5


def build(text: str, opset: int = 20, **weights: Any) -> ir.Model:
    """Return the graph ``(inputs) => (outputs) { nodes }`` with these initializers, in order.

    Nodes are named n0, n1, ... in order, subgraphs included.
    """
    header = f'<ir_version: 10, opset_import: ["": {opset}]> g '
    proto = onnx.parser.parse_model(header + text)
    for name, array in weights.items():
        tensor = array if isinstance(array, onnx.TensorProto) else None
        proto.graph.initializer.append(tensor or numpy_helper.from_array(np.asarray(array), name))
        proto.graph.initializer[-1].name = name
    counter = iter(range(1000))

    def name_nodes(graph: onnx.GraphProto) -> None:
        for node in graph.node:
            node.name = node.name or f"n{next(counter)}"
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    name_nodes(attribute.g)

    name_nodes(proto.graph)
    onnx.checker.check_model(proto)
    return ir.from_proto(proto)


def run(model: ir.Model | str, **feeds: Any) -> list[np.ndarray]:
    """Return the outputs on ONNX Runtime's CPU provider with its default optimizations."""
    source = model if isinstance(model, str) else ir.to_proto(model).SerializeToString()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def ops(model: ir.Model) -> Counter[str]:
    """Count the nodes of each operator, subgraphs included."""
    return Counter(node.op_type for node in ir.traversal.RecursiveGraphIterator(model.graph))


def names(model: ir.Model) -> list[str]:
    """Return the names of the main graph's initializers."""
    return list(model.graph.initializers)


def normal(*shape: int, seed: int = 0, dtype: Any = np.float32) -> np.ndarray:
    """Return values of N(0, 1)."""
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)
