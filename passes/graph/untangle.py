"""No Transpose, Identity, Cast or Reshape stands between an initializer and its consumers."""

import math
from typing import Any

import numpy as np
import onnx_ir as ir

from ffmerge.models.manifest import Skip
from ffmerge.passes.graph.tensors import Array, is_op, rewritten, shape_of
from ffmerge.passes.graph.transposed import obstacle, read_transposed

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

    effects, results = [], []
    for node in free:
        effect, result = _change(node, weight.const_value)
        if effect is None:  # case 1
            _bypass(node, weight)
            return None
        effects.append(effect)
        results.append(result)

    # Case 2
    alone = len(free) == len(weight.uses()) and len(set(effects)) == 1
    if alone and not isinstance(folded := results[0], str):
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

    for node, effect, result in zip(free, effects, results, strict=True):
        if node.op_type == "DequantizeLinear":  # the way quantized weights are read
            continue
        uses = node.outputs[0].uses() if effect == (1, 0) else ()
        reasons = [result, *(obstacle(*use, dtype, opset) for use in uses)]
        reasons.append("the weight is also read otherwise")
        why = next(reason for reason in reasons if isinstance(reason, str))
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


def _change(node: ir.Node, tensor: ir.TensorProtocol) -> tuple[Any, ir.LazyTensor | str]:
    """Return what a node does to a tensor and its result, or why that is not stored instead.

    The first is equal for nodes that do the same, and None if they change nothing.
    """
    effect: Any
    shape, dtype = shape_of(tensor), tensor.dtype
    if node.op_type == "DequantizeLinear":
        settings = sorted((name, attribute.value) for name, attribute in node.attributes.items())
        return (node.op_type, node.inputs[1:], tuple(settings)), "quantized weights stay quantized"
    if node.op_type == "Transpose":
        order = tuple(node.attributes.get_ints("perm") or range(len(shape))[::-1])
        effect = None if order == tuple(range(len(shape))) else order
        turned = [shape[axis] for axis in order]
        result = rewritten(tensor, lambda values: np.transpose(values, order), dtype, turned)
    elif node.op_type == "Reshape":
        dims = _target(node, tensor)
        if dims is None:
            return ("Reshape", node.inputs[1]), "its shape is not known here"
        effect = None if dims == shape else ("Reshape", dims)
        result = rewritten(tensor, lambda values: values.reshape(dims), dtype, dims)
    elif node.op_type == "Cast":
        target = ir.DataType(node.attributes["to"].as_int())
        effect = None if target == dtype else target
        if (dtype, target) not in _EXACT:
            return effect, f"{dtype} to {target} may round differently in the runtime"
        if target.itemsize > dtype.itemsize:
            grown = int((target.itemsize - dtype.itemsize) * tensor.size)
            return effect, f"as {target} the weight would take {grown} bytes more"
        result = rewritten(tensor, lambda values: _rounded(values, target), target, shape)
    else:
        return None, ""
    packed = dtype == ir.DataType.STRING or dtype.bitwidth < 8
    return effect, f"{dtype} is not stored element by element" if packed else result


def _rounded(values: Array, target: ir.DataType) -> Array:
    with np.errstate(over="ignore"):  # to infinity, as in the runtime
        return values.astype(target.numpy())


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


def _bypass(node: ir.Node, value: ir.Value) -> None:
    node.outputs[0].replace_all_uses_with(value)
    _drop_unused(node)


def _drop_unused(node: ir.Node) -> None:
    if not node.outputs[0].uses() and node.graph is not None:
        node.graph.remove(node, safe=True)
