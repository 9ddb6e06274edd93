"""A stored matrix and the nodes that read it: what quantizing must agree on before it begins.

All nodes that read one matrix are found at once (:func:`matrix_of`), because it is stored once for
all of them; int8 then wants the products in one form (:func:`as_matmuls`).
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ffmerge.passes.graph.rewrite import Rewrite
from ffmerge.passes.graph.tensors import is_op, rewritten, shape_of


@dataclass(frozen=True)
class Matrix:
    """A stored matrix W and all that reads it.

    ``products`` are ``x @ W``, or ``x @ W.T`` if ``turned``; ``lookups`` are Gather nodes that take
    rows of W as it is.
    """

    weight: ir.Value
    products: tuple[ir.Node, ...]
    lookups: tuple[ir.Node, ...]
    turned: bool

    @property
    def tensor(self) -> ir.TensorProtocol:
        """What is stored."""
        assert self.weight.const_value is not None
        return self.weight.const_value


def matrix_of(weight: ir.Value) -> Matrix | str:
    """Return a 2-D weight with all that reads it, or why some node needs the values themselves."""
    products: dict[ir.Node, bool] = {}
    lookups = []
    for node, index in weight.uses():
        where = f"{node.op_type} node {node.name}"
        if index == 0 and looks_rows_up(node):
            if node.inputs[1] is None or node.inputs[1].shape is None:
                return f"the rank of the indices of {where} is not known"
            lookups.append(node)
            continue
        if index != 1 or node.inputs[0] is weight or not _is_product(node):
            return f"{where} reads it as input {index}"
        if _is_vector(node.inputs[0]):
            return f"the left input of {where} is a vector"
        products[node] = bool(node.attributes.get_int("transB", 0))
    if len(set(products.values())) > 1:
        return "it is multiplied by both as it is and transposed"
    return Matrix(weight, tuple(products), tuple(lookups), any(products.values()))


def _is_vector(value: ir.Value | None) -> bool:
    return value is not None and value.shape is not None and value.shape.rank() < 2


def looks_rows_up(node: ir.Node) -> bool:
    """Say whether a node is a Gather along the first axis."""
    return is_op(node, "Gather") and node.attributes.get_int("axis", 0) == 0


def _is_product(node: ir.Node) -> bool:
    """Say whether a node is a MatMul, or a Gemm with nothing scaled and its input as it is."""
    if is_op(node, "MatMul"):
        return True
    scales = [node.attributes.get_float(name, 1.0) for name in ("alpha", "beta")]
    return is_op(node, "Gemm") and scales == [1.0, 1.0] and not node.attributes.get_int("transA", 0)


def to_lookups(model: ir.Model) -> None:
    """Make every GatherND that finds rows of a stored tensor, by one index each, a Gather.

    PyTorch's exporter writes the choice of experts so. Types have to be known.
    """
    for weight in tuple(model.graph.initializers.values()):
        for node, index in tuple(weight.uses()):
            if index != 0 or not _finds_rows(node):
                continue
            ids = node.inputs[1]
            assert ids is not None and ids.shape is not None
            new = Rewrite(node, model.graph)
            rows = new.op("Squeeze", ids, new.constant(np.array([-1])))
            rows.shape, rows.type = ir.Shape(ids.shape[:-1]), ids.type
            new.take_place(new.op("Gather", weight, rows))


def _finds_rows(node: ir.Node) -> bool:
    """Say whether a node is a GatherND whose indices are one number each, of the first axis."""
    if not is_op(node, "GatherND") or node.attributes.get_int("batch_dims", 0) != 0:
        return False
    ids = node.inputs[1]
    return ids is not None and ids.shape is not None and ids.shape[-1] == 1


def as_matmuls(matrix: Matrix, main: ir.Graph) -> Matrix:
    """Make every product ``MatMul(x, W)``, followed by an Add for the bias of a Gemm.

    W takes the values of its transpose if it was ``turned``; a lookup is then a Gather of
    columns, with its result transposed, not the weight.
    """
    weight, tensor, lookups = matrix.weight, matrix.tensor, list(matrix.lookups)
    if matrix.turned:
        turned = rewritten(tensor, np.transpose, tensor.dtype, shape_of(tensor)[::-1])
        weight.const_value, weight.shape = turned, turned.shape
        for index, node in enumerate(lookups):
            lookups[index] = _look_columns_up(node, weight, main)
    products = []
    for node in matrix.products:
        if node.op_type == "Gemm":
            new = Rewrite(node, main)
            new.take_place(new.op("MatMul", node.inputs[0], weight))
            node = new.nodes[0]
        products.append(node)
    return Matrix(weight, tuple(products), tuple(lookups), turned=False)


def _look_columns_up(node: ir.Node, weight: ir.Value, main: ir.Graph) -> ir.Node:
    """Replace a lookup of rows by one of columns; return the Gather of it."""
    ids, new = node.inputs[1], Rewrite(node, main)
    assert ids is not None and ids.shape is not None
    columns = new.op("Gather", weight, ids, axis=1)
    new.take_place(new.op("Transpose", columns, perm=[*range(1, ids.shape.rank() + 1), 0]))
    return new.nodes[0]
