"""Before sharing: tensors where the passes reach them, and the ranks the passes ask for."""

from collections.abc import Callable, Container

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass, RemoveUnusedFunctionsPass

from ffmerge.errors import InputError, first_line
from ffmerge.passes.graph.infer import infer_types
from ffmerge.passes.graph.tensors import graphs, is_op, stored_in

SEPARATE = 4  # the IR version from which an initializer need not be an input


def make_constant(model: ir.Model) -> None:
    """Let no initializer be an input of a graph of IR 3, where each had to be one.

    Such an input is no offer to the caller: ONNX Runtime takes nothing in its place.
    """
    if model.ir_version < SEPARATE:
        model.ir_version = SEPARATE
        for graph in model.graphs():
            inputs = [value for value in graph.inputs if not value.is_initializer()]
            graph.inputs[:] = inputs


def make_liftable(model: ir.Model) -> None:
    """Let every stored tensor be one that can be lifted to the main graph.

    A function that holds tensors, itself or by what it calls, is inlined: a function has no
    initializers to share with. One that is never called goes. A tensor that a subgraph returns
    goes through an Identity.

    Raises:
        InputError: a function calls itself, or cannot be inlined.
    """
    RemoveUnusedFunctionsPass()(model)
    while holders := _holders(model):  # inlined, their callers hold the tensors
        inline(model, holders)
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


def inline(model: ir.Model, functions: Container[ir.OperatorIdentifier] | None = None) -> None:
    """Put the bodies of these functions, or of all, in the place of the nodes that call them.

    Raises:
        InputError: a function calls itself, or cannot be inlined.
    """
    chosen = None
    if functions is not None:
        chosen = lambda function: function.identifier() in functions  # noqa: E731
    try:
        InlinePass(chosen)(model)
    except (ir.passes.PassError, ir.passes.PreconditionError, ValueError) as error:
        reason = first_line(error.__cause__ or error).rstrip(".")
        raise InputError(f"a function of the model cannot be inlined: {reason}.") from error


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
    infer_types(model)

    def restore() -> None:
        for value, shape, kind in values:
            value.shape, value.type = shape, kind

    return restore


def _knows_rank(value: ir.Value | None) -> bool:
    return value is None or bool(value.shape)
