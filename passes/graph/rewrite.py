"""Other nodes in a node's place: what the passes build a graph from.

:func:`become` turns a node into another operator, :func:`insert` puts one before it, and
:class:`Rewrite` replaces it by several. The values that other nodes read stay the same, so that
graph outputs keep their names.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

from ffmerge.passes.graph.tensors import Array, is_op, shape_of


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
    weight.dtype = tensor.dtype
    weight.shape = ir.Shape(shape_of(tensor))
