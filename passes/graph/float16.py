"""Weights and arithmetic in float16; inputs, outputs and what float16 cannot hold in float32.

First the nodes that stay float32 are found (:func:`_wide`); then weights become float16 where all
their readers do, the other nodes compute in it, and casts are put where the two meet.
"""

from collections.abc import Container, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from ffmerge.models.manifest import Skip
from ffmerge.passes.graph.tensors import Array, is_op, rewritten, shape_of, stored, values_of

_FLOAT, _HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
# Ops whose result leaves float16's range or digits where the model's values do not (squares,
# sums, angles), whose type is an attribute or a contract, or that runtimes lack in float16.
BLOCKED = {
    "Bernoulli", "Cos", "CumSum", "DequantizeLinear", "DynamicQuantizeLinear", "Exp", "EyeLike",
    "GRU", "If", "LSTM", "Log", "Loop", "Max", "Min", "Multinomial", "NonMaxSuppression",
    "QuantizeLinear", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike",
    "Range", "Reciprocal", "ReduceL2", "ReduceMean", "ReduceSum", "ReduceSumSquare", "Resize",
    "Scan", "Sin", "Sqrt", "TopK", "Upsample",
}  # fmt: skip
SMALL = 1024  # bytes up to which a constant is cast for some of its consumers
# From where on a constant is a mask's minus infinity, and what it becomes: two may be added.
MASK, LIMIT = 1e30, 32768
_RANGE = np.finfo(np.float16)

_Weights = Mapping[ir.Value, ir.TensorProtocol]


def to_float16(model: ir.Model) -> Iterator[Skip]:
    """Convert a model with known types in place; yield the weights that stay float32, and why.

    A value is cast once for all who need the other type. The consumers of a weight are all of
    one precision, so that no second copy of it is stored or made at load.
    """
    main = model.graph
    nodes = list(ir.traversal.RecursiveGraphIterator(main))
    weights = _float_weights(model)
    wide = _wide(main, nodes, weights)
    halves: set[ir.Value] = set()  # values that are float16 now
    for weight, tensor in weights.items():
        blocked = [node for node in weight.consumers() if node in wide]
        if not blocked and weight.graph is main and not _seen_outside(weight):
            weight.const_value = rewritten(tensor, _halved, _HALF, shape_of(tensor))
            halves.add(weight)
        elif tensor.nbytes > SMALL:
            yield Skip(weight.name or "", f"FLOAT: {_reader(blocked, weights)} reads it in float32")
    for node in nodes:
        if node not in wide:
            halves |= _halve(node)
    casts = _cast_outputs(main, halves)
    for node in nodes:
        if node in wide:
            _cast_inputs(node, halves, _FLOAT, casts)
        else:
            floats = [value for value in node.inputs if value and _type(value) == _FLOAT]
            _cast_inputs(node, floats, _HALF, casts)


def _float_weights(model: ir.Model) -> _Weights:
    weights = {}
    for item in stored(model):
        if item.tensor.dtype == _FLOAT and item.value.is_initializer():
            weights[item.value] = item.tensor
    return weights


def _reader(blocked: Sequence[ir.Node], weights: _Weights) -> str:
    """Say which node keeps a weight in float32: one that must itself, before one beside it."""
    for node in (*(node for node in blocked if _blocked(node, weights)), *blocked):
        return f"{node.op_type} node {node.name}"
    return "the caller"


def _cast_outputs(main: ir.Graph, halves: Container[ir.Value]) -> dict[ir.Value, ir.Value]:
    """Let the graph's outputs be float32 under their names; return the casts by what they read."""
    casts = {}
    for index, output in enumerate(main.outputs):
        if output in halves:
            main.outputs[index] = casts[output] = _cast(output, _FLOAT)
            casts[output].name, output.name = output.name, f"{output.name}/float16"
    return casts


def _cast_inputs(
    node: ir.Node, values: Container[ir.Value], to: ir.DataType, casts: dict[ir.Value, ir.Value]
) -> None:
    """Let a node read those of its inputs that are ``values`` through a cast, made if need be."""
    for index, value in enumerate(node.inputs):
        if value is not None and value in values:
            if value not in casts:
                casts[value] = _cast(value, to)
            node.replace_input_with(index, casts[value])


def _wide(main: ir.Graph, nodes: Sequence[ir.Node], weights: _Weights) -> set[ir.Node]:
    """Return the nodes that stay float32: blocked ones, and what lies or is read between them."""
    wide = {node for node in nodes if node.graph is not main or _blocked(node, weights)}
    before = -1
    while before < len(wide):
        before = len(wide)
        for weight, tensor in weights.items():
            if tensor.nbytes > SMALL and not wide.isdisjoint(weight.consumers()):
                wide.update(weight.consumers())
        wide |= _fed_by(wide, nodes, weights) & _read_by(wide, nodes)
    return wide


def _fed_by(wide: set[ir.Node], nodes: Sequence[ir.Node], weights: _Weights) -> set[ir.Node]:
    """Return the nodes all of whose float32 values come from ``wide`` ones, and those."""
    found = set(wide)
    for node in nodes:
        floats = [v for v in node.inputs if v and _type(v) == _FLOAT and v not in weights]
        if floats and all(value.producer() in found for value in floats):
            found.add(node)
    return found


def _read_by(wide: set[ir.Node], nodes: Sequence[ir.Node]) -> set[ir.Node]:
    """Return the nodes that only ``wide`` ones read, and those."""
    found = set(wide)
    for node in reversed(nodes):
        uses = [use.node for out in node.outputs for use in out.uses()]
        if uses and found.issuperset(uses) and not any(map(_seen_outside, node.outputs)):
            found.add(node)
    return found


def _blocked(node: ir.Node, weights: _Weights) -> bool:
    values = [value for value in (*node.inputs, *node.outputs) if value is not None]
    if not is_op(node, node.op_type) or node.op_type in BLOCKED:
        return True
    if any(_type(v) is None or isinstance(v.type, ir.SequenceType) for v in values):
        return True
    squared = is_op(node, "Mul", "Pow") and any(
        use.node.op_type.startswith("Reduce") for use in node.outputs[0].uses()
    )
    counted = is_op(node, "Cast") and _type(values[0]) not in (_FLOAT, _HALF, ir.DataType.BOOL)
    return squared or counted or any(_lossy(weights[v]) for v in values if v in weights)


def _lossy(tensor: ir.TensorProtocol) -> bool:
    """Say whether float16 loses a constant: beyond its range, or a small tensor's value to 0."""
    sizes = np.abs(values_of(tensor))
    beyond = (sizes > _RANGE.max) & (sizes < MASK)
    lost = (sizes > 0) & (sizes < _RANGE.smallest_subnormal) & (tensor.nbytes <= SMALL)
    return bool((beyond | lost).any())


def _halve(node: ir.Node) -> set[ir.Value]:
    """Let a node compute in float16; return its outputs that are no longer float32."""
    if is_op(node, "Cast") and node.attributes["to"].as_int() == _FLOAT:
        node.attributes.add(ir.AttrInt64("to", _HALF))
    elif is_op(node, "ConstantOfShape") and _type(node.outputs[0]) == _FLOAT:
        given = node.attributes.get("value")
        value = values_of(given.as_tensor()) if given else np.zeros(1, np.float32)
        node.attributes.add(ir.AttrTensor("value", ir.Tensor(_halved(value))))
    changed = {output for output in node.outputs if _type(output) == _FLOAT}
    for output in changed:
        output.dtype = _HALF
    return changed


def _halved(values: Array) -> Array:
    masking = np.isfinite(values) & (np.abs(values) >= MASK)
    return np.where(masking, np.copysign(LIMIT, values), values).astype(np.float16)


def _cast(value: ir.Value, to: ir.DataType) -> ir.Value:
    name = f"{value.name}/{to.name.lower()}"
    result = ir.Value(name=name, type=ir.TensorType(to), shape=value.shape)
    attributes = [ir.AttrInt64("to", to)]
    assert value.graph is not None
    value.graph.append(ir.Node("", "Cast", [value], attributes, outputs=[result], name=name))
    return result


def _seen_outside(value: ir.Value) -> bool:
    return value.is_graph_input() or value.is_graph_output()


def _type(value: ir.Value) -> ir.DataType | None:
    return value.const_value.dtype if value.const_value is not None else value.dtype
