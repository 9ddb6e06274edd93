"""No Transpose, Identity, Cast or Reshape stands between an initializer and its consumers.

Exporters put such nodes there; ONNX Runtime folds each of them into a copy of the weight when it
loads the model, and quantizers do not see the weight behind them. The pass takes one weight after
the other, and of it one node after the other.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir

from ffmerge.models.manifest import Skip
from ffmerge.passes.graph.tensors import NOTABLE, Array, is_op, rewritten, shape_of
from ffmerge.passes.graph.transposed import obstacle, read_transposed

Effects = dict[ir.Node, Any]  # what each node does to the weight that it reads

_TURNED = (1, 0)  # the effect of the transpose of a matrix
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
            while _simplify(weight, model):
                modified = True
            self.skipped += _remaining(weight, model)
        if modified:
            model.graph.sort()
        return ir.passes.PassResult(model, modified)


def _simplify(weight: ir.Value, model: ir.Model) -> bool:
    """Do the first of the cases 1 to 4 that can be done; say whether there was one."""
    tensor = weight.const_value
    if tensor is None or _seen_outside(weight):
        return False
    effects: Effects = {}
    for node in _views(weight):
        if not node.outputs[0].is_graph_output():
            effects[node] = _effect(node, tensor)
    return (
        _bypass_without_effect(effects, weight)
        or _store_result(effects, weight)
        or _read_by_flag(effects, weight, model)
        or _merge_equal(effects, model.graph)
    )


def _views(weight: ir.Value) -> list[ir.Node]:
    return [node for node, index in weight.uses() if index == 0 and is_op(node, *_VIEWS)]


def _bypass_without_effect(effects: Effects, weight: ir.Value) -> bool:
    """Case 1, for all."""
    idle = [node for node, effect in effects.items() if effect is None]
    for node in idle:
        _bypass(node, weight)
    return bool(idle)


def _store_result(effects: Effects, weight: ir.Value) -> bool:
    """Case 2."""
    if len(effects) < len(weight.uses()) or len(set(effects.values())) != 1:
        return False
    assert weight.const_value is not None
    first = next(iter(effects))
    if _not_stored(first, weight.const_value):
        return False
    folded = _result(first, weight.const_value)
    weight.const_value, weight.dtype, weight.shape = folded, folded.dtype, folded.shape
    for node in effects:
        _bypass(node, weight)
    return True


def _read_by_flag(effects: Effects, weight: ir.Value, model: ir.Model) -> bool:
    """Case 3, for one use."""
    assert weight.const_value is not None
    opset, dtype = model.opset_imports.get("", 0), weight.const_value.dtype
    for node, effect in effects.items():
        if effect != _TURNED:
            continue
        for use in tuple(node.outputs[0].uses()):
            if obstacle(*use, dtype, opset) is None:
                read_transposed(*use, weight, model.graph)
                _drop_unused(node)
                return True
    return False


def _merge_equal(effects: Effects, main: ir.Graph) -> bool:
    """Case 4, for all pairs."""
    first_with: dict[Any, list[ir.Node]] = {}
    merged = False
    for node, effect in effects.items():
        alike = first_with.setdefault(effect, [])
        first = next((each for each in alike if _reaches(each, node, main)), None)
        if first is None:
            alike.append(node)
        else:
            _bypass(node, first.outputs[0])
            merged = True
    return merged


def _remaining(weight: ir.Value, model: ir.Model) -> Iterator[Skip]:
    """Yield why nodes are left between a weight and its consumers."""
    tensor, views, name = weight.const_value, _views(weight), weight.name or ""
    if tensor is None or not views or tensor.nbytes < NOTABLE:
        return
    if reason := _seen_outside(weight):
        yield Skip(name, f"{_says(views[0])} reads it, but it is {reason}")
        return
    inside = []
    for node in views:
        output = node.outputs[0]
        if output.is_graph_output():
            yield Skip(name, f"{_says(node)} gives graph output {output.name}")
        elif not _reads_codes(node, tensor):
            inside.append(node)
    opset = model.opset_imports.get("", 0)
    for node in inside:
        yield Skip(name, f"{_says(node)} stays: {_why_left(node, tensor, opset)}")


def _reads_codes(node: ir.Node, tensor: ir.TensorProtocol) -> bool:
    """Say whether a node is the way in which a quantized weight is read."""
    if node.op_type == "Cast" and tensor.dtype.is_integer():
        return _cast_to(node).is_floating_point()
    return node.op_type == "DequantizeLinear"


def _seen_outside(weight: ir.Value) -> str | None:
    if weight.is_graph_input():
        return "a graph input: a caller may replace it"
    if weight.is_graph_output():
        return "a graph output"
    return None


def _why_left(node: ir.Node, tensor: ir.TensorProtocol, opset: int) -> str:
    if reason := _not_stored(node, tensor):
        return reason
    if _effect(node, tensor) == _TURNED:
        for use in node.outputs[0].uses():
            if reason := obstacle(*use, tensor.dtype, opset):
                return reason
    return "the weight is also read otherwise"


def _says(node: ir.Node) -> str:
    return f"{node.op_type} node {node.name}"


def _reaches(first: ir.Node, node: ir.Node, main: ir.Graph) -> bool:
    """Say whether ``node`` can read what ``first`` gives, moved to the main graph if need be."""
    if first.graph in (node.graph, main):
        return True
    for value in first.inputs:
        if value is None or value.graph is not main or not value.is_initializer():
            return False
    assert first.graph is not None
    first.graph.remove(first)
    main.insert_before(main[0], first)
    return True


def _effect(node: ir.Node, tensor: ir.TensorProtocol) -> Any:
    """Return what a node does to a tensor: equal for nodes that do the same, None for nothing."""
    shape = shape_of(tensor)
    if node.op_type == "DequantizeLinear":
        settings = sorted((name, attribute.value) for name, attribute in node.attributes.items())
        return node.op_type, node.inputs[1:], tuple(settings)
    if node.op_type == "Transpose":
        order = _order(node, shape)
        if order != tuple(range(len(shape))):
            return order
    if node.op_type == "Reshape":
        dims = _target(node, tensor)
        if dims is None:
            return node.op_type, node.inputs[1:]
        if dims != shape:
            return node.op_type, dims
    if node.op_type == "Cast" and _cast_to(node) != tensor.dtype:
        return _cast_to(node)
    return None


def _not_stored(node: ir.Node, tensor: ir.TensorProtocol) -> str | None:
    """Return why what a node gives of a tensor is not stored instead of it, or None."""
    if node.op_type == "DequantizeLinear":
        return "quantized weights stay quantized"
    if node.op_type == "Cast" and (reason := _cast_obstacle(tensor, _cast_to(node))):
        return reason
    if node.op_type == "Reshape" and _target(node, tensor) is None:
        return "its shape is not known here"
    if tensor.dtype == ir.DataType.STRING or tensor.dtype.bitwidth < 8:
        return f"{tensor.dtype} is not stored element by element"
    return None


def _result(node: ir.Node, tensor: ir.TensorProtocol) -> ir.LazyTensor:
    """Return what a node gives of a tensor, where :func:`_not_stored` is None."""
    shape, dtype = shape_of(tensor), tensor.dtype
    if node.op_type == "Cast":
        to = _cast_to(node)
        return rewritten(tensor, lambda values: _rounded(values, to), to, shape)
    if node.op_type == "Reshape":
        dims = _target(node, tensor)
        assert dims is not None
        return rewritten(tensor, lambda values: values.reshape(dims), dtype, dims)
    order = _order(node, shape)
    turned = [shape[axis] for axis in order]
    return rewritten(tensor, lambda values: np.transpose(values, order), dtype, turned)


def _order(node: ir.Node, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the axes in the order in which a Transpose puts them."""
    return tuple(node.attributes.get_ints("perm") or range(len(shape))[::-1])


def _cast_to(node: ir.Node) -> ir.DataType:
    return ir.DataType(node.attributes["to"].as_int())


def _cast_obstacle(tensor: ir.TensorProtocol, target: ir.DataType) -> str | None:
    dtype = tensor.dtype
    if (dtype, target) not in _EXACT:
        return f"{dtype} to {target} may round differently in the runtime"
    if target.itemsize > dtype.itemsize:
        grown = int((target.itemsize - dtype.itemsize) * tensor.size)
        return f"as {target} the weight would take {grown} bytes more"
    return None


def _rounded(values: Array, target: ir.DataType) -> Array:
    with np.errstate(over="ignore"):  # to infinity, as in the runtime
        return values.astype(target.numpy())


def _target(node: ir.Node, tensor: ir.TensorProtocol) -> tuple[int, ...] | None:
    """Return the shape a Reshape gives, or None if that is not known here."""
    if not tensor.size or node.attributes.get_int("allowzero"):
        return None
    if len(node.inputs) < 2:  # before opset 5
        dims = list(node.attributes.get_ints("shape") or ())
    elif node.inputs[1] and (given := ir.convenience.get_const_tensor(node.inputs[1])):
        dims = given.numpy().tolist()
    else:
        return None
    for axis, size in enumerate(dims):
        if size == 0:
            dims[axis] = shape_of(tensor)[axis]
    if -1 in dims:
        others = -math.prod(dims)
        dims[dims.index(-1)] = tensor.size // others
    return tuple(dims)


def _bypass(node: ir.Node, value: ir.Value) -> None:
    node.outputs[0].replace_all_uses_with(value)
    _drop_unused(node)


def _drop_unused(node: ir.Node) -> None:
    if not node.outputs[0].uses() and node.graph is not None:
        node.graph.remove(node, safe=True)
