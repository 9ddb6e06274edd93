"""Weights and arithmetic in float16; inputs, outputs and what float16 cannot hold in float32.

First the nodes that compute in float16 are found (:func:`_narrow`); then weights become float16
where all their readers take them so, and casts are put where the two meet. Branches and bodies of
loops are as the main graph: float32 comes in and goes out, between is float16.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from ffmerge.models.manifest import Skip
from ffmerge.passes.graph.kernels import HalfForm, Kernels, plain_type
from ffmerge.passes.graph.rewrite import cast
from ffmerge.passes.graph.share import names_of
from ffmerge.passes.graph.tensors import (
    NOTABLE,
    Array,
    is_op,
    rewritten,
    shape_of,
    stored,
    values_of,
)

_FLOAT, _HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
# What leaves float16's range or digits where the model's values do not: sums, squares, angles,
# exponents, random numbers. Which operators there are in float16 at all, kernels.py finds.
SENSITIVE = {
    "Acosh", "Asinh", "Atanh", "BatchNormalization", "Bernoulli", "Cos", "Cosh", "CumProd",
    "CumSum", "Det", "Exp", "GlobalLpPool", "Log", "LpNormalization", "LpPool",
    "MeanVarianceNormalization", "Multinomial", "NegativeLogLikelihoodLoss", "RandomNormalLike",
    "RandomUniformLike", "Reciprocal", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp",
    "ReduceMean", "ReduceProd", "ReduceSum", "ReduceSumSquare", "Sin", "Sinh",
    "SoftmaxCrossEntropyLoss", "Sqrt", "Tan",
}  # fmt: skip
# What other runtimes lack in float16 (WebGPU), though ONNX Runtime loads it on a CPU.
LACKING = ("Resize", "Upsample")
# From where on a constant is a mask's minus infinity, and what it becomes: two may be added.
MASK, LIMIT = 1e30, 32768
SCORES = 3  # the output of Attention that gives what its softmax reads
_RANGE = np.finfo(np.float16)

_Weights = Mapping[ir.Value, ir.TensorProtocol]
_Forms = dict[ir.Node, HalfForm]


def to_float16(model: ir.Model) -> Iterator[Skip]:
    """Convert a model with known types in place; yield the weights that stay float32, and why.

    A value is cast once for all who need the other type. The consumers of a weight are all of
    one precision, so that no second copy of it is stored or made at load.
    """
    nodes = [node for graph in model.graphs() for node in graph]
    weights = _float_weights(model)
    forms = _forms(model, nodes, weights)
    narrow = _narrow(forms, nodes, weights)
    halves: set[ir.Value] = set()  # values that are float16 now
    for weight, tensor in weights.items():
        blocked = [use.node for use in weight.uses() if not _is_half(use, narrow)]
        if not blocked and weight.graph is model.graph and not _seen_outside(weight):
            weight.const_value = rewritten(tensor, _halved, _HALF, shape_of(tensor))
            halves.add(weight)
        elif tensor.nbytes > NOTABLE:
            reason = f"FLOAT: {_reader(blocked, forms)} reads it in float32"
            yield from (Skip(name, reason) for name in names_of(weight))
    floats = {value for node in nodes for value in node.inputs if value and _is_float(value)}
    floats -= halves
    for node, form in narrow.items():
        halves |= _halve(node, form)
    _cast(model, halves, floats, narrow)


def _is_float(value: ir.Value) -> bool:
    return plain_type(value) == _FLOAT


def _float_weights(model: ir.Model) -> _Weights:
    weights = {}
    for item in stored(model):
        if item.tensor.dtype == _FLOAT and item.value.is_initializer():
            weights[item.value] = item.tensor
    return weights


def _is_half(use: Any, narrow: _Forms) -> bool:
    form = narrow.get(use.node)
    return form is not None and use.idx in form.inputs


def _reader(blocked: Sequence[ir.Node], forms: _Forms) -> str:
    """Say which node keeps a weight in float32: one that must itself, before one beside it."""
    for node in sorted(blocked, key=lambda node: node in forms):
        return f"{node.op_type} node {node.name}"
    return "the caller"


def _cast(model: ir.Model, halves: set[ir.Value], floats: set[ir.Value], narrow: _Forms) -> None:
    """Cast where a value is of another precision than who reads it."""
    nodes = [node for graph in model.graphs() for node in graph]
    casts: dict[ir.Value, ir.Value] = {}
    for graph in model.graphs():
        _cast_outputs(graph, halves, casts)
    for node in nodes:
        for use in enumerate(tuple(node.inputs)):
            _cast_input(node, *use, halves, floats, narrow.get(node), casts)


def _cast_outputs(graph: ir.Graph, halves: set[ir.Value], casts: dict[ir.Value, ir.Value]) -> None:
    """Let a graph's outputs be float32 under their names; add the casts by what they read."""
    for index, output in enumerate(graph.outputs):
        if output not in halves:
            continue
        if output not in casts:
            casts[output] = cast(output, _FLOAT)
            casts[output].name, output.name = output.name, f"{output.name}/float16"
            casts[output].doc_string, output.doc_string = output.doc_string, None
            casts[output].metadata_props.update(output.metadata_props)
        graph.outputs[index] = casts[output]


def _cast_input(
    node: ir.Node,
    index: int,
    value: ir.Value | None,
    halves: set[ir.Value],
    floats: set[ir.Value],
    form: HalfForm | None,
    casts: dict[ir.Value, ir.Value],
) -> None:
    """Let a node read an input in the precision in which it computes."""
    if value is None:
        return
    wants_half = form is not None and index in form.inputs
    if value in halves and not wants_half:
        to = _FLOAT
    elif value in floats and value not in halves and wants_half:
        to = _HALF
    else:
        return
    if value not in casts:
        casts[value] = cast(value, to)
    node.replace_input_with(index, casts[value])


def _forms(model: ir.Model, nodes: Sequence[ir.Node], weights: _Weights) -> _Forms:
    """Return the float16 forms of the nodes that have one, and no constant that it would lose."""
    kernels = Kernels(model)
    forms: _Forms = {}
    lossy = {weight for weight, tensor in weights.items() if _lossy(tensor)}
    for node in nodes:
        if lossy.isdisjoint(node.inputs) and (form := _form(node, kernels)):
            forms[node] = form
    return forms


def _narrow(forms: _Forms, nodes: Sequence[ir.Node], weights: _Weights) -> _Forms:
    """Return the nodes that compute in float16.

    All others are float32: those without a form, what reads a weight that one of those reads,
    and what lies between them, but for what reads a weight of its own.
    """
    large = [weight for weight, tensor in weights.items() if tensor.nbytes > NOTABLE]
    reading = {node for weight in large for node in weight.consumers()}
    free = [node for node in nodes if node not in reading]
    wide = set(nodes) - forms.keys()
    before = -1
    while before < len(wide):
        before = len(wide)
        for weight in large:
            if any(use.node in wide or not _is_half(use, forms) for use in weight.uses()):
                wide.update(weight.consumers())
        wide |= _fed_by(wide, free, weights) & _read_by(wide, free)
    return {node: form for node, form in forms.items() if node not in wide}


def _fed_by(wide: set[ir.Node], nodes: Sequence[ir.Node], weights: _Weights) -> set[ir.Node]:
    """Return the nodes all of whose float32 values come from ``wide`` ones or are constants."""
    found = set(wide)
    for node in nodes:
        floats = [v for v in node.inputs if v and _is_float(v) and v not in weights]
        if all(value.producer() in found for value in floats):
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


def _form(node: ir.Node, kernels: Kernels) -> HalfForm | None:
    """Return the float16 form of a node, None where it has none or may not compute in it."""
    if is_op(node, "ConstantOfShape"):
        return HalfForm(frozenset(), frozenset({0}) if _is_float(node.outputs[0]) else frozenset())
    if (
        is_op(node, *SENSITIVE, *LACKING)
        or node.attributes.get_string("reduction", "none") != "none"
    ):
        return None
    if is_op(node, "Cast"):
        return _form_of_cast(node)
    if is_op(node, "Attention") and len(node.outputs) > SCORES and node.outputs[SCORES].name:
        return None  # scores hold the infinity of masks
    squared = is_op(node, "Mul", "Pow") and any(
        use.node.op_type.startswith("Reduce") for use in node.outputs[0].uses()
    )
    return None if squared or _decides(node) else kernels.form(node)


def _decides(node: ir.Node) -> bool:
    """Say whether a node makes truth values or integers of values: comparisons, casts to integers.

    float16 counts to 2,048: sizes, positions and lengths beyond would be compared or rounded wrong.
    """
    decisions = (ir.DataType.BOOL, ir.DataType.INT32, ir.DataType.INT64)
    made = {plain_type(output) for output in node.outputs}
    return made.issubset(decisions) and not is_op(node, "Shape", "Size")


def _form_of_cast(node: ir.Node) -> HalfForm | None:
    """A Cast of a number that counts is not made float16, which counts to 2,048."""
    given, made = (plain_type(value) for value in (node.inputs[0], node.outputs[0]) if value)
    if given not in (_FLOAT, _HALF, ir.DataType.BOOL) or _decides(node):
        return None
    inputs = frozenset({0}) if given == _FLOAT else frozenset[int]()
    return HalfForm(inputs, frozenset({0}) if made == _FLOAT else frozenset())


def _lossy(tensor: ir.TensorProtocol) -> bool:
    """Say whether float16 loses a constant: beyond its range, or a small tensor's value to 0."""
    sizes = np.abs(values_of(tensor))
    beyond = (sizes > _RANGE.max) & (sizes < MASK)
    lost = (sizes > 0) & (sizes < _RANGE.smallest_subnormal) & (tensor.nbytes <= NOTABLE)
    return bool((beyond | lost).any())


def _halve(node: ir.Node, form: HalfForm) -> set[ir.Value]:
    """Let a node compute in float16; return its outputs that are no longer float32."""
    if is_op(node, "Cast") and form.outputs:
        node.attributes.add(ir.AttrInt64("to", _HALF))
    elif is_op(node, "ConstantOfShape") and form.outputs:
        given = node.attributes.get("value")
        value = values_of(given.as_tensor()) if given else np.zeros(1, np.float32)
        node.attributes.add(ir.AttrTensor("value", ir.Tensor(_halved(value))))
    changed = {node.outputs[index] for index in form.outputs if _is_float(node.outputs[index])}
    for output in changed:
        output.type = ir.TensorType(_HALF)  # its type may be that of other values, too
    return changed


def _halved(values: Array) -> Array:
    masking = np.isfinite(values) & (np.abs(values) >= MASK)
    return np.where(masking, np.copysign(LIMIT, values), values).astype(np.float16)


def _seen_outside(value: ir.Value) -> bool:
    return value.is_graph_input() or value.is_graph_output()
