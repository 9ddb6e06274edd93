"""Weights in blocks of 2, 4 or 8 bits: codes with a scale for each block, and maybe a zero point.

:func:`ffmerge.passes.graph.quantize.quantize` has chosen the matrices; each is stored once as the
bytes that ONNX Runtime's MatMulNBits takes: ``[rows, blocks, bytes of a block]``, where a row is an
output feature, scales ``[rows, blocks]``, and zero points as the codes of a row are. Products
become MatMulNBits. Lookups become GatherBlockQuantized, or standard operators where that cannot
read the layout or is missing, or there are zero points (it refuses them on WebGPU).
"""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ffmerge.config import QuantizeConfig
from ffmerge.models.codes import Form, block_codes, middle, pack
from ffmerge.models.pages import give_back_array
from ffmerge.passes.graph.matrix import Matrix
from ffmerge.passes.graph.rewrite import Rewrite, replace_tensor, store
from ffmerge.passes.graph.tensors import shape_of, values_of

MICROSOFT = "com.microsoft"
# MatMulNBits rounds what it multiplies by to 8 bits, each block of each row in a range of its own:
# several times faster, and 0.5 % of error.
ACCURACY = 4


def to_blocks(model: ir.Model, matrix: Matrix, config: QuantizeConfig) -> None:
    """Store a matrix in blocks, of its form in ``config``; its products and lookups read them.

    Codes are those of ``config.rounded``, or are left there for the other graphs.
    """
    model.opset_imports.setdefault(MICROSOFT, 1)
    weight, (rows, width) = matrix.weight, shape_of(matrix.tensor)
    by_column = bool(matrix.products) and not matrix.turned
    if by_column:
        rows, width = width, rows
    name, rounded = str(weight.name), config.rounded
    assert config.forms is not None and rounded is not None
    form = config.forms[name]
    plain = bool(matrix.products) or config.plain_lookups or form.zeros
    if name not in rounded:
        values = values_of(matrix.tensor)
        rounded[name] = block_codes(values.T if by_column else values, form)
        give_back_array(values)
    found = rounded[name]
    packed = pack(found.codes, form.bits)
    if not plain:
        packed = packed.reshape(rows, -1)
    replace_tensor(weight, ir.Tensor(packed))
    stored = [weight, store(model.graph, f"{weight.name}/scale", ir.Tensor(found.scales))]
    if form.zeros:
        zeros = ir.Tensor(pack(found.zeros, form.bits))
        stored.append(store(model.graph, f"{weight.name}/zero", zeros))
    layout = {"bits": form.bits, "block_size": form.block}
    for node in matrix.products:
        new = Rewrite(node, model.graph)
        sizes = {"K": width, "N": rows, "accuracy_level": ACCURACY, **layout}
        inputs = [node.inputs[0], *stored]
        new.take_place(new.op("MatMulNBits", *inputs, domain=MICROSOFT, **sizes))
    for node in matrix.lookups:
        new = Rewrite(node, model.graph)
        if plain:
            new.take_place(_unpacked_rows(new, stored, form, width))
        else:
            inputs = [weight, node.inputs[1], *stored[1:]]
            rows_found = new.op(
                "GatherBlockQuantized", *inputs, domain=MICROSOFT, **layout, quantize_axis=1
            )
            new.take_place(rows_found)


def _unpacked_rows(new: Rewrite, stored: Sequence[ir.Value], form: Form, width: int) -> ir.Value:
    """Look rows up in the layout of MatMulNBits, whose shape GatherBlockQuantized cannot read.

    ``stored`` are codes, scales and, where the form has them, zero points.
    """
    table, (ids, scales, *zeros) = stored[0], (new.node.inputs[1], *stored[1:])
    assert ids is not None and ids.shape is not None and table.const_value is not None
    leading = [0] * ids.shape.rank()
    blocks, last = shape_of(table.const_value)[1], new.constant(np.array([-1]))
    # every size is given: ONNX Runtime tells none by the others where no row is looked up
    sizes = [*leading, blocks, form.block]
    codes = _unpacked(new, new.op("Gather", table, ids), form.bits, sizes)
    zero = new.constant(np.array(middle(form.bits)))
    if zeros:
        filled = blocks + blocks * form.bits % 8 // form.bits
        sizes = [*leading, filled, 1]
        zero = _unpacked(new, new.op("Gather", zeros[0], ids), form.bits, sizes)
        if filled > blocks:  # half a byte at the end is none
            ends = (np.array([each]) for each in (0, blocks, len(leading)))
            zero = new.op("Slice", zero, *map(new.constant, ends))
    centred = new.op("Sub", codes, zero)
    scale = new.op("Unsqueeze", new.op("Gather", scales, ids), last)
    shape = new.constant(np.array([*leading, width]))
    return new.op("Reshape", new.op("Mul", centred, scale), shape)


def _unpacked(new: Rewrite, packed: ir.Value, bits: int, shape: Sequence[int]) -> ir.Value:
    """Return codes of 8 bits, or those of 4 in two each and then in a shape, as float32."""
    codes = new.op("Cast", packed, to=ir.DataType.FLOAT)
    if bits == 8:
        return codes
    # by arithmetic: OpenVINO shifts a byte left without dropping its upper bits
    sixteen, last = new.constant(np.array(16, np.float32)), new.constant(np.array([-1]))
    high = new.op("Floor", new.op("Div", codes, sixteen))
    low = new.op("Sub", codes, new.op("Mul", high, sixteen))
    pair = [new.op("Unsqueeze", part, last) for part in (low, high)]
    return new.op("Reshape", new.op("Concat", *pair, axis=-1), new.constant(np.array(shape)))
