"""Sums of the residual stream, and the norms behind them.

``exporter/genai.py`` calls :func:`sum_inside` for onnxruntime-genai, ``exporter/convert.py`` for
WebGPU. ``SkipSimplifiedLayerNormalization`` adds what a sublayer gives to the stream, gives the
sum, and norms it while it is at hand.

For the CPU ``exporter/convert.py`` calls :func:`sum_apart`: ONNX Runtime makes an Add and the
LayerNormalization behind it one operator when it loads a graph, whose kernel takes up to eight
times as long as the two (``benchmarks/norms.py``). It knows no Sum.
"""

import onnx_ir as ir

from ffmerge.passes.graph.blocks import MICROSOFT
from ffmerge.passes.graph.tensors import is_op, shape_of


def sum_inside(graph: ir.Graph) -> None:
    """Let each RMS norm of a sum of two values of one shape make the sum, in place."""
    for norm in list(graph):
        if is_op(norm, "RMSNormalization") and _norms_rows(norm):
            value = norm.inputs[0]
            add = value.producer() if value is not None else None
            if add is not None and is_op(add, "Add") and _are_alike(add):
                _join(graph, add, norm)


def sum_apart(graph: ir.Graph) -> None:
    """Let what a layer norm alone reads, the sum of two values of one shape, be a Sum, in place."""
    for norm in graph:
        value = norm.inputs[0] if is_op(norm, "LayerNormalization") else None
        add = value.producer() if value is not None else None
        if add is None or not is_op(add, "Add") or not _are_alike(add):
            continue
        if len(add.outputs[0].uses()) == 1 and not add.outputs[0].is_graph_output():
            add.op_type = "Sum"


def _norms_rows(norm: ir.Node) -> bool:
    """Say whether a norm is one of the last size, its scale stored."""
    scale = norm.inputs[1]
    if norm.attributes.get_int("axis", -1) != -1 or scale is None or scale.const_value is None:
        return False
    return scale.is_initializer() and len(shape_of(scale.const_value)) == 1


def _are_alike(add: ir.Node) -> bool:
    """Say whether the two that are added have one shape, batch x tokens x width."""
    one, other = (value.shape if value is not None else None for value in add.inputs)
    if one is None or other is None or one.rank() != 3:
        return False
    sizes = list(one)
    return sizes == list(other) and all(isinstance(each, int) or each.value for each in sizes)


def _join(graph: ir.Graph, add: ir.Node, norm: ir.Node) -> None:
    epsilon = norm.attributes.get_float("epsilon", 1e-5)
    node = ir.Node(
        MICROSOFT, "SkipSimplifiedLayerNormalization", [*add.inputs, norm.inputs[1]],
        [ir.AttrFloat32("epsilon", 1e-5 if epsilon is None else epsilon)], num_outputs=4,
        name=norm.name,
    )  # fmt: skip
    for output in node.outputs[1:3]:
        output.name = ""
    old, new = [norm.outputs[0], add.outputs[0]], [node.outputs[0], node.outputs[3]]
    ir.convenience.replace_nodes_and_values(graph, add, [norm, add], [node], old, new)
