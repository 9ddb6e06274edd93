"""Keys and values that stay float16 between the steps of a decoder that computes in float16.

``exporter/convert.py`` calls :func:`halve_cache` where a profile says so. Else inputs and outputs
of a graph are float32, and each step casts all that was kept, to and fro.
"""

from collections.abc import Sequence

import onnx_ir as ir

from ffmerge.models import kv_cache
from ffmerge.passes.graph.tensors import is_op

_HALF = ir.DataType.FLOAT16


def halve_cache(models: Sequence[ir.Model]) -> bool:
    """Let the graphs of a package take and give keys and values in float16, in place.

    All of them, or none if one computes any in float32: what one gives the next one takes. Say
    whether they do.
    """
    if not all(map(_can_be_half, models)):
        return False
    for model in models:
        for value in model.graph.inputs:
            if kv_cache.is_past(str(value.name)):
                _take_half(value, model.graph)
        for index, value in enumerate(model.graph.outputs):
            if kv_cache.is_present(str(value.name)):
                _give_half(index, value, model.graph)
    return True


def _can_be_half(model: ir.Model) -> bool:
    """Say whether what is kept is only cast, to float16 where it is read, from it where given.

    Each output from a value of its own: that takes its name.
    """
    halves: set[ir.Value] = set()
    for value in model.graph.inputs:
        if kv_cache.is_past(str(value.name)):
            if value.is_graph_output() or not all(map(_casts_to_half, value.consumers())):
                return False
    for value in model.graph.outputs:
        if kv_cache.is_present(str(value.name)):
            half = _half_of(value)
            if half is None or half in halves:
                return False
            halves.add(half)
    return True


def _casts_to_half(node: ir.Node) -> bool:
    return is_op(node, "Cast") and node.attributes["to"].as_int() == _HALF


def _half_of(value: ir.Value) -> ir.Value | None:
    """Return the float16 value of the graph that an output is cast from, if it is."""
    node = value.producer()
    if node is None or not is_op(node, "Cast") or node.inputs[0] is None:
        return None
    source = node.inputs[0]
    if source.dtype != _HALF or source.is_graph_input() or source.is_graph_output():
        return None
    return source


def _take_half(value: ir.Value, graph: ir.Graph) -> None:
    value.type = ir.TensorType(_HALF)
    for node in list(value.consumers()):
        ir.convenience.replace_all_uses_with(node.outputs[0], value)
        graph.remove(node, safe=True)


def _give_half(index: int, value: ir.Value, graph: ir.Graph) -> None:
    half, node = _half_of(value), value.producer()
    assert half is not None and node is not None
    graph.outputs[index] = half
    ir.convenience.replace_all_uses_with(value, half)  # a later cast of it is one of float16 then
    graph.remove(node, safe=True)
    half.name, half.doc_string = value.name, value.doc_string
    half.shape = half.shape or value.shape
    half.metadata_props.update(value.metadata_props)
