"""Before sharing: tensors where the passes reach them, and the ranks the passes ask for."""

from collections.abc import Callable

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass, ShapeInferencePass

from ffmerge.passes.graph.tensors import graphs, is_op, stored_in


def make_liftable(model: ir.Model) -> None:
    """Let every stored tensor be one that can be lifted to the main graph.

    A function that holds tensors, itself or by what it calls, is inlined: a function has no
    initializers to share with. A tensor that a subgraph returns goes through an Identity.
    """
    while holders := _holders(model):  # inlined, their callers hold the tensors
        InlinePass(lambda function: function.identifier() in holders)(model)
    for graph in graphs(model):
        if graph is model.graph:
            continue
        for index, value in enumerate(graph.outputs):
            node = value.producer()
            if value.is_initializer() or (node is not None and is_op(node, "Constant")):
                name = f"{value.name}/out"
                out = ir.Value(name=name, type=value.type, shape=value.shape)
                graph.append(ir.Node("", "Identity", [value], outputs=[out], name=name))
                graph.outputs[index] = out


def _holders(model: ir.Model) -> set[ir.OperatorIdentifier]:
    """Return the functions that hold tensors themselves."""
    holders = set()
    for key, function in model.functions.items():
        for graph in (function.graph, *function.subgraphs()):
            if next(stored_in(graph), None):
                holders.add(key)
    return holders


def infer_ranks(model: ir.Model) -> Callable[[], None]:
    """Infer the shapes of the model's values; calling the result puts back what was recorded.

    Nothing is done if every MatMul's left input says its rank already.
    """
    nodes = [node for graph in graphs(model) for node in graph]
    if all(_knows_rank(node.inputs[0]) for node in nodes if is_op(node, "MatMul")):
        return lambda: None
    values = [(out, out.shape, out.type) for node in nodes for out in node.outputs]
    order = list(model.graph.initializers.values())
    ShapeInferencePass(strict_mode=False)(model)
    model.graph.initializers.clear()  # the pass puts large ones last
    for value in order:
        model.graph.register_initializer(value)

    def restore() -> None:
        for value, shape, kind in values:
            value.shape, value.type = shape, kind

    return restore


def _knows_rank(value: ir.Value | None) -> bool:
    return value is None or bool(value.shape)
