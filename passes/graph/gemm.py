"""Reading a 2-D weight transposed in place: ``Gemm(transB=1)`` instead of a second tensor."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ffmerge.passes.graph.tensors import is_op, shape_of

# Where ONNX gives Gemm (since 13) and MatMul the same meaning, and runtimes have both.
FLOATS = {
    ir.DataType.FLOAT,
    ir.DataType.DOUBLE,
    ir.DataType.FLOAT16,
    ir.DataType.BFLOAT16,
}
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
    x, out, graph = node.inputs[0], node.outputs[0], node.graph
    assert x is not None and x.shape is not None and weight.const_value is not None
    assert isinstance(graph, ir.Graph)
    columns, width = shape_of(weight.const_value)
    rank, dtype = x.shape.rank(), weight.const_value.dtype
    transposed = ir.AttrInt64("transB", 1)
    if rank == 2:
        node.op_type = "Gemm"
        node.attributes.add(transposed)
        node.replace_input_with(1, weight)
        return

    def before(
        op: str,
        inputs: Sequence[ir.Value],
        attributes: Sequence[ir.Attr] = (),
        shape: Sequence[int | None] = (),
        of: ir.DataType = ir.DataType.INT64,
    ) -> ir.Value:
        name = f"{out.name}/{op}"
        value = ir.Value(name=name, type=ir.TensorType(of), shape=ir.Shape(shape))
        graph.insert_before(node, ir.Node("", op, inputs, attributes, outputs=[value], name=name))
        return value

    flat = before("Reshape", [x, _numbers(main, [-1, width])], (), [None, width], dtype)
    product = before("Gemm", [flat, weight], [transposed], [None, columns], dtype)
    sizes = before("Shape", [x], (), [rank])
    leading = before("Gather", [sizes, _numbers(main, range(rank - 1))], (), [rank - 1])
    full = before("Concat", [leading, _numbers(main, [columns])], [ir.AttrInt64("axis", 0)], [rank])
    node.op_type = "Reshape"
    node.replace_input_with(0, product)
    node.replace_input_with(1, full)


def _numbers(main: ir.Graph, numbers: Sequence[int]) -> ir.Value:
    """Return the int64 initializer with these numbers, made when there is none yet."""
    name = "ffmerge.int64." + ".".join(map(str, numbers))
    if name not in main.initializers:
        tensor = ir.Tensor(np.array(numbers, np.int64), name=name)
        main.register_initializer(
            ir.Value(
                name=name,
                type=ir.TensorType(tensor.dtype),
                shape=tensor.shape,
                const_value=tensor,
            )
        )
    return main.initializers[name]
