"""Which nodes multiply by a stored matrix or look its rows up, and other nodes in their place."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from ffmerge.passes.graph.tensors import Array, is_op, rewritten, shape_of


@dataclass(frozen=True)
class Readers:
    """The nodes that read one matrix W: ``products`` are ``x @ W``, or ``x @ W.T`` if ``turned``.

    ``lookups`` are Gather nodes that take rows of W as it is.
    """

    products: tuple[ir.Node, ...]
    lookups: tuple[ir.Node, ...]
    turned: bool


def readers(weight: ir.Value) -> Readers | str:
    """Return all that read a 2-D weight, or why some node needs the values themselves."""
    products: dict[ir.Node, bool] = {}
    lookups = []
    for node, index in weight.uses():
        where = f"{node.op_type} node {node.name}"
        if is_op(node, "Gather") and index == 0 and node.attributes.get_int("axis", 0) == 0:
            if node.inputs[1] is None or node.inputs[1].shape is None:
                return f"the rank of the indices of {where} is not known"
            lookups.append(node)
        elif is_op(node, "MatMul") and index == 1 and node.inputs[0] is not weight:
            products[node] = False
        elif is_plain_gemm(node) and index == 1 and node.inputs[0] is not weight:
            products[node] = bool(node.attributes.get_int("transB", 0))
        else:
            return f"{where} reads it as input {index}"
        if node.op_type != "Gather" and (x := node.inputs[0]) and x.shape and x.shape.rank() < 2:
            return f"the left input of {where} is a vector"
    if len(set(products.values())) > 1:
        return "it is multiplied by both as it is and transposed"
    return Readers(tuple(products), tuple(lookups), any(products.values()))


def is_plain_gemm(node: ir.Node) -> bool:
    """Say whether a node is ``x @ B + C`` or ``x @ B.T + C``, nothing scaled, x not transposed."""
    scales = [node.attributes.get_float(name, 1.0) for name in ("alpha", "beta")]
    return is_op(node, "Gemm") and scales == [1.0, 1.0] and not node.attributes.get_int("transA", 0)


def straighten(weight: ir.Value, how: Readers, main: ir.Graph) -> Readers:
    """Make every product of a weight ``MatMul(x, W)``, followed by an Add for the bias of a Gemm.

    W takes the values of its transpose if it was ``turned``; a lookup is then a Gather of
    columns, with its result transposed, not the weight.
    """
    tensor = weight.const_value
    assert tensor is not None
    lookups = list(how.lookups)
    if how.turned:
        turned = rewritten(tensor, np.transpose, tensor.dtype, shape_of(tensor)[::-1])
        weight.const_value, weight.shape = turned, turned.shape
        for index, node in enumerate(lookups):
            ids, new = node.inputs[1], Rewrite(node, main)
            assert ids is not None and ids.shape is not None
            columns = new.op("Gather", weight, ids, axis=1)
            new.take_place(new.op("Transpose", columns, perm=[*range(1, ids.shape.rank() + 1), 0]))
            lookups[index] = new.nodes[0]
    products = []
    for node in how.products:
        if node.op_type == "Gemm":
            new = Rewrite(node, main)
            new.take_place(new.op("MatMul", node.inputs[0], weight))
            node = new.nodes[0]
        products.append(node)
    return Readers(tuple(products), tuple(lookups), turned=False)


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
        if is_op(self.node, "Gemm") and len(self.node.inputs) > 2 and self.node.inputs[2]:
            result = self.op("Add", result, self.node.inputs[2])
        assert self.node.graph is not None
        ir.convenience.replace_nodes_and_values(
            self.node.graph, self.node, [self.node], self.nodes, [self.node.outputs[0]], [result]
        )


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
