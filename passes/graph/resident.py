"""A weight that is looked up and multiplied, as a tied embedding is, is in memory once.

ONNX Runtime's CPU provider packs a float32 weight on the right of a MatMul or Gemm into a copy of
its own when it loads the model, and keeps the original for a Gather. It packs no left operand, so
``x @ W^T`` is written ``(W @ x^T)^T`` by :func:`weights_to_left`, the last step of sharing;
:func:`weights_to_right`, its first, takes that back. A Gemm would not do: ONNX Runtime's own
optimizer turns ``Transpose(Gemm(W, x))`` back. It would also put ``x^T`` into the product, whose
kernel then reads the weight twice as slowly for one row, as a decoder has: a Reshape that changes
nothing stands between.
"""

import onnx_ir as ir

from ffmerge.models.manifest import Skip
from ffmerge.passes.graph.rewrite import become, insert
from ffmerge.passes.graph.tensors import is_op, shape_of
from ffmerge.passes.graph.transposed import numbers

# Bytes from which a weight is worth two transposes of activations.
LARGE = 1_000_000


def weights_to_left(model: ir.Model) -> list[Skip]:
    """Move each large float32 weight that is packed and read raw to the left of its products.

    Return those that still are both, and why.
    """
    skipped = []
    for weight in tuple(model.graph.initializers.values()):
        if may_be_packed(weight) and (reason := _move(weight, model.graph)):
            why = f"may be in memory twice once loaded: {reason}"
            skipped.append(Skip(weight.name or "", why))
    return skipped


def _move(weight: ir.Value, main: ir.Graph) -> str | None:
    """Move a weight in more than one form to the left; return why some product stays, or None."""
    products = [node for node, i in weight.uses() if i == 1 and is_op(node, "MatMul", "Gemm")]
    raw = len(products) < len(weight.uses()) or weight.is_graph_output()
    forms = {node.attributes.get_int("transB", 0) for node in products}
    if len(forms) + raw < 2:
        return None
    obstacles = {node: obstacle(node) for node in products}
    first = next(filter(None, obstacles.values()), None)
    if first and not raw:  # it would be packed all the same
        return first
    for node, reason in obstacles.items():
        if reason is None:
            _to_left(node, weight, main)
    return first


def may_be_packed(weight: ir.Value) -> bool:
    tensor = weight.const_value
    if tensor is None or weight.is_graph_input():  # what may change is not packed
        return False
    is_matrix = tensor.dtype == ir.DataType.FLOAT and len(tensor.shape) == 2
    return is_matrix and tensor.nbytes >= LARGE


def weights_to_right(model: ir.Model) -> None:
    """Make ``(W @ x^T)^T`` a ``Gemm(x, W, transB=1)`` again, where quantizers look for weights.

    What :func:`weights_to_left` had inserted is no longer used afterwards.
    """
    for weight in model.graph.initializers.values():
        for product, index in tuple(weight.uses()):
            if not is_op(product, "MatMul") or index != 0:
                continue
            uses = tuple(product.outputs[0].uses())
            before = _turned(product.inputs[1], weight)
            if len(uses) != 1 or product.outputs[0].is_graph_output():
                continue
            after = uses[0].node
            if before and _turns(after):
                become(after, "Gemm", [before.inputs[0], weight], transB=1)


def _turned(right: ir.Value | None, weight: ir.Value) -> ir.Node | None:
    """Return the Transpose that gives what a weight is multiplied by, if it is one."""
    node = right.producer() if right else None
    if node and _keeps(node, weight):
        node = node.inputs[0].producer() if node.inputs[0] else None
    if node and _turns(node):
        return node
    return None


def _keeps(node: ir.Node, weight: ir.Value) -> bool:
    """Say whether a node is the Reshape before the product of a weight, which changes nothing."""
    if not is_op(node, "Reshape") or weight.const_value is None or node.inputs[1] is None:
        return False
    sizes = node.inputs[1].const_value
    return sizes is not None and sizes.numpy().tolist() == [shape_of(weight.const_value)[1], -1]


def _turns(node: ir.Node) -> bool:
    return is_op(node, "Transpose") and tuple(node.attributes.get_ints("perm") or ()) == (1, 0)


def obstacle(node: ir.Node) -> str | None:
    """Return why the weight on a node's right cannot stand on its left, or None."""
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    plain = {"transA": 0, "transB": 1, "alpha": 1.0, "beta": 1.0}
    if not is_op(node, "Gemm") or {**plain, "transB": 0, **attributes} != plain:
        return f"{node.op_type} node {node.name} is not x @ W^T"
    if len(node.inputs) > 2:
        return f"Gemm node {node.name} adds a bias"
    return None


def _to_left(node: ir.Node, weight: ir.Value, main: ir.Graph) -> None:
    """Write ``Gemm(x, W, transB=1)`` as ``Transpose(MatMul(W, Transpose(x)))``; same output."""
    x = node.inputs[0]
    assert x is not None and weight.const_value is not None
    (rows, width), dtype = shape_of(weight.const_value), weight.const_value.dtype
    turned = insert(node, "Transpose", [x], dtype, [width, None], perm=[1, 0])
    same = insert(node, "Reshape", [turned, numbers(main, (width, -1))], dtype, [width, None])
    product = insert(node, "MatMul", [weight, same], dtype, [rows, None])
    become(node, "Transpose", [product], perm=[1, 0])
