"""Before sharing: tensors where the passes reach them, and the ranks the passes ask for."""

from collections.abc import Callable

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass, ShapeInferencePass

from ffmerge.passes.graph.tensors import graphs, is_op, stored_in


class ReachPass(ir.passes.InPlacePass):
    """Every stored tensor can be lifted to the main graph.

    A function that holds tensors, itself or by what it calls, is inlined: a function has no
    initializers to share with. A tensor that a subgraph returns goes through an Identity.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Inline and insert; say whether there was anything to do."""
        modified = False
        while holders := _holders(model):  # inlined, their callers hold the tensors
            InlinePass(lambda function: function.identifier() in holders)(model)
            modified = True
        for graph in graphs(model):
            for index, value in enumerate(graph.outputs):
                node = value.producer()
                constant = node is not None and is_op(node, "Constant")
                if graph is not model.graph and (value.is_initializer() or constant):
                    name = f"{value.name}/out"
                    out = ir.Value(name=name, type=value.type, shape=value.shape)
                    graph.append(ir.Node("", "Identity", [value], outputs=[out], name=name))
                    graph.outputs[index] = out
                    modified = True
        return ir.passes.PassResult(model, modified)


def _holders(model: ir.Model) -> set[ir.OperatorIdentifier]:
    """Return the functions that hold tensors themselves."""
    return {
        key
        for key, function in model.functions.items()
        if any(
            item for graph in (function.graph, *function.subgraphs()) for item in stored_in(graph)
        )
    }


def infer_ranks(model: ir.Model) -> Callable[[], None]:
    """Infer the shapes of the model's values; calling the result puts back what was recorded.

    Nothing is done if every MatMul's left input says its rank already.
    """
    nodes = [node for graph in graphs(model) for node in graph]
    if all(
        node.inputs[0] is None or node.inputs[0].shape for node in nodes if is_op(node, "MatMul")
    ):
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
