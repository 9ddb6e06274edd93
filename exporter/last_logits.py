"""Logits of the last tokens only: all that is read of a prompt where text is written.

transformers gives its models ``logits_to_keep``, and transformers.js feeds ``num_logits_to_keep``,
an int64 of no dimension, to a decoder that has such an input: 1 where it generates, else 0, which
means all. :func:`keep_last`, which ``torch_onnx.py`` calls for a decoder with a cache, lets the
graph multiply by the head for these tokens only: a prompt of 1,024 needs one row of logits.

The graphs that transformers.js loads have the input. In those for ONNX Runtime's CPU
:func:`offer_all` gives it a default, all: who does not know it need not feed it.
"""

import sys

import numpy as np
import onnx_ir as ir

from ffmerge.models.kv_cache import KEPT
from ffmerge.passes.graph.rewrite import store
from ffmerge.passes.graph.tensors import is_op

LOGITS = "logits"
ALL = 1 << 62  # of more tokens than there are, all count; 0 is among the numbers of a graph, and
# one number that two places read could not be given by a caller
KEPT_SIZE = "num_logits"  # the name of how many there are
_ELEMENTWISE = ("Add", "Sub", "Mul", "Div", "Tanh", "Identity", "Cast")


def keep_last(model: ir.Model) -> None:
    """Let a graph give the logits of its last ``KEPT`` tokens, in place, of all where that is 0.

    Without an input of that name it gets one.
    """
    graph = model.graph
    (logits,) = (value for value in graph.outputs if value.name == LOGITS)
    sliced, behind = _head_reads(logits)
    reader = behind[-1] if behind else None
    start = ir.node("Neg", [_kept(graph)])
    ones = store(graph, f"{KEPT}.ones", ir.tensor(np.array([1])))
    first = ir.node("Reshape", [start.outputs[0], ones])
    last = store(graph, f"{KEPT}.last", ir.tensor(np.array([sys.maxsize])))
    rows = ir.node("Slice", [sliced, first.outputs[0], last, ones])
    kept = rows.outputs[0]
    kept.type, kept.shape = sliced.type, _fewer(sliced)
    if reader is None:  # nothing to save, and the same to who reads them
        node = logits.producer()
        assert node is not None
        graph.insert_after(node, [start, first, rows])
        logits.name, kept.name = f"{LOGITS}.all", LOGITS
        graph.outputs[graph.outputs.index(logits)] = kept
        return
    graph.insert_before(reader, [start, first, rows])
    reader.replace_input_with(reader.inputs.index(sliced), kept)
    for node in behind:
        node.outputs[0].shape = _fewer(node.outputs[0])


def _kept(graph: ir.Graph) -> ir.Value:
    """Return the input that says how many tokens count, a new one if there is none."""
    for value in graph.inputs:
        if value.name == KEPT:
            return value
    value = ir.Value(name=KEPT, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([]))
    graph.inputs.append(value)
    return value


def offer_all(model: ir.Model) -> None:
    """Let the input of :func:`keep_last` have a default, so that it need not be fed."""
    value = _kept(model.graph)
    value.const_value = ir.tensor(np.array(ALL), name=KEPT)
    model.graph.register_initializer(value)


def _head_reads(logits: ir.Value) -> tuple[ir.Value, list[ir.Node]]:
    """Return what the head's product reads, and the nodes from the logits back to it.

    Where no product by a matrix is found, the logits, and no node.
    """
    nodes: list[ir.Node] = []
    value = logits
    while (node := value.producer()) is not None:
        if value is not logits and (value.is_graph_output() or len(value.uses()) > 1):
            break
        inputs = [each for each in node.inputs if each is not None]
        nodes.append(node)
        if is_op(node, "MatMul") and _rank(inputs[0]) == 3 and not _computed(inputs[1]):
            return inputs[0], nodes
        computed = [each for each in inputs if _computed(each)]
        others = [each for each in inputs if not _computed(each)]
        if not is_op(node, *_ELEMENTWISE) or len(computed) != 1 or any(map(_by_token, others)):
            break
        value = computed[0]
    return logits, []


def _computed(value: ir.Value) -> bool:
    """Say whether a value depends on the graph's inputs."""
    node = value.producer()
    if node is None:
        return not value.is_initializer() or value.is_graph_input()
    return any(_computed(each) for each in node.inputs if each is not None)


def _rank(value: ir.Value) -> int | None:
    return None if value.shape is None else value.shape.rank()


def _by_token(value: ir.Value) -> bool:
    """Say whether a value may be another one for each token."""
    return (_rank(value) or 0) > 1 or value.shape is None


def _fewer(value: ir.Value) -> ir.Shape | None:
    """Return the shape of a value with as many tokens as are kept."""
    if value.shape is None:
        return None
    batch, _, *others = value.shape
    return ir.Shape([batch, KEPT_SIZE, *others])
