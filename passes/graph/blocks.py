"""Weights in blocks of 4 or 8 bits: codes with a scale for each block.

:func:`ffmerge.passes.graph.quantize.quantize` has chosen the matrices; each is stored once as the
bytes that ONNX Runtime's MatMulNBits takes: ``[rows, blocks, bytes of a block]``, where a row is an
output feature, and scales ``[rows, blocks]``. Products become MatMulNBits. Lookups become
GatherBlockQuantized, or standard operators where that cannot read the layout or is missing.
"""

import numpy as np
import onnx_ir as ir

from ffmerge.config import QuantizeConfig
from ffmerge.models.codes import block_codes, middle, pack
from ffmerge.passes.graph.matrix import Matrix
from ffmerge.passes.graph.rewrite import Rewrite, replace_tensor, store
from ffmerge.passes.graph.tensors import shape_of, values_of

MICROSOFT = "com.microsoft"
# MatMulNBits rounds what it multiplies by to 8 bits, each block of each row in a range of its own:
# several times faster, and 0.5 % of error.
ACCURACY = 4


def to_blocks(model: ir.Model, matrix: Matrix, config: QuantizeConfig) -> None:
    """Store a matrix in blocks, of its form in ``config``; its products and lookups read them.

    Codes and scales are those of ``config.rounded``, or are left there for the other graphs.
    """
    model.opset_imports.setdefault(MICROSOFT, 1)
    weight, (rows, width) = matrix.weight, shape_of(matrix.tensor)
    by_column = bool(matrix.products) and not matrix.turned
    if by_column:
        rows, width = width, rows
    plain = bool(matrix.products) or config.plain_lookups
    name, rounded = str(weight.name), config.rounded
    assert config.forms is not None and rounded is not None
    bits, block = config.forms[name].bits, config.forms[name].block
    if name not in rounded:
        values = values_of(matrix.tensor)
        rounded[name] = block_codes(values.T if by_column else values, bits, block)
    codes, scale = rounded[name]
    packed = pack(codes, bits)
    if not plain:
        packed = packed.reshape(rows, -1)
    replace_tensor(weight, ir.Tensor(packed))
    scales = store(model.graph, f"{weight.name}/scale", ir.Tensor(scale))
    layout = {"bits": bits, "block_size": block}
    for node in matrix.products:
        new = Rewrite(node, model.graph)
        sizes = {"K": width, "N": rows, "accuracy_level": ACCURACY, **layout}
        inputs = [node.inputs[0], weight, scales]
        new.take_place(new.op("MatMulNBits", *inputs, domain=MICROSOFT, **sizes))
    for node in matrix.lookups:
        new = Rewrite(node, model.graph)
        if plain:
            new.take_place(_unpacked_rows(new, weight, scales, bits, width))
        else:
            inputs = [weight, node.inputs[1], scales]
            found = new.op(
                "GatherBlockQuantized", *inputs, domain=MICROSOFT, **layout, quantize_axis=1
            )
            new.take_place(found)


def _unpacked_rows(
    new: Rewrite, table: ir.Value, scales: ir.Value, bits: int, width: int
) -> ir.Value:
    """Look rows up in the layout of MatMulNBits, whose shape GatherBlockQuantized cannot read."""
    ids = new.node.inputs[1]
    assert ids is not None and ids.shape is not None and table.const_value is not None
    leading = [0] * ids.shape.rank()
    blocks, last = shape_of(table.const_value)[1], new.constant(np.array([-1]))
    codes = new.op("Cast", new.op("Gather", table, ids), to=ir.DataType.FLOAT)
    if bits == 4:  # by arithmetic: OpenVINO shifts a byte left without dropping its upper bits
        sixteen = new.constant(np.array(16, np.float32))
        high = new.op("Floor", new.op("Div", codes, sixteen))
        low = new.op("Sub", codes, new.op("Mul", high, sixteen))
        pair = [new.op("Unsqueeze", part, last) for part in (low, high)]
        codes = new.op("Concat", *pair, axis=-1)
        codes = new.op("Reshape", codes, new.constant(np.array([*leading, blocks, -1])))
    centred = new.op("Sub", codes, new.constant(np.array(middle(bits))))
    scale = new.op("Unsqueeze", new.op("Gather", scales, ids), last)
    shape = new.constant(np.array([*leading, width]))
    return new.op("Reshape", new.op("Mul", centred, scale), shape)
