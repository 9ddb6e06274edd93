"""Another version of the standard operators, where ONNX's converter knows the way.

``onnxscript.version_converter`` wraps the same converter, but where that fails it leaves the model
as it is and only logs why; here the reason is the error's text.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import onnx
import onnx.version_converter
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass, LiftConstantsToInitializersPass

from ffmerge.errors import InputError
from ffmerge.passes.graph.tensors import is_op, shape_of

OLDEST = 7  # what ONNX Runtime still runs
HEAVY = 4096  # bytes from which a tensor is kept from the converter, which copies what it reads


def to_opset(model: ir.Model, target: int) -> ir.Model:
    """Return the model at another opset, its weights untouched and never in memory.

    Functions are inlined, Constants become initializers. Every operator, attribute and input
    of the result exists at ``target``; the converter alone does not promise that.

    Raises:
        InputError: ``target`` is not known, or an operator has no equivalent there.
    """
    current, known = model.opset_imports.get("", 0), onnx.defs.onnx_opset_version()
    if not OLDEST <= target <= known:
        raise InputError(f"opset {target} is not one of {OLDEST} to {known}.")
    if current == target:
        return model
    refusal = f"the model cannot go from opset {current} to {target}"
    # The converter finds the axes of a reduction in an initializer, not in every Constant.
    lift = LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)
    model = ir.passes.Sequential(InlinePass(), lift)(model).model
    with _weights_taken_out(model) as weights:
        try:
            proto = onnx.version_converter.convert_version(ir.to_proto(model), target)
            converted = ir.from_proto(proto)
        except Exception as error:  # the converter raises whatever its C++ asserts
            reason = str(error).splitlines()[0].split("failed: ")[-1].rstrip(".").replace("$", "")
            raise InputError(f"{refusal}: {reason}.") from error
    for name, tensor in weights.items():
        if name in converted.graph.initializers:
            converted.graph.initializers[name].const_value = tensor
    for node in ir.traversal.RecursiveGraphIterator(converted.graph):
        if is_op(node, node.op_type) and (unknown := _unknown(node, target)):
            raise InputError(f"{refusal}: {unknown}.")
    converted.metadata_props.update(model.metadata_props)
    needed = onnx.helper.find_min_ir_version_for(proto.opset_import)
    converted.ir_version = max(model.ir_version, needed)
    return converted


@contextmanager
def _weights_taken_out(model: ir.Model) -> Iterator[dict[str, ir.TensorProtocol]]:
    """Yield the large tensors of a model by name; meanwhile data that is not there stands in."""
    weights = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is not None and tensor.nbytes >= HEAVY:
            weights[name] = tensor
            shape = ir.Shape(shape_of(tensor))
            value.const_value = ir.ExternalTensor(
                "weights", 0, tensor.nbytes, tensor.dtype, shape=shape, name=name
            )
    try:
        yield weights
    finally:
        for name, tensor in weights.items():
            model.graph.initializers[name].const_value = tensor


def _unknown(node: ir.Node, opset: int) -> str | None:
    """Return what of a node does not exist at an opset, or None."""
    where = f"{node.op_type} node {node.name}"
    try:
        schema = onnx.defs.get_schema(node.op_type, opset, "")
    except onnx.defs.SchemaError:
        return f"{where} has no equivalent"
    strange = [name for name in node.attributes if name not in schema.attributes]
    if strange or schema.deprecated or len(node.inputs) > schema.max_input:
        return f"{where} has {strange or 'a form'} that it has not there"
    return None
