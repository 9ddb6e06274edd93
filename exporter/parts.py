"""A stored tensor that is split into parts, as the parts: each is then a weight like any other.

PyTorch's attention module (``nn.MultiheadAttention``) keeps the weights of queries, keys and values
as one and splits it where these read unlike inputs. ``exporter/torch_onnx.py`` calls
:func:`store_parts` on a graph that is simplified.
"""

from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from ffmerge.passes.graph.rewrite import store
from ffmerge.passes.graph.tensors import is_op, rewritten, shape_of, values_of


def store_parts(model: ir.Model, tied: Collection[str]) -> None:
    """Store what a graph splits a tensor into along its first axis, but for those that are tied."""
    for node in tuple(model.graph):
        whole = node.inputs[0] if is_op(node, "SplitToSequence") else None
        if whole is None or whole.const_value is None or whole.name in tied:
            continue
        readers, ends = node.outputs[0].uses(), _ends(node, len(whole.const_value.shape))
        if ends is None or not all(_takes_one(use.node) for use in readers):
            continue
        for use in tuple(readers):
            _store_part(model, whole, ends, use.node)
        model.graph.remove(node, safe=True)


def _ends(node: ir.Node, axes: int) -> list[int] | None:
    """Return where the parts end, None where they are not known or not of the first axis."""
    sizes = node.inputs[1] if len(node.inputs) > 1 else None
    if sizes is None or sizes.const_value is None or len(sizes.const_value.shape) != 1:
        return None
    if node.attributes.get_int("axis", 0) % axes:
        return None
    return [int(end) for end in np.cumsum(values_of(sizes.const_value))]


def _takes_one(node: ir.Node) -> bool:
    """Say whether a node takes one part, whose number is known."""
    number = node.inputs[1] if len(node.inputs) > 1 else None
    return is_op(node, "SequenceAt") and number is not None and number.const_value is not None


def _store_part(model: ir.Model, whole: ir.Value, ends: list[int], node: ir.Node) -> None:
    """Let a stored tensor take the place of what a SequenceAt gives."""
    number, tensor = node.inputs[1], whole.const_value
    assert number is not None and number.const_value is not None and tensor is not None
    part = int(values_of(number.const_value)) % len(ends)
    start, end = ([0, *ends])[part : part + 2]
    shape = (end - start, *shape_of(tensor)[1:])
    held = rewritten(tensor, lambda values: values[start:end], tensor.dtype, shape)
    new = store(model.graph, f"{whole.name}.{part}", held)
    ir.convenience.replace_all_uses_with(node.outputs[0], new)
    model.graph.remove(node, safe=True)
