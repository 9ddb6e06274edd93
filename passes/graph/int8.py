"""Products in int8: on inputs that are quantized as they come, or in ranges measured before.

:func:`ffmerge.passes.graph.quantize.quantize` has chosen the matrices; each is stored once, as
codes and one scale for each output feature, and all its products and lookups are rewritten.

* :func:`to_dynamic` gives MatMulInteger behind DynamicQuantizeLinear, in a range for each row of
  the input, whose neighbours are spread over each other before (``models/codes.py``): no data is
  needed, and no operator but ONNX's own.
* :func:`to_static` gives QDQ form, QuantizeLinear and DequantizeLinear around float MatMuls, which
  is what NPUs take; the ranges of the inputs come from calibration batches.
* :func:`read_dequantized` is for weights that some node reads in another way than these.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from ffmerge.config import QuantizeConfig
from ffmerge.models.codes import (
    BELOW,
    HADAMARD,
    SPREAD,
    axes_of_scales,
    codes_of_rows,
    int8_codes,
    range_scale,
    spread,
)
from ffmerge.models.manifest import Skip
from ffmerge.passes.graph.calibration import Seen, measure_ranges
from ffmerge.passes.graph.matrix import Matrix, as_matmuls, looks_rows_up
from ffmerge.passes.graph.rewrite import Rewrite, bias_of, replace_tensor, store
from ffmerge.passes.graph.tensors import Array, is_op, shape_of, values_of

_FLOAT = ir.DataType.FLOAT
# Trained encoders keep a cosine of 0.994 and more (docs/runtimes.md); of 0.07 MiniLM 0.992.
MOST_LOST = 0.05  # of what a product reads, that rounding it to 8 bits may be off
# What is read of their output is read of what they are given.
MOVES = ("Concat", "Expand", "Identity", "Reshape", "Resize", "Slice", "Split", "Squeeze",
         "Transpose", "Unsqueeze")  # fmt: skip
AXES_AS_INPUT = 18  # the opset from which a reduction reads its axes as an input
ALLOW_ZERO = 14  # ... and from which a 0 in a shape can mean a dimension of no elements


def to_dynamic(model: ir.Model, matrices: Sequence[Matrix], config: QuantizeConfig) -> None:
    """MatMul and Gemm become MatMulInteger on inputs that are quantized as they come.

    Each row is divided by its largest magnitude before, and its result multiplied by it: in one
    range for all, a token with values a thousand times the others' would leave these no digits.
    Rows and weight are spread, where no lookup wants the weight as it is.
    """
    opset = model.opset_imports[""]
    # by graph, too: what one branch of an If computes the other cannot read
    quantized: dict[tuple[ir.Graph | ir.Function | None, ir.Value, bool], Sequence[ir.Value]] = {}
    for matrix in matrices:
        matrix = as_matmuls(matrix, model.graph)
        wide = _is_spread(matrix, config)
        scale = _store_codes(matrix, model.graph, config, wide)
        for node in matrix.products:
            x = node.inputs[0]
            assert x is not None
            new = Rewrite(node, model.graph)
            place = node.graph, x, wide
            if place not in quantized:
                quantized[place] = _quantize_dynamically(x, new, opset, wide)
            largest, codes, x_scale, zero = quantized[place]
            total = new.op("Cast", new.op("MatMulInteger", codes, matrix.weight, zero), to=_FLOAT)
            of_rows = new.op("Mul", total, new.op("Mul", x_scale, scale))
            new.take_place(new.op("Mul", of_rows, largest))


def _is_spread(matrix: Matrix, config: QuantizeConfig) -> bool:
    """Say whether a matrix [width, n] is stored spread, in all graphs that have it."""
    looked_up = matrix.lookups or matrix.weight.name in config.looked_up
    return not looked_up and shape_of(matrix.tensor)[0] % SPREAD == 0


def _quantize_dynamically(x: ir.Value, new: Rewrite, opset: int, wide: bool) -> Sequence[ir.Value]:
    """Return of a value the largest magnitude of each row, and codes, scale and zero point.

    They are of its rows spread if ``wide``.
    """
    name = f"{x.name}/whole"
    if wide:
        name, shape = str(x.name), new.op("Shape", x)
        parts = new.op("Reshape", x, new.constant(np.array([-1, SPREAD])))
        by = store(new.main, "hadamard", ir.Tensor(HADAMARD))  # one, when the graph is shared again
        of_none: dict[str, Any] = {"allowzero": 1} if opset >= ALLOW_ZERO else {}
        x = new.op("Reshape", new.op("MatMul", parts, by), shape, **of_none)
    inputs: list[ir.Value] = [x]
    axes: dict[str, Any] = {"axes": [-1]}
    if opset >= AXES_AS_INPUT:
        inputs, axes = [x, new.constant(np.array([-1]))], {}
    high = new.op("ReduceMax", *inputs, keepdims=1, **axes)
    low = new.op("ReduceMin", *inputs, keepdims=1, **axes)
    tiny = new.constant(np.array(np.finfo(np.float32).tiny))  # of a row of zeros
    below = new.op("Mul", low, new.constant(np.array(BELOW)))
    largest = new.op("Max", high, below, tiny)
    found = [ir.Value(name=f"{name}/{part}") for part in ("int8", "scale", "zero")]
    rows, node = new.op("Mul", x, new.op("Reciprocal", largest)), f"{name}/DynamicQuantizeLinear"
    new.nodes.append(ir.Node("", "DynamicQuantizeLinear", [rows], outputs=found, name=node))
    return [largest, *found]


def to_static(
    model: ir.Model, matrices: Sequence[Matrix], config: QuantizeConfig
) -> Iterator[Skip]:
    """Matrix products read codes, in the ranges of the calibration batches.

    Those of 16 bits, for an NPU, read and give them. Those of 8 bits read them where that loses
    little, and give float32, of which one range for all would lose most. Every weight is behind
    one DequantizeLinear. Biases stay float32: as int32 they would need the scale of one consumer's
    input.
    """
    yield from _float_biases(matrices)
    matmuls = [as_matmuls(matrix, model.graph) for matrix in matrices]
    model.graph.sort()
    products = [node for node in model.graph if is_op(node, "MatMul")]
    inputs = [value for node in products for value in _computed(node)]
    outputs = [node.outputs[0] for node in products if config.activations > 8]
    measured = list(dict.fromkeys([*inputs, *outputs]))
    ranges = measure_ranges(model, measured, config.calibration)
    yield from _left_float(measured, ranges, config.activations)
    if config.activations == 8:
        products = [node for node in products if all(x in ranges for x in _computed(node))]
    for matrix in matmuls:
        scale = _store_codes(matrix, model.graph, config)
        floats = _after("DequantizeLinear", [matrix.weight, scale], model, axis=1)
        for node in matrix.products:
            node.replace_input_with(1, floats)
    for value, seen in ranges.items():
        uses = [use for use in value.uses() if value in outputs or use.node in products]
        if uses:
            _connect(uses, _rounded(value, seen, model, config.activations))


def _float_biases(matrices: Sequence[Matrix]) -> Iterator[Skip]:
    """Yield the biases of all products, which stay as they are."""
    for matrix in matrices:
        for node in matrix.products:
            if bias := bias_of(node):
                yield Skip(bias.name or "", f"float32: the bias of Gemm node {node.name}")


def _rounded(value: ir.Value, seen: Seen, model: ir.Model, bits: int) -> ir.Value:
    """Return what codes of a value stand for, in the range in which it was seen."""
    step, zero = range_scale(seen.low, seen.high, bits)
    parts = [
        store(model.graph, f"{value.name}/scale", ir.tensor(step)),
        store(model.graph, f"{value.name}/zero", ir.tensor(zero)),
    ]
    codes = _after("QuantizeLinear", [value, *parts], model)
    return _after("DequantizeLinear", [codes, *parts], model)


def _left_float(
    measured: Sequence[ir.Value], ranges: dict[ir.Value, Seen], bits: int
) -> Iterator[Skip]:
    """Drop the ranges of values of which 8 bits lose too much; yield what has none, and why."""
    for value in measured:
        if value not in ranges:
            yield Skip(value.name or "", "float32: on the data it is not finite")
        elif bits == 8 and (lost := ranges[value].lost(bits)) > MOST_LOST:
            yield Skip(value.name or "", f"float32: in 8 bits it is {lost:.1%} off")
            del ranges[value]


def _computed(node: ir.Node) -> list[ir.Value]:
    """Return what a node reads that is not stored."""
    return [value for value in node.inputs if value is not None and value.const_value is None]


def read_dequantized(weight: ir.Value, model: ir.Model) -> str:
    """Store a weight as int8 and let all its consumers read one DequantizeLinear of it; say so.

    Of several matrices each row has a scale, which that operator has no place for: they are
    multiplied by these, where they are looked up only those that are found. What is cut or turned
    first is multiplied by its scales too: ONNX Runtime then does all of it once, when it loads the
    graph. Behind a DequantizeLinear it would not, and move a Transpose beyond a Resize, which its
    kernel refuses.
    """
    assert weight.const_value is not None
    axes, uses = axes_of_scales(shape_of(weight.const_value)), weight.uses()
    codes, scale = codes_of_rows(values_of(weight.const_value))
    replace_tensor(weight, ir.Tensor(codes))
    moved = any(is_op(node, *MOVES) for node, _ in uses)
    if len(axes) == 1 and not moved:
        scales = store(model.graph, f"{weight.name}/scale", ir.Tensor(scale.reshape(-1)))
        _connect(uses, _after("DequantizeLinear", [weight, scales], model, axis=axes[0]))
        return "through one DequantizeLinear"
    scales = store(model.graph, f"{weight.name}/scale", ir.Tensor(scale))
    if axes[0] == 0 and all(index == 0 and looks_rows_up(node) for node, index in uses):
        for node, _ in tuple(uses):
            found = Rewrite(node, model.graph)
            _look_up(found, weight, found.op("Gather", scales, node.inputs[1]))
        return "a scale for each row"
    if moved:
        floats = _after("Cast", [weight], model, to=_FLOAT)
    else:
        one = store(model.graph, f"{weight.name}/one", ir.tensor(np.float32(1)))
        floats = _after("DequantizeLinear", [weight, one], model)
    _connect(uses, _after("Mul", [floats, scales], model))
    return "a scale for each row"


def most_off(values: Array) -> float:
    """Return by how much 8 bits change what is no matrix at most."""
    codes, scale = codes_of_rows(values)
    return float(np.abs(codes * scale - values).max())


def _store_codes(
    matrix: Matrix, main: ir.Graph, config: QuantizeConfig, wide: bool = False
) -> ir.Value:
    """Store a weight as int8, spread if ``wide``, let lookups scale what they find.

    Return its scales. They are one for each column where the weight is multiplied by, in this graph
    or in another, else one for each row.
    """
    weight = matrix.weight
    by_column = bool(matrix.products) or weight.name in config.multiplied
    values = values_of(matrix.tensor)
    if wide:
        values = spread(values.T).T
    if by_column:
        codes, scales = int8_codes(values, 0, paired=True)
        scales = scales.squeeze()
    else:
        codes, scales = int8_codes(values, 1)
    replace_tensor(weight, ir.Tensor(codes))
    scale = store(main, f"{weight.name}/scale", ir.Tensor(scales))
    for node in matrix.lookups:
        new, of_found = Rewrite(node, main), scale
        if node.attributes.get_int("axis", 0) == 1 or not by_column:
            of_found = new.op("Gather", scale, node.inputs[1])
        _look_up(new, weight, of_found)
    return scale


def _look_up(new: Rewrite, weight: ir.Value, scale: ir.Value) -> None:
    """Let the Gather in whose place the nodes come find codes, and multiply them by a scale."""
    axis = new.node.attributes.get_int("axis", 0)
    codes = new.op("Gather", weight, new.node.inputs[1], axis=axis)
    new.take_place(new.op("Mul", new.op("Cast", codes, to=_FLOAT), scale))


def _after(
    op_type: str, inputs: Sequence[ir.Value], model: ir.Model, **attributes: int
) -> ir.Value:
    """Return the output of a new node, called after its first input."""
    name = f"{inputs[0].name}/{op_type}"
    output = ir.Value(name=name)
    given = ir.convenience.convert_attributes(attributes)
    model.graph.append(ir.Node("", op_type, inputs, given, outputs=[output], name=name))
    return output


def _connect(uses: Iterable[tuple[ir.Node, int]], value: ir.Value) -> None:
    for node, index in tuple(uses):
        node.replace_input_with(index, value)
