"""Another version of the standard operators, where ONNX's converter knows the way.

``onnxscript.version_converter`` wraps the same converter, but where that fails it leaves the model
as it is and only logs why; here the reason is the error's text.
"""

import onnx
import onnx.version_converter
import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from ffmerge.errors import InputError, first_line
from ffmerge.passes.graph.infer import weights_taken_out
from ffmerge.passes.graph.prepare import inline, make_constant
from ffmerge.passes.graph.tensors import is_op

UNBATCHED = 9  # the opset from which Scan has no batch axis, which the converter does not know
OLDEST = 7  # what ONNX Runtime still runs


def to_opset(model: ir.Model, target: int) -> ir.Model:
    """Return the model at another opset, its weights untouched and never in memory.

    Functions are inlined, Constants become initializers. Every operator, attribute and input
    of the result exists at ``target``; the converter alone does not promise that.

    Raises:
        InputError: ``target`` is not known, or an operator or a form of it is not there.
    """
    current, known = model.opset_imports.get("", 0), onnx.defs.onnx_opset_version()
    if not OLDEST <= target <= known:
        raise InputError(f"opset {target} is not one of {OLDEST} to {known}.")
    if current == target:
        return model
    make_constant(model)
    inline(model)
    _check_operators(model, target)
    refusal = f"the model has no form in opset {target}"
    # The converter finds the axes of a reduction in an initializer, not in every Constant.
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    nodes = ir.traversal.RecursiveGraphIterator(model.graph)
    if current < UNBATCHED <= target and any(is_op(node, "Scan") for node in nodes):
        raise InputError(f"{refusal}: a Scan loses its batch axis at {UNBATCHED}.")
    converted = _converted(model, target, refusal)
    for node in ir.traversal.RecursiveGraphIterator(converted.graph):
        if is_op(node, node.op_type) and (unknown := _unknown(node, target)):
            raise InputError(f"{refusal}: {unknown}.")
    converted.metadata_props.update(model.metadata_props)
    _describe(converted.graph, model.graph)
    converted.ir_version = max(model.ir_version, _least_ir_version(converted))
    return converted


def _check_operators(model: ir.Model, target: int) -> None:
    """Raise InputError where an operator came with a later opset than ``target``."""
    came: dict[str, int] = {}
    schemas = onnx.defs.get_all_schemas_with_history()
    for schema in sorted(schemas, key=lambda schema: schema.since_version):
        if schema.domain == "":
            came.setdefault(schema.name, schema.since_version)
    first, newest = target, ""
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if is_op(node, node.op_type) and came.get(node.op_type, 0) > first:
            first, newest = came[node.op_type], node.op_type
    if newest:
        raise InputError(
            f"opset {target} has no {newest}, which came with opset {first}: give that or a later "
            "one."
        )


def _converted(model: ir.Model, target: int, refusal: str) -> ir.Model:
    """Return what ONNX's converter makes of a model, with its weights, which it does not see."""
    with weights_taken_out(model) as weights:
        try:
            proto = onnx.version_converter.convert_version(ir.to_proto(model), target)
            converted = ir.from_proto(proto)
        except Exception as error:  # the converter raises whatever its C++ asserts
            reason = first_line(error).split("failed: ")[-1].rstrip(".").replace("$", "")
            raise InputError(f"{refusal}: {reason}.") from error
    for name, tensor in weights.items():
        if name in converted.graph.initializers:
            converted.graph.initializers[name].const_value = tensor
    return converted


def _least_ir_version(model: ir.Model) -> int:
    """Return the version of the file format that a model's opsets came with."""
    opsets = [onnx.helper.make_opsetid(*each) for each in model.opset_imports.items()]
    return int(onnx.helper.find_min_ir_version_for(opsets, ignore_unknown=True))


def _unknown(node: ir.Node, opset: int) -> str | None:
    """Return what of a node does not exist at an opset, or None."""
    where = f"{node.op_type} node {node.name}"
    schema = onnx.defs.get_schema(node.op_type, opset, "")
    strange = [name for name in node.attributes if name not in schema.attributes]
    if strange or schema.deprecated or len(node.inputs) > schema.max_input:
        return f"{where} has {strange or 'a form'} that it has not there"
    return None


def _describe(converted: ir.Graph, graph: ir.Graph) -> None:
    """Give a converted graph what the converter drops: documentation, metadata, denotations."""
    converted.doc_string = graph.doc_string
    converted.metadata_props.update(graph.metadata_props)
    sides = ((converted.inputs, graph.inputs), (converted.outputs, graph.outputs))
    for values, originals in sides:
        for value, original in zip(values, originals, strict=True):
            value.type, value.shape = original.type, original.shape
            value.doc_string = original.doc_string
            value.metadata_props.update(original.metadata_props)
