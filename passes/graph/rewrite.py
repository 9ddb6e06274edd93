"""Other nodes in a node's place: what the passes build a graph from.

:func:`become` turns a node into another operator, :func:`insert` puts one before it, and
:class:`Rewrite` replaces it by several. The values that other nodes read stay the same, so that
graph outputs keep their names.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from ffmerge.passes.graph.tensors import Array, is_op, rewritten, shape_of

# What computes in float32 where its weight is quantized: one output, of the type of its inputs.
IN_FLOAT32 = ("MatMul", "Gemm", "Conv", "Gather", "Add")


def become(node: ir.Node, op: str, inputs: Sequence[ir.Value | None], **attributes: Any) -> None:
    """Make a node another operator, whose result is still the same value."""
    node.op_type = op
    node.attributes.clear()
    for attribute in ir.convenience.convert_attributes(attributes):
        node.attributes.add(attribute)
    node.resize_inputs(len(inputs))
    for index, value in enumerate(inputs):
        node.replace_input_with(index, value)


def insert(
    node: ir.Node,
    op: str,
    inputs: Sequence[ir.Value],
    dtype: ir.DataType,
    shape: Sequence[int | None],
    **attributes: Any,
) -> ir.Value:
    """Return the output of a new node before ``node``, called after the output of that."""
    name = f"{node.outputs[0].name}/{op}"
    value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
    given = ir.convenience.convert_attributes(attributes)
    assert isinstance(node.graph, ir.Graph)
    node.graph.insert_before(node, ir.Node("", op, inputs, given, outputs=[value], name=name))
    return value


@dataclass
class Rewrite:
    """Nodes that take the place of ``node``; their names begin with its output's.

    They may come before what they read: the graph is to be sorted afterwards.
    """

    node: ir.Node
    main: ir.Graph
    nodes: list[ir.Node] = field(default_factory=list)

    def op(
        self, op_type: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any
    ) -> ir.Value:
        """Add a node and return its first output."""
        name = f"{self.node.outputs[0].name}/{len(self.nodes)}.{op_type}"
        made = ir.Node(
            domain, op_type, inputs, ir.convenience.convert_attributes(attributes), name=name,
            outputs=[ir.Value(name=name)],
        )  # fmt: skip
        self.nodes.append(made)
        return made.outputs[0]

    def constant(self, array: Array) -> ir.Value:
        """Store an array; equal ones become one when the graph is shared again."""
        name = f"{self.node.outputs[0].name}/{len(self.nodes)}.constant"
        return store(self.main, name, ir.Tensor(array))

    def take_place(self, result: ir.Value) -> None:
        """Let ``result``, with the bias of a Gemm added, be what the node's output was."""
        if bias := bias_of(self.node):
            result = self.op("Add", result, bias)
        assert self.node.graph is not None
        ir.convenience.replace_nodes_and_values(
            self.node.graph, self.node, [self.node], self.nodes, [self.node.outputs[0]], [result]
        )


def bias_of(node: ir.Node) -> ir.Value | None:
    """Return what a Gemm adds, None where a node is no Gemm or adds nothing."""
    if is_op(node, "Gemm") and len(node.inputs) > 2:
        return node.inputs[2]
    return None


def store(main: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """Add an initializer, its name made free by a number if it is taken."""
    free, count = name, 1
    while free in main.initializers:
        count += 1
        free = f"{name}.{count}"
    value = ir.Value(
        name=free,
        type=ir.TensorType(tensor.dtype),
        shape=ir.Shape(shape_of(tensor)),
        const_value=tensor,
    )
    main.register_initializer(value)
    return value


def replace_tensor(weight: ir.Value, tensor: ir.TensorProtocol) -> None:
    """Let an initializer hold another tensor, of its dtype and shape, under the same name."""
    weight.const_value = tensor
    weight.type = ir.TensorType(tensor.dtype)
    weight.shape = ir.Shape(shape_of(tensor))


def cast(value: ir.Value, to: ir.DataType) -> ir.Value:
    """Return a value in another type, by a Cast in its graph: that is to be sorted afterwards."""
    name = f"{value.name}/{to.name.lower()}"
    result = ir.Value(name=name, type=ir.TensorType(to), shape=value.shape)
    assert value.graph is not None
    attributes = [ir.AttrInt64("to", to)]
    value.graph.append(ir.Node("", "Cast", [value], attributes, outputs=[result], name=name))
    return result


def type_of(value: ir.Value) -> ir.DataType | None:
    """Return the type of a value's elements, None where it is not known."""
    return value.const_value.dtype if value.const_value is not None else value.dtype


def read_in_float32(weight: ir.Value, casts: dict[ir.Value, ir.Value]) -> None:
    """Let a weight of 16 bits be its float32 values, and the products and lookups of it float32.

    Their other inputs are cast to float32, their results back. Other nodes read the weight cast
    back. ``casts`` are those to float32 by what they read: a value is cast once.
    """
    tensor = weight.const_value
    assert tensor is not None
    half = tensor.dtype
    others = [use for use in weight.uses() if not is_op(use.node, *IN_FLOAT32)]
    computing = [node for node in weight.consumers() if is_op(node, *IN_FLOAT32)]
    wide = rewritten(tensor, lambda v: v.astype(np.float32), ir.DataType.FLOAT, shape_of(tensor))
    replace_tensor(weight, wide)
    if others:
        back = cast(weight, half)
        for node, index in others:
            node.replace_input_with(index, back)
    for node in computing:
        _compute_in_float32(node, half, casts)


def _compute_in_float32(node: ir.Node, half: ir.DataType, casts: dict[ir.Value, ir.Value]) -> None:
    for index, value in enumerate(node.inputs):
        if value is not None and type_of(value) == half:
            if value not in casts:
                casts[value] = cast(value, ir.DataType.FLOAT)
            node.replace_input_with(index, casts[value])
    output = node.outputs[0]
    if output.dtype == ir.DataType.FLOAT:  # of another weight of the node
        return
    name = f"{output.name}/float"
    result = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=output.shape)
    new = ir.Node(
        node.domain, node.op_type, node.inputs, tuple(node.attributes.values()),
        outputs=[result], name=node.name,
    )  # fmt: skip
    become(node, "Cast", [result], to=int(half))
    node.name = f"{output.name}/cast"
    assert isinstance(node.graph, ir.Graph)
    node.graph.insert_before(node, new)
