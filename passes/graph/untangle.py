"""No Transpose, Identity, Cast or Reshape stands between an initializer and its consumers."""

import math
from typing import Any

import numpy as np
import onnx_ir as ir

from ffmerge.models.manifest import Skip
from ffmerge.passes.graph.gemm import obstacle, read_transposed
from ffmerge.passes.graph.tensors import Array, is_op, rewritten, shape_of

_VIEWS = ("Transpose", "Cast", "Identity", "Reshape", "DequantizeLinear")
_D = ir.DataType
_INTEGERS = {_D.INT8, _D.INT16, _D.INT32, _D.INT64, _D.UINT8, _D.UINT16, _D.UINT32, _D.UINT64}
# Casts for which numpy, ml_dtypes and every runtime round alike: one rounding at most, to
# nearest even, and nothing outside the range of an integer.
_EXACT = (
    {(_D.FLOAT, to) for to in (_D.FLOAT16, _D.BFLOAT16, _D.DOUBLE)}
    | {(one, to) for one in (_D.FLOAT16, _D.BFLOAT16) for to in (_D.FLOAT, _D.DOUBLE)}
    | {(_D.DOUBLE, _D.FLOAT)}
    | {(one, to) for one in _INTEGERS | {_D.BOOL} for to in _INTEGERS | {_D.FLOAT, _D.DOUBLE}}
)


class UntanglePass(ir.passes.InPlacePass):
    """Every initializer of the main graph is read directly, or ``skipped`` says why not.

    1. ``Identity(W)``, and a Transpose, Cast or Reshape that changes nothing, is bypassed.
    2. If all uses of W are the same Transpose, Cast or Reshape, W takes the result's values
       under its own name. A Cast to a wider type stays: the file would grow.
    3. If W is also used otherwise, MatMul and Gemm read ``Transpose(W)`` from the raw W by
       ``transB``.
    4. Equal nodes that must stay, DequantizeLinear among them, become one, in the main graph if
       they are in several subgraphs.

    Weights that are graph inputs or outputs, or of a packed type, are left alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.skipped: list[Skip] = []

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Run cases 1 to 4 until nothing changes: a chain of nodes unfolds one at a time."""
        self.skipped = []
        modified = False
        for weight in tuple(model.graph.initializers.values()):
            while (left := _step(weight, model)) is None:
                modified = True
            self.skipped += left
        if modified:
            model.graph.sort()
        return ir.passes.PassResult(model, modified)


def _step(weight: ir.Value, model: ir.Model) -> list[Skip] | None:
    """Do the first thing that can be done (None), or return why nothing is left to do."""
    views = [node for node, index in weight.uses() if index == 0 and is_op(node, *_VIEWS)]
    if not views or weight.const_value is None:
        return []
    name = weight.name or ""
    if weight.is_graph_input() or weight.is_graph_output():
        what = "input: a caller may replace it" if weight.is_graph_input() else "output"
        return [Skip(name, f"{_says(views[0])} reads it, but it is a graph {what}")]
    free = [node for node in views if not node.outputs[0].is_graph_output()]
    kept = [
        Skip(name, f"{_says(n)} gives graph output {n.outputs[0].name}")
        for n in views
        if n not in free
    ]

    # Case 1
    for node in free:
        if _effect(node, weight) is None:
            _bypass(node, weight)
            return None

    # Case 2
    effects = [_effect(node, weight) for node in free]
    alone = len(free) == len(weight.uses()) and len(set(effects)) == 1
    refusal = _refusal(weight.const_value, free[0]) if free else None
    if alone and refusal is None:
        folded = _folded(weight.const_value, free[0])
        weight.const_value, weight.dtype, weight.shape = folded, folded.dtype, folded.shape
        for node in free:
            _bypass(node, weight)
        return None

    # Case 3
    opset, dtype = model.opset_imports.get("", 0), weight.const_value.dtype
    for node, effect in zip(free, effects, strict=True):
        if effect == (1, 0):
            for use in tuple(node.outputs[0].uses()):
                if obstacle(*use, dtype, opset) is None:
                    read_transposed(*use, weight, model.graph)
                    _drop_unused(node)
                    return None

    # Case 4
    for index, node in enumerate(free):
        for first, effect in zip(free[:index], effects, strict=False):
            if effect == effects[index] and _reaches(first, node, model.graph):
                _bypass(node, first.outputs[0])
                return None

    for node, effect in zip(free, effects, strict=True):
        if node.op_type == "DequantizeLinear":  # the way quantized weights are read
            continue
        uses = node.outputs[0].uses() if effect == (1, 0) else ()
        blocked = [reason for use in uses if (reason := obstacle(*use, dtype, opset))]
        why = refusal or (blocked[0] if blocked else "the weight is also read otherwise")
        kept.append(Skip(name, f"{_says(node)} stays: {why}"))
    return kept


def _says(node: ir.Node) -> str:
    return f"{node.op_type} node {node.name}"


def _reaches(first: ir.Node, node: ir.Node, main: ir.Graph) -> bool:
    """Say whether ``node`` can read what ``first`` gives, moved to the main graph if need be."""
    if first.graph not in (node.graph, main):
        if not all(
            value and value.graph is main and value.is_initializer() for value in first.inputs
        ):
            return False
        assert first.graph is not None
        first.graph.remove(first)
        main.insert_before(main[0], first)
    return True


def _effect(node: ir.Node, weight: ir.Value) -> Any:
    """Return what a node does to the weight, equal for equal nodes; None if it changes nothing."""
    tensor = weight.const_value
    assert tensor is not None
    if node.op_type == "Reshape":
        dims = _target(node, tensor)
        return None if dims == shape_of(tensor) else ("Reshape", dims or node.inputs[1])
    if node.op_type == "DequantizeLinear":
        settings = sorted((name, attribute.value) for name, attribute in node.attributes.items())
        return ("DequantizeLinear", node.inputs[1:], tuple(settings))
    if node.op_type == "Transpose":
        axes = tuple(range(len(tensor.shape)))
        order = tuple(node.attributes.get_ints("perm") or axes[::-1])
        return None if order == axes else order
    return None if node.op_type == "Identity" or _cast(node) == tensor.dtype else _cast(node)


def _cast(node: ir.Node) -> ir.DataType:
    return ir.DataType(node.attributes["to"].as_int())


def _target(node: ir.Node, tensor: ir.TensorProtocol) -> tuple[int, ...] | None:
    """Return the shape a Reshape gives, or None if that is not known here."""
    if len(node.inputs) < 2:  # before opset 5
        dims = list(node.attributes.get_ints("shape") or ())
    else:
        shape = node.inputs[1] and ir.convenience.get_const_tensor(node.inputs[1])
        if not shape:
            return None
        dims = shape.numpy().tolist()
    if not tensor.size or node.attributes.get_int("allowzero"):
        return None
    old = shape_of(tensor)
    dims = [old[axis] if size == 0 else size for axis, size in enumerate(dims)]
    known = math.prod(size for size in dims if size != -1)
    return tuple(tensor.size // known if size == -1 else size for size in dims)


def _refusal(tensor: ir.TensorProtocol, node: ir.Node) -> str | None:
    """Return why the node's result is not stored in place of the tensor, or None."""
    if node.op_type == "DequantizeLinear":
        return "quantized weights stay quantized"
    if node.op_type == "Reshape" and _target(node, tensor) is None:
        return "its shape is not known here"
    if tensor.dtype == ir.DataType.STRING or tensor.dtype.bitwidth < 8:
        return f"{tensor.dtype} is not stored element by element"
    if node.op_type == "Cast":
        target = _cast(node)
        if (tensor.dtype, target) not in _EXACT:
            return f"{tensor.dtype} to {target} may round differently in the runtime"
        if target.itemsize > tensor.dtype.itemsize:
            grown = int((target.itemsize - tensor.dtype.itemsize) * tensor.size)
            return f"as {target} the weight would take {grown} bytes more"
    return None


def _folded(tensor: ir.TensorProtocol, node: ir.Node) -> ir.LazyTensor:
    shape = shape_of(tensor)
    if node.op_type == "Cast":
        target = _cast(node)

        def cast(values: Array) -> Array:
            with np.errstate(over="ignore"):  # to infinity, as in the runtime
                return values.astype(target.numpy())

        return rewritten(tensor, cast, target, shape)
    if node.op_type == "Reshape":
        dims = _target(node, tensor) or ()
        return rewritten(tensor, lambda values: values.reshape(dims), tensor.dtype, dims)
    order = node.attributes.get_ints("perm") or range(len(shape))[::-1]
    turned = [shape[axis] for axis in order]
    return rewritten(tensor, lambda values: np.transpose(values, order), tensor.dtype, turned)


def _bypass(node: ir.Node, value: ir.Value) -> None:
    node.outputs[0].replace_all_uses_with(value)
    _drop_unused(node)


def _drop_unused(node: ir.Node) -> None:
    if not node.outputs[0].uses() and node.graph is not None:
        node.graph.remove(node, safe=True)
