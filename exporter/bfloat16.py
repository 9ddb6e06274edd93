"""Parts that a float32 model computes in bfloat16, for runtimes without kernels of that type.

Falcon's position biases are such a part. ``torch_onnx.py`` calls :func:`compute_in_float32` on
every translated graph. PyTorch computes an operator of bfloat16 in float32 and rounds what comes
out, and so does the graph then.
"""

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

_MOVES = frozenset(["Cast", "CastLike", "Identity"])  # these have kernels of every type


def compute_in_float32(model: ir.Model) -> None:
    """Let every node that reads bfloat16 read it as float32 and round what it gives, in place."""
    nodes = list(model.graph.all_nodes())
    if not any(_is_bfloat16(value) for node in nodes for value in node.outputs):
        return
    ShapeInferencePass()(model)  # values inside of a translated operator have no type yet
    for node in nodes:
        read = [value for value in node.inputs if value is not None and _is_bfloat16(value)]
        if node.op_type in _MOVES or not read:
            continue
        for index, value in enumerate(node.inputs):
            if value in read:
                node.replace_input_with(index, _cast(value, ir.DataType.FLOAT, node, before=True))
        for value in node.outputs:
            if value.dtype != ir.DataType.BFLOAT16:
                continue
            users = list(value.uses())
            value.dtype = ir.DataType.FLOAT
            rounded = _cast(value, ir.DataType.BFLOAT16, node, before=False)
            for user, index in users:
                user.replace_input_with(index, rounded)


def _is_bfloat16(value: ir.Value) -> bool:
    """Tell the type of a value, of a constant by its tensor."""
    constant = ir.convenience.get_const_tensor(value)
    if constant is not None:
        return constant.dtype == ir.DataType.BFLOAT16
    return value.dtype == ir.DataType.BFLOAT16


def _cast(value: ir.Value, dtype: ir.DataType, beside: ir.Node, before: bool) -> ir.Value:
    """Return a value in another type, by a node before or after the one that reads or gives it."""
    cast = ir.node("Cast", [value], {"to": dtype})
    cast.outputs[0].dtype, cast.outputs[0].shape = dtype, value.shape
    assert beside.graph is not None
    if before:
        beside.graph.insert_before(beside, cast)
    else:
        beside.graph.insert_after(beside, cast)
    return cast.outputs[0]
