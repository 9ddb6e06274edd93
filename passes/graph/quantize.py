"""Weights in fewer bits that stay shared: one tensor and one set of scales for all consumers.

A quantized weight keeps its name, so that ties and whatever else knows it stay true.
"""

import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from ffmerge.errors import InputError
from ffmerge.models.codes import BLOCK, FLOOR, block_codes, int8_codes, middle, pack, range_scale
from ffmerge.models.manifest import Skip
from ffmerge.passes.graph.float16 import MASK, to_float16
from ffmerge.passes.graph.matmul import Readers, Rewrite, readers, store, straighten
from ffmerge.passes.graph.tensors import Array, Stored, is_op, shape_of, stored, values_of

OPSET = 13  # from which QuantizeLinear has a scale per channel
MICROSOFT = "com.microsoft"
# MatMulNBits multiplies in int8: several times faster, adding 0.5 % of error to int4's 10
ACCURACY = 4
_FLOAT = ir.DataType.FLOAT


@dataclass(frozen=True)
class QuantizeConfig:
    """How weights are stored in fewer bits.

    ``block`` input features share a scale in int4 and int8-weights. ``calibration`` is what
    int8-static takes its ranges from.
    ``multiplied`` names weights that another graph of the package multiplies by: a table among
    them is stored as it is there. ``plain_lookups`` unpacks the rows of every int4 table by
    standard operators: onnxruntime-web has no GatherBlockQuantized for wasm.
    """

    block: int = BLOCK
    calibration: Sequence[Mapping[str, Array]] = ()
    multiplied: frozenset[str] = frozenset()
    plain_lookups: bool = False


def quantize(
    model: ir.Model, precision: str, config: QuantizeConfig = QuantizeConfig()
) -> tuple[Skip, ...]:
    """Bring a shared model to one of ``PRECISIONS`` in place; return what is stored in more bits.

    Nodes are left out of order and scales possibly equal: the model is to be shared again, as
    :func:`ffmerge.passes.graph.run.share` does.

    Raises:
        InputError: there is no such precision, or it needs a later opset or calibration data.
    """
    if precision not in PRECISIONS:
        raise InputError(f"no dtype {precision!r}: there is fp32, {', '.join(PRECISIONS)}.")
    opset = model.opset_imports.get("", 0)
    if opset < OPSET:
        raise InputError(f"{precision} needs opset {OPSET}, the model has {opset}: export again.")
    if config.block < 16 or config.block & (config.block - 1):
        raise InputError(f"a block of {config.block} is not a power of two from 16 on.")
    ShapeInferencePass(check_type=False, strict_mode=False)(model)
    return tuple(PRECISIONS[precision](model, config))


def _dynamic_int8(model: ir.Model, config: QuantizeConfig) -> Iterator[Skip]:
    """MatMul and Gemm become MatMulInteger on inputs that are quantized as they come."""
    inputs: dict[ir.Value, Sequence[ir.Value]] = {}
    for weight, how in (yield from _matrices(model, config)):
        how = straighten(weight, how, model.graph)
        scale = _to_int8(weight, how, config, model)
        for node in how.products:
            x = node.inputs[0]
            assert x is not None and x.graph is not None
            if x not in inputs:
                parts = [ir.Value(name=f"{x.name}/{part}") for part in ("int8", "scale", "zero")]
                name = f"{x.name}/DynamicQuantizeLinear"
                x.graph.append(ir.Node("", "DynamicQuantizeLinear", [x], outputs=parts, name=name))
                inputs[x] = parts
            codes, x_scale, zero = inputs[x]
            new = Rewrite(node, model.graph)
            total = new.op("Cast", new.op("MatMulInteger", codes, weight, zero), to=_FLOAT)
            new.take_place(new.op("Mul", total, new.op("Mul", x_scale, scale)))


def _static_int8(model: ir.Model, config: QuantizeConfig) -> Iterator[Skip]:
    """Matrix products read and write 8 bits, in the ranges of the calibration batches.

    Every weight is behind one DequantizeLinear. Biases stay float32: as int32 they would need
    the scale of one consumer's input.
    """
    matrices = []
    for weight, how in (yield from _matrices(model, config)):
        for node in how.products:
            if node.op_type == "Gemm" and len(node.inputs) > 2 and (bias := node.inputs[2]):
                yield Skip(bias.name or "", f"float32: the bias of Gemm node {node.name}")
        matrices.append((weight, straighten(weight, how, model.graph)))
    model.graph.sort()
    products = [node for node in model.graph if is_op(node, "MatMul")]
    outputs = dict.fromkeys(node.outputs[0] for node in products)
    inputs = [x for n in products for x in n.inputs if x is not None and x.const_value is None]
    ranges = _ranges(model, list(dict.fromkeys([*inputs, *outputs])), config.calibration)
    for weight, how in matrices:
        scale = _to_int8(weight, how, config, model)
        floats = _after("DequantizeLinear", [weight, scale], model, axis=1)
        _connect(((node, 1) for node in how.products), floats)
    for value, (low, high) in ranges.items():
        step, zero = range_scale(low, high)
        parts = _store_parts(model, value, [ir.tensor(step), ir.tensor(zero)])
        uses = [use for use in value.uses() if value in outputs or is_op(use.node, "MatMul")]
        codes = _after("QuantizeLinear", [value, *parts], model)
        _connect(uses, _after("DequantizeLinear", [codes, *parts], model))


def _ranges(
    model: ir.Model, values: Sequence[ir.Value], batches: Sequence[Mapping[str, Array]]
) -> dict[ir.Value, tuple[float, float]]:
    """Return the smallest and largest of each value over all batches, zero included."""
    import onnxruntime

    if not batches:
        raise InputError("int8-static needs calibration batches: name -> array of every input.")
    if not values:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        path, own = Path(folder) / "model.onnx", len(model.graph.outputs)
        model.graph.outputs.extend(v for v in values if not v.is_graph_output())
        ir.save(model, path, external_data="data")
        while len(model.graph.outputs) > own:
            model.graph.outputs.pop()
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = {value: (0.0, 0.0) for value in values}
    for batch in batches:
        seen = session.run([value.name for value in values], dict(batch))
        for value, array in zip(values, seen, strict=True):
            low, high = found[value]
            found[value] = min(low, float(array.min())), max(high, float(array.max()))
    return found


def _nbits(model: ir.Model, config: QuantizeConfig, bits: int) -> Iterator[Skip]:
    """Products become MatMulNBits, lookups GatherBlockQuantized or standard operators."""
    for weight, how in (yield from _matrices(model, config, config.block)):
        model.opset_imports.setdefault(MICROSOFT, 1)
        assert weight.const_value is not None
        values = values_of(weight.const_value)
        values = values.T if how.products and not how.turned else values
        rows, width = values.shape
        plain = bool(how.lookups and (how.products or config.plain_lookups))
        codes, scale = block_codes(values, bits, config.block)
        packed = pack(codes, bits)
        _replace(weight, ir.Tensor(packed if how.products or plain else packed.reshape(rows, -1)))
        parts = _store_parts(model, weight, [ir.Tensor(scale)])
        layout: dict[str, Any] = {"bits": bits, "block_size": config.block}
        for node in how.products:
            new = Rewrite(node, model.graph)
            inputs = [node.inputs[0], weight, *parts]
            sizes = {"K": width, "N": rows, "accuracy_level": ACCURACY, **layout}
            new.take_place(new.op("MatMulNBits", *inputs, domain=MICROSOFT, **sizes))
        for node in how.lookups:
            new = Rewrite(node, model.graph)
            if plain:
                new.take_place(_unpacked_rows(new, weight, parts[0], bits, width))
            else:
                inputs = [weight, node.inputs[1], *parts]
                layout |= {"quantize_axis": 1, "domain": MICROSOFT}
                new.take_place(new.op("GatherBlockQuantized", *inputs, **layout))


def _unpacked_rows(
    new: Rewrite, table: ir.Value, scales: ir.Value, bits: int, width: int
) -> ir.Value:
    """Look rows up in the layout of MatMulNBits, whose shape GatherBlockQuantized cannot read."""
    ids = new.node.inputs[1]
    assert ids is not None and ids.shape is not None and table.const_value is not None
    blocks, last = shape_of(table.const_value)[1], new.constant(np.array([-1]))
    codes = new.op("Cast", new.op("Gather", table, ids), to=_FLOAT)
    if bits == 4:  # by arithmetic: OpenVINO shifts a byte left without dropping its upper bits
        sixteen = new.constant(np.array(16, np.float32))
        high = new.op("Floor", new.op("Div", codes, sixteen))
        low = new.op("Sub", codes, new.op("Mul", high, sixteen))
        pair = [new.op("Unsqueeze", part, last) for part in (low, high)]
        leading = [0] * ids.shape.rank()
        codes = new.op("Concat", *pair, axis=-1)
        codes = new.op("Reshape", codes, new.constant(np.array([*leading, blocks, -1])))
    centred = new.op("Sub", codes, new.constant(np.array(middle(bits))))
    scale = new.op("Unsqueeze", new.op("Gather", scales, ids), last)
    shape = new.constant(np.array([*[0] * ids.shape.rank(), width]))
    return new.op("Reshape", new.op("Mul", centred, scale), shape)


def _matrices(
    model: ir.Model, config: QuantizeConfig, block: int | None = None
) -> Generator[Skip, None, list[tuple[ir.Value, Readers]]]:
    """Return the matrices to quantize and what reads them; yield a reason for every other weight.

    Where the consumers do not agree on a layout, the weight becomes int8 behind one
    DequantizeLinear for all of them.
    """
    found = []
    for item in stored(model):
        weight, tensor = item.value, item.tensor
        if not tensor.dtype.is_floating_point() or not _is_weight(weight):
            continue
        if reason := _stays_float(weight, tensor, model.graph):
            yield Skip(item.name, f"{tensor.dtype}: {reason}")
            continue
        how = readers(weight) if len(tensor.shape) == 2 else "it is not a matrix"
        if block and isinstance(how, Readers) and how.lookups:
            if how.products and not how.turned:
                how = "its rows are looked up, and it is multiplied by without a transpose"
            elif shape_of(tensor)[1] % block:
                how = f"its rows of {shape_of(tensor)[1]} are not whole blocks of {block}"
        if isinstance(how, Readers):
            found.append(
                (weight, replace(how, turned=how.turned or _as_elsewhere(item, how, config)))
            )
            continue
        yield Skip(item.name, f"INT8, through one DequantizeLinear: {how}")
        axis = int(np.argmax([size > 1 for size in shape_of(tensor)]))
        others = tuple(i for i in range(len(tensor.shape)) if i != axis)
        codes, scale = int8_codes(values_of(tensor), others)
        parts = _store_parts(model, weight, [ir.Tensor(scale.reshape(-1))])
        _read_through(weight, ir.Tensor(codes), parts, model, axis=axis)
    return found


def _as_elsewhere(item: Stored, how: Readers, config: QuantizeConfig) -> bool:
    """Say whether a table is to be stored as the matrix that it is in another graph."""
    return not how.products and item.name in config.multiplied


def _is_weight(value: ir.Value) -> bool:
    places = {"MatMul": (0, 1), "Gemm": (0, 1), "Conv": (0, 1), "Gather": (0,)}
    if value.const_value is not None and len(value.const_value.shape) > 1:
        places["Add"] = (0, 1)
    return any(
        is_op(node, *places) and index in places[node.op_type] for node, index in value.uses()
    )


def _stays_float(value: ir.Value, tensor: ir.TensorProtocol, main: ir.Graph) -> str | None:
    if value.is_graph_input() or value.is_graph_output():
        return "it is a graph input or output"
    if not value.is_initializer() or value.graph is not main:
        return "it belongs to a function or a subgraph"
    if tensor.dtype != _FLOAT:
        return "only float32 is quantized"
    if tensor.size < FLOOR or len(tensor.shape) < 2:
        return f"{tensor.size} elements, too few to gain by it"
    values = values_of(tensor)
    if not -MASK < values.min() <= values.max() < MASK:
        return "it is a mask, or holds values that are not finite"
    return None


def _to_int8(weight: ir.Value, how: Readers, config: QuantizeConfig, model: ir.Model) -> ir.Value:
    """Store a straightened weight as int8, let lookups scale what they find; return the scales."""
    summed = bool(how.products) or weight.name in config.multiplied
    over = 0 if summed else 1
    assert weight.const_value is not None
    codes, scales = int8_codes(values_of(weight.const_value), over, paired=summed)
    _replace(weight, ir.Tensor(codes))
    (scale,) = _store_parts(model, weight, [ir.Tensor(scales if over == 1 else scales.squeeze())])
    for node in how.lookups:
        new, ids = Rewrite(node, model.graph), node.inputs[1]
        axis = node.attributes.get_int("axis", 0)
        found = new.op("Cast", new.op("Gather", weight, ids, axis=axis), to=_FLOAT)
        by_row = axis == 1 or not summed
        new.take_place(new.op("Mul", found, new.op("Gather", scale, ids) if by_row else scale))
    return scale


def _replace(weight: ir.Value, tensor: ir.TensorProtocol) -> None:
    weight.const_value, weight.dtype = tensor, tensor.dtype
    weight.shape = ir.Shape(shape_of(tensor))


def _store_parts(
    model: ir.Model, value: ir.Value, tensors: Sequence[ir.TensorProtocol]
) -> list[ir.Value]:
    """Store the scale, and the zero point if there is one, that belong to a value."""
    return [
        store(model.graph, f"{value.name}/{part}", tensor)
        for part, tensor in zip(("scale", "zero"), tensors, strict=False)
    ]


def _read_through(
    weight: ir.Value, codes: ir.TensorProtocol, parts: Sequence[ir.Value], model: ir.Model,
    **attributes: int,
) -> None:  # fmt: skip
    """Store ``codes`` as the weight and let all its consumers read one DequantizeLinear."""
    uses = weight.uses()
    _replace(weight, codes)
    _connect(uses, _after("DequantizeLinear", [weight, *parts], model, **attributes))


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


PRECISIONS: dict[str, Callable[[ir.Model, QuantizeConfig], Iterator[Skip]]] = {
    "fp16": lambda model, _: to_float16(model),
    "int8": _dynamic_int8,
    "int8-static": _static_int8,
    "int8-weights": lambda model, config: _nbits(model, config, 8),
    "int4": lambda model, config: _nbits(model, config, 4),
}
