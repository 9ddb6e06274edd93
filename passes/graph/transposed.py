"""Reading a 2-D weight transposed in place: ``Gemm(transB=1)`` instead of a second tensor."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ffmerge.passes.graph.rewrite import become, insert, store
from ffmerge.passes.graph.tensors import is_op, shape_of

# Where ONNX gives Gemm (since 13) and MatMul the same meaning, and runtimes have both.
_D = ir.DataType
FLOATS = (_D.FLOAT, _D.DOUBLE, _D.FLOAT16, _D.BFLOAT16)
INDEX = ir.DataType.INT64
OPTIONAL_C = 11  # the opset in which Gemm's third input became optional


def obstacle(node: ir.Node, index: int, dtype: ir.DataType, opset: int) -> str | None:
    """Return why input ``index``, a 2-D weight, cannot be its transpose instead, or None."""
    where = f"{node.op_type} node {node.name}"
    if is_op(node, "Gemm") and index < 2:
        return None
    if not is_op(node, "MatMul") or index != 1:
        return f"{where} cannot read it transposed"
    if dtype not in FLOATS:
        return f"{where} multiplies {dtype}, which Gemm may not take"
    x = node.inputs[0]
    if x is None or x.shape is None or x.shape.rank() < 2:
        rank = x.shape.rank() if x and x.shape else "not known"
        return f"{where} becomes a Gemm only if its left input has rank 2 or more; it is {rank}"
    if opset < OPTIONAL_C:
        return f"{where} needs opset {OPTIONAL_C} to become a Gemm; the model has {opset}"
    return None


def read_transposed(node: ir.Node, index: int, weight: ir.Value, main: ir.Graph) -> None:
    """Let input ``index`` be ``weight``, the transpose of what it was, with the same result.

    ``x[..., k] @ B[k, n]`` becomes ``Gemm(x[-1, k], weight[n, k], transB=1)``, reshaped back to
    ``[..., n]``; a 2-D ``x`` needs no reshape, and a Gemm only flips its flag. The result keeps
    its value, so that graph outputs stay what they are. :func:`obstacle` must be None.
    """
    if node.op_type == "Gemm":
        flag = ("transA", "transB")[index]
        node.attributes.add(ir.AttrInt64(flag, 1 - (node.attributes.get_int(flag, 0) or 0)))
        node.replace_input_with(index, weight)
        return
    x = node.inputs[0]
    assert x is not None and x.shape is not None and weight.const_value is not None
    columns, width = shape_of(weight.const_value)
    rank, dtype = x.shape.rank(), weight.const_value.dtype
    if rank == 2:
        return become(node, "Gemm", [x, weight], transB=1)

    flat = insert(node, "Reshape", [x, numbers(main, [-1, width])], dtype, [None, width])
    product = insert(node, "Gemm", [flat, weight], dtype, [None, columns], transB=1)
    sizes = insert(node, "Shape", [x], INDEX, [rank])
    first = numbers(main, range(rank - 1))
    leading = insert(node, "Gather", [sizes, first], INDEX, [rank - 1])
    full = insert(node, "Concat", [leading, numbers(main, [columns])], INDEX, [rank], axis=0)
    become(node, "Reshape", [product, full])


def numbers(main: ir.Graph, wanted: Sequence[int]) -> ir.Value:
    """Return the int64 initializer with these numbers, made when there is none yet."""
    name = "ffmerge.int64." + ".".join(map(str, wanted))
    if name in main.initializers:
        return main.initializers[name]
    return store(main, name, ir.tensor(np.array(wanted, np.int64), name=name))
