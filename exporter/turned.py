"""Queries and keys that attention rotates itself, in the graph for onnxruntime-genai.

``exporter/genai.py`` calls :func:`turn_inside`. ``GroupQueryAttention`` takes tables of cosines and
sines, one row for each position; then it reads the product of queries, keys and values as it is,
and no node stands between. The tables are not stored: what the graph computes of the positions it
is given, it computes of all there are, which ONNX Runtime does once, when it loads the graph.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ffmerge.passes.graph.rewrite import store
from ffmerge.passes.graph.tensors import Array, is_op
from ffmerge.passes.graph.transposed import numbers

PLACES = "position_ids"
SOME = (5, 0, 2, 3)  # positions whose angles are compared with those of all


def turn_inside(model: ir.Model, length: int) -> None:
    """Let each attention rotate what it reads, where angles are those of the positions, in place.

    There are ``length`` positions at most.
    """
    places = next((value for value in model.graph.inputs if value.name == PLACES), None)
    tables: dict[Any, list[ir.Value] | None] = {}
    for node in list(model.graph):
        if places is None or node.op_type != "GroupQueryAttention":
            continue
        turns = [_turn(value) for value in node.inputs[:2]]
        query, key = turns
        if query is None or key is None or _setting(query) != _setting(key):
            continue
        angles = tuple(query.inputs[1:])
        if angles not in tables:
            tables[angles] = _tables(model, angles, places, length)
        found = tables[angles]
        if found is not None:
            read = _packed([query.inputs[0], key.inputs[0], node.inputs[2]])
            inputs = [*read, *node.inputs[3:7], *found, places]
            node.resize_inputs(len(inputs))
            for index, value in enumerate(inputs):
                node.replace_input_with(index, value)
            node.attributes["do_rotary"] = ir.AttrInt64("do_rotary", 1)
            turned = query.attributes.get_int("interleaved", 0) or 0
            node.attributes["rotary_interleaved"] = ir.AttrInt64("rotary_interleaved", turned)
    RemoveUnusedNodesPass()(model)


def _turn(value: ir.Value | None) -> ir.Node | None:
    """Return the rotation that gives a value, by angles of each token."""
    node = value.producer() if value is not None else None
    if node is None or not is_op(node, "RotaryEmbedding") or len(node.inputs) != 3:
        return None
    return node


def _setting(turn: ir.Node) -> Any:
    names = ("interleaved", "rotary_embedding_dim")
    return *turn.inputs[1:], *(turn.attributes.get_int(name, 0) for name in names)


def _packed(values: Sequence[ir.Value | None]) -> list[ir.Value | None]:
    """Return what a Split made queries, keys and values of, and nothing else, or these."""
    node = values[0].producer() if values[0] is not None else None
    if node is not None and is_op(node, "Split") and list(node.outputs) == list(values):
        return [node.inputs[0], None, None]
    return list(values)


def _tables(
    model: ir.Model, angles: Sequence[ir.Value | None], places: ir.Value, length: int
) -> list[ir.Value] | None:
    """Return (length, size) of each of the angles, or None where they go by more than positions."""
    wanted = [value for value in angles if value is not None]
    nodes = _nodes_of(wanted, places)
    if nodes is None or not _go_by_position(model, wanted, places, length):
        return None
    graph = model.graph
    ends = [store(graph, f"genai.{n}", ir.tensor(np.array(n))) for n in (0, length, 1)]
    counted = ir.node("Range", ends)
    rows = ir.node("Reshape", [counted.outputs[0], numbers(graph, (1, -1))])
    new, made = {places: rows.outputs[0]}, [counted, rows]
    for node in (each for each in graph if each in nodes):
        inputs = [value if value is None else new.get(value, value) for value in node.inputs]
        copied = ir.Node(
            node.domain, node.op_type, inputs, node.attributes.values(),
            num_outputs=len(node.outputs),
        )  # fmt: skip
        new.update(zip(node.outputs, copied.outputs, strict=True))
        made.append(copied)
    tables = []
    for value in wanted:
        made.append(ir.node("Reshape", [new[value], numbers(graph, (length, -1))]))
        tables.append(made[-1].outputs[0])
    for number, node in enumerate(made):
        node.outputs[0].name = f"{wanted[0].name}/table.{number}"
    graph.insert_before(graph[0], made)
    return tables


def _nodes_of(values: Sequence[ir.Value], places: ir.Value) -> set[ir.Node] | None:
    """Return the nodes that compute values of the positions; None if they read other inputs."""
    found: set[ir.Node] = set()
    open_values = list(values)
    while open_values:
        value = open_values.pop()
        node = value.producer()
        if node is None and value is not places and not value.is_initializer():
            return None
        if node is not None and node not in found:
            if len(node.outputs) != 1:
                return None
            found.add(node)
            open_values += [each for each in node.inputs if each is not None]
    return found


def _go_by_position(
    model: ir.Model, values: Sequence[ir.Value], places: ir.Value, length: int
) -> bool:
    """Say whether the angles of a position are the same whatever the others are."""
    some = [place for place in SOME if place < length]
    for value in values:
        session = session_of(model, value, [places])
        found: list[Array] = []
        for each in (np.arange(length)[None], np.array([some])):
            (array,) = session.run(None, {PLACES: each})
            found.append(array)
        if found[0].ndim != 3 or not np.array_equal(found[0][:, some], found[1]):
            return False
    return True


def session_of(model: ir.Model, value: ir.Value, inputs: Sequence[ir.Value]) -> Any:
    """Return a session that computes one value of a graph from these inputs of it."""
    part = ir.convenience.extract(model.graph, inputs, [value])
    found = ir.to_proto(ir.Model(part, ir_version=model.ir_version))
    return opened(found.SerializeToString())


def opened(source: Any) -> Any:
    """Return a session of a graph on ONNX Runtime's CPU, which reads weights where the file is.

    For few runs: packed, they would be copied, and each product would be faster.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what it does not take is told as a reason
    options.add_session_config_entry("session.disable_prepacking", "1")
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
