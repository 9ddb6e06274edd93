"""A weight that is looked up and multiplied, as a tied embedding is, is in memory once.

ONNX Runtime's CPU provider packs a float32 weight on the right of a MatMul or Gemm into a copy of
its own when it loads the model, and keeps the original for a Gather. It packs no left operand, so
``x @ W^T`` is written ``(W @ x^T)^T``. A Gemm would not do: ONNX Runtime's own optimizer turns
``Transpose(Gemm(W, x))`` back.
"""

import onnx_ir as ir

from ffmerge.models.manifest import Skip
from ffmerge.passes.graph.rewrite import become, insert
from ffmerge.passes.graph.tensors import is_op, shape_of

FLOOR = 1_000_000  # bytes of a weight; smaller ones are not worth two transposes of activations


class ResidentPass(ir.passes.InPlacePass):
    """No float32 weight of ``FLOOR`` bytes is both packed and read raw, or ``skipped`` says why."""

    def __init__(self) -> None:
        super().__init__()
        self.skipped: list[Skip] = []

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Move each such weight from the right to the left of its products."""
        self.skipped = []
        modified = False
        for weight in model.graph.initializers.values():
            tensor = weight.const_value
            if tensor is None or tensor.dtype != ir.DataType.FLOAT or len(tensor.shape) != 2:
                continue
            if tensor.nbytes < FLOOR or weight.is_graph_input():  # what may change is not packed
                continue
            right = [node for node, i in weight.uses() if i == 1 and is_op(node, "MatMul", "Gemm")]
            forms = {_plain(node, "transB") for node in right}
            raw = len(right) < len(weight.uses()) or weight.is_graph_output()
            if len(forms) + raw < 2:
                continue
            reasons = [_obstacle(node) for node in right]
            movable = [node for node, reason in zip(right, reasons, strict=True) if not reason]
            if not raw and len(movable) < len(right):
                movable = []  # it would be packed all the same
            for node in movable:
                _to_left(node, weight)
            modified |= bool(movable)
            blocked = [reason for reason in reasons if reason]
            if blocked:
                self.skipped.append(
                    Skip(weight.name or "", f"may be in memory twice once loaded: {blocked[0]}")
                )
        return ir.passes.PassResult(model, modified)


class RightPass(ir.passes.InPlacePass):
    """``(W @ x^T)^T`` is ``Gemm(x, W, transB=1)`` again, where quantizers look for weights."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Undo what :class:`ResidentPass` did; what it inserted is no longer used."""
        modified = False
        for weight in model.graph.initializers.values():
            for product, index in tuple(weight.uses()):
                right = product.inputs[1] if is_op(product, "MatMul") and index == 0 else None
                turned = right.producer() if right else None
                after = tuple(product.outputs[0].uses())
                if turned and _turns(turned) and len(after) == 1 and _turns(after[0].node):
                    if product.outputs[0].is_graph_output():
                        continue
                    become(after[0].node, "Gemm", [turned.inputs[0], weight], transB=1)
                    modified = True
        return ir.passes.PassResult(model, modified)


def _turns(node: ir.Node) -> bool:
    perm = node.attributes.get_ints("perm") if is_op(node, "Transpose") else None
    return perm is not None and tuple(perm) == (1, 0)


def _plain(node: ir.Node, flag: str) -> int:
    return node.attributes.get_int(flag, 0) or 0


def _obstacle(node: ir.Node) -> str | None:
    """Return why the weight on a node's right cannot stand on its left, or None."""
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    plain = {"transA": 0, "transB": 1, "alpha": 1.0, "beta": 1.0}
    if not is_op(node, "Gemm") or {**plain, "transB": 0, **attributes} != plain:
        return f"{node.op_type} node {node.name} is not x @ W^T"
    if len(node.inputs) > 2:
        return f"Gemm node {node.name} adds a bias"
    return None


def _to_left(node: ir.Node, weight: ir.Value) -> None:
    """Write ``Gemm(x, W, transB=1)`` as ``Transpose(MatMul(W, Transpose(x)))``; same output."""
    x = node.inputs[0]
    assert x is not None and weight.const_value is not None
    (rows, width), dtype = shape_of(weight.const_value), weight.const_value.dtype
    turned = insert(node, "Transpose", [x], dtype, [width, None], perm=[1, 0])
    product = insert(node, "MatMul", [weight, turned], dtype, [rows, None])
    become(node, "Transpose", [product], perm=[1, 0])
