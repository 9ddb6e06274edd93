"""Two graphs as one, of which the second reads what the first puts out.

For a budget of several graphs: run as one, a weight of the first is judged by what the second makes
of it, and a weight that both read is one. :func:`join` makes such a graph, which nothing is written
of; ``exporter/convert.py`` calls it.
"""

from collections.abc import Mapping
from copy import deepcopy

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import NameFixPass

from ffmerge.passes.graph.tensors import shape_of, values_of

SECOND = "second."  # before the names of its inputs, which may be those of the first graph's


def join(first: ir.Model, second: ir.Model, reads: Mapping[str, str]) -> ir.Model:
    """Return a graph with the outputs of ``second``; ``reads`` are inputs of it, by output.

    Weights keep their names, and the two models are left as they are.
    """
    joined, other = clone(first), clone(second)
    graph, outputs = joined.graph, {value.name: value for value in joined.graph.outputs}
    given = {reads[str(name)]: value for name, value in outputs.items() if name in reads}
    inputs = list(other.graph.inputs)
    other.graph.inputs.clear()
    for value in inputs:
        if value.name in given:
            value.replace_all_uses_with(given[value.name])
        else:
            value.name = f"{SECOND}{value.name}"
            graph.inputs.append(value)
    _take_weights(graph, other.graph)
    found = list(other.graph.outputs)
    other.graph.outputs.clear()
    nodes = list(other.graph)
    other.graph.remove(nodes)
    graph.extend(nodes)
    graph.outputs.clear()
    graph.outputs.extend(found)
    joined.opset_imports.update(other.opset_imports)
    joined.functions.update(other.functions)
    NameFixPass()(joined)
    return joined


def clone(model: ir.Model) -> ir.Model:
    """Return a model with nodes and values of its own; a clone of onnx_ir has the same types."""
    copy = model.clone()
    for graph in copy.graphs():
        values = [*graph.inputs, *graph.initializers.values()]
        for node in graph:
            values += node.outputs
        for value in values:
            value.type = deepcopy(value.type)
    return copy


def _take_weights(graph: ir.Graph, other: ir.Graph) -> None:
    """Move the initializers of another graph into one; those that both have are one."""
    for name, value in list(other.initializers.items()):
        del other.initializers[name]
        held = graph.initializers.get(name)
        if held is not None and _equal(held, value):
            value.replace_all_uses_with(held)
            continue
        if held is not None:
            value.name = f"{SECOND}{name}"
        graph.initializers.add(value)


def _equal(one: ir.Value, other: ir.Value) -> bool:
    first, second = one.const_value, other.const_value
    if first is None or second is None or first is second:
        return first is second
    if first.dtype != second.dtype or shape_of(first) != shape_of(second):
        return False
    return np.array_equal(values_of(first), values_of(second))
