"""Attention that reads and gives (batch, tokens, heads x size), as the products around it do.

The operator takes heads apart or joined. Models put the heads before the tokens and move them back
behind; :func:`read_flat` leaves both out where an attention is all that reads or gives the moved
values, and lets rotations work on joined heads, too. What :func:`ffmerge.exporter.fused.fuse` calls
last.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir

from ffmerge.passes.graph.rewrite import store
from ffmerge.passes.graph.tensors import is_op


class Apart(NamedTuple):
    """A value (batch, tokens, heads, size) whose last two sizes are known."""

    value: ir.Value
    rows: tuple[Any, Any]  # batch and tokens, each a number or a name
    heads: int
    size: int

    def is_joined(self, value: ir.Value | None) -> bool:
        """Say whether a value is this one with its heads joined."""
        if value is None or value.shape is None:
            return False
        return list(value.shape) == [*self.rows, self.heads * self.size]


def read_flat(model: ir.Model) -> None:
    """Let every attention of the main graph read and give joined heads, where it can, in place.

    Where the heads do not stand behind the tokens before, all stays as it is.
    """
    for node in list(model.graph):
        if is_op(node, "Attention") and can_be_flat(node, 3):
            make_flat(node, model.graph, 3)


def join_heads(model: ir.Model) -> None:
    """Let every attention with a past read joined heads, in place; those that lie apart are turned.

    For operators that take no others. It costs a copy of what a step reads, none of the past.
    """
    for node in list(model.graph):
        if not is_op(node, "Attention") or "q_num_heads" in node.attributes or len(node.inputs) < 6:
            continue
        for index, value in enumerate(node.inputs[:3]):
            if value is not None and _before_swap(value) is None and _heads_first(value):
                node.replace_input_with(index, _turned_twice(value, node, model.graph))
        if can_be_flat(node, 3):
            make_flat(node, model.graph, 3)


def _heads_first(value: ir.Value) -> bool:
    """Say whether (batch, heads, tokens, size) is known of a value, with heads and size."""
    if value.shape is None or value.shape.rank() != 4:
        return False
    return isinstance(value.shape[1], int) and isinstance(value.shape[3], int)


def _turned_twice(value: ir.Value, reader: ir.Node, graph: ir.Graph) -> ir.Value:
    """Return a value as it is, behind (batch, tokens, heads, size), of which heads are joined."""
    assert value.shape is not None
    batch, heads, tokens, size = value.shape
    nodes: list[ir.Node] = []
    for shape in ((batch, tokens, heads, size), (batch, heads, tokens, size)):
        read = nodes[-1].outputs[0] if nodes else value
        nodes.append(ir.node("Transpose", [read], {"perm": [0, 2, 1, 3]}))
        nodes[-1].outputs[0].type, nodes[-1].outputs[0].shape = value.type, ir.Shape(shape)
    graph.insert_before(reader, nodes)
    return nodes[-1].outputs[0]


def can_be_flat(node: ir.Node, count: int) -> bool:
    """Say whether an attention can read its first inputs joined, and give joined heads."""
    users = node.outputs[0].consumers()
    if len(users) != 1 or not _swaps(users[0]):
        return False
    given = _apart(users[0].outputs[0])
    if given is None or given.value.is_graph_output():
        return False
    if _key_heads(node) is None:
        return False
    return all(_before_swap(value) is not None for value in node.inputs[:count])


def _key_heads(node: ir.Node) -> int | None:
    """Return how many heads the keys have that an attention reads apart, if it is known."""
    key = node.inputs[1]
    apart = _before_swap(key)
    if apart is not None:
        return apart.heads
    if key is None or key.shape is None or not isinstance(key.shape[1], int):
        return None
    return key.shape[1]


def make_flat(node: ir.Node, graph: ir.Graph, count: int) -> None:
    """Let an attention, of which :func:`can_be_flat` holds, do so in place."""
    given, key_heads = _apart(node.outputs[0].consumers()[0].outputs[0]), _key_heads(node)
    assert given is not None and key_heads is not None
    for index, value in enumerate(node.inputs[:count]):
        apart = _before_swap(value)
        assert value is not None and apart is not None
        node.replace_input_with(index, _joined(value, apart, node, graph))
    node.attributes["q_num_heads"] = ir.AttrInt64("q_num_heads", given.heads)
    node.attributes["kv_num_heads"] = ir.AttrInt64("kv_num_heads", key_heads)
    _give(node, given, graph)


def _give(node: ir.Node, given: Apart, graph: ir.Graph) -> None:
    """Let an attention give joined heads to what read them apart."""
    joined = node.outputs[0]
    joined.shape = ir.Shape([*given.rows, given.heads * given.size])
    for user in given.value.consumers():
        if is_op(user, "Reshape") and given.is_joined(user.outputs[0]):
            ir.convenience.replace_all_uses_with(
                user.outputs[0], joined, replace_graph_outputs=True
            )
            graph.remove(user, safe=True)
    if given.value.uses():
        sizes = (0, 0, given.heads, given.size)
        split = _reshape(joined, sizes, [*given.rows, given.heads, given.size], graph)
        graph.insert_after(node, split)
        ir.convenience.replace_all_uses_with(given.value, split.outputs[0])


def _before_swap(value: ir.Value | None) -> Apart | None:
    """Return (batch, tokens, heads, size) of which a value is the turned form.

    Behind the turn it may be rotated, and before that each head normed.
    """
    node = _producer(value, "RotaryEmbedding")
    if node is not None:
        value = node.inputs[0]
    node = _producer(value, "RMSNormalization")
    if node is not None:
        scale = node.inputs[1]
        if node.attributes["axis"].as_int() != -1 or scale is None or _rank(scale) != 1:
            return None
        value = node.inputs[0]
    node = _producer(value, "Transpose")
    if node is None or not _swaps(node) or node.inputs[0] is None:
        return None
    return _apart(node.inputs[0])


def _rank(value: ir.Value) -> int | None:
    return None if value.shape is None else value.shape.rank()


def _producer(value: ir.Value | None, kind: str) -> ir.Node | None:
    """Return the node that gives a value if it is of that kind."""
    node = value.producer() if value is not None else None
    if node is None or not is_op(node, kind):
        return None
    return node


def _joined(value: ir.Value, apart: Apart, reader: ir.Node, graph: ir.Graph) -> ir.Value:
    """Return (batch, tokens, heads x size) of what is ``apart`` before it is turned into a value.

    What that takes is put before the node that reads it.
    """
    rotation, joined = _producer(value, "RotaryEmbedding"), None
    norm = _producer(rotation.inputs[0] if rotation else value, "RMSNormalization")
    if norm is not None:
        inputs = [apart.value, *norm.inputs[1:]]
        normed = ir.Node("", "RMSNormalization", inputs, norm.attributes.values())
        normed.outputs[0].type, normed.outputs[0].shape = apart.value.type, apart.value.shape
        graph.insert_before(reader, normed)
        apart = apart._replace(value=normed.outputs[0])
    split = _producer(apart.value, "Reshape")
    if split is not None and apart.is_joined(split.inputs[0]):
        joined = split.inputs[0]
    if joined is None:
        width = apart.heads * apart.size
        join = _reshape(apart.value, (0, 0, width), [*apart.rows, width], graph)
        graph.insert_before(reader, join)
        joined = join.outputs[0]
    if rotation is None:
        return joined
    heads = ir.AttrInt64("num_heads", apart.heads)
    attributes = {**rotation.attributes, "num_heads": heads}.values()
    rotated = ir.Node("", "RotaryEmbedding", [joined, *rotation.inputs[1:]], attributes)
    rotated.outputs[0].type, rotated.outputs[0].shape = joined.type, joined.shape
    graph.insert_before(reader, rotated)
    return rotated.outputs[0]


def _reshape(
    value: ir.Value, sizes: Sequence[int], shape: Sequence[Any], graph: ir.Graph
) -> ir.Node:
    """Return a node that gives a value in another shape; of ``sizes`` 0 is one that stays."""
    wanted = store(graph, f"{value.name}.sizes", ir.Tensor(np.array(sizes, np.int64)))
    node = ir.Node("", "Reshape", [value, wanted])
    node.outputs[0].type, node.outputs[0].shape = value.type, ir.Shape(shape)
    return node


def _swaps(node: ir.Node) -> bool:
    """Say whether a node puts tokens before heads, or heads before tokens."""
    return is_op(node, "Transpose") and list(node.attributes["perm"].as_ints()) == [0, 2, 1, 3]


def _apart(value: ir.Value) -> Apart | None:
    if value.shape is None or value.shape.rank() != 4:
        return None
    batch, tokens, heads, size = value.shape
    if isinstance(heads, int) and isinstance(size, int):
        return Apart(value, (batch, tokens), heads, size)
    return None
