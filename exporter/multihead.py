"""Attention as operators of ONNX Runtime's own, for ``export --for webgpu``.

Its WebGPU has no kernel for ONNX's ``Attention``, and flash kernels for two operators of its own
(onnxruntime-ep-webgpu 0.4.0, onnxruntime-web 1.31). ``exporter/convert.py`` calls
:func:`check_multihead` on the graphs in float32, and :func:`use_multihead` when they are in their
precision. An attention becomes ``MultiHeadAttention``, which computes the same; where several
heads read one key it becomes ``GroupQueryAttention``, which lets no token read a later one,
whatever its mask says. Both are given the mask, so that padding may stand anywhere.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ffmerge.exporter.flat import can_be_flat, make_flat
from ffmerge.exporter.fused import HIDDEN, NotFused
from ffmerge.exporter.graphs import Graph
from ffmerge.exporter.turned import session_of
from ffmerge.models.probe import Probe
from ffmerge.passes.graph.blocks import MICROSOFT
from ffmerge.passes.graph.rewrite import store
from ffmerge.passes.graph.tensors import is_op

WHOLE = 8  # of heads that share keys the size is a multiple of this
_MASK, _PAST = 3, 4  # inputs of Attention
PAST_SIZE = "past_sequence_length"  # of a decoder alone
ONE = "lengths.one"
QUERY = 1  # how many of its inputs the query is


def check_multihead(model: ir.Model, graph: Graph) -> None:
    """Raise NotFused unless each attention of a graph can be one of the two operators.

    What the masks let through is computed for the inputs on which the graph is compared later.
    """
    masks: dict[ir.Value, None] = {}
    for node in [node for node in model.graph if is_op(node, "Attention")]:
        mask = _input(node, _MASK)
        if not _is_joined(node) and not _can_be_joined(node):
            raise NotFused("heads are not joined before an attention")
        if mask is not None and (mask.shape is None or mask.shape.rank() != 4):
            raise NotFused("a mask has not the four sizes that the operator takes")
        if _is_joined(node) and _shares_keys(node):
            masks[_mask_for_shared_keys(node, graph)] = None
    for mask in masks:
        _check_causal(model, graph, mask)


def _mask_for_shared_keys(node: ir.Node, graph: Graph) -> ir.Value:
    """Return the mask of an attention whose heads share keys.

    Raises:
        NotFused: it is not the attention of a decoder alone, or its heads are too narrow.
    """
    mask = _input(node, _MASK)
    if mask is None or _input(node, _PAST) is None or PAST_SIZE not in graph.probe.cases[0]:
        raise NotFused("heads share keys elsewhere than in a decoder alone with a mask and a past")
    if _head_size(node) % WHOLE:
        raise NotFused(f"heads share keys whose size is no multiple of {WHOLE}")
    return mask


def _check_causal(model: ir.Model, graph: Graph, mask: ir.Value) -> None:
    """Raise NotFused if a mask lets a token read a later one."""
    session = session_of(model, mask, [v for v in model.graph.inputs if not v.is_initializer()])
    wanted = {given.name for given in session.get_inputs()}
    for case in range(len(graph.probe.cases)):
        feeds = graph.probe.draw(case)
        (found,) = session.run(None, {name: feeds[name] for name in wanted})
        new, whole = found.shape[-2:]
        later = np.arange(whole) > np.arange(whole - new, whole)[:, None]
        # a row of padding has nothing to read, and is read by none
        read = (found > HIDDEN / 2) & later
        if read.any():
            raise NotFused("heads share keys, and a mask lets a token read later ones")


def use_multihead(model: ir.Model) -> None:
    """Let each attention of a graph, of which :func:`check_multihead` holds, be one of the two."""
    lengths: dict[ir.Value, list[ir.Value]] = {}
    for node in list(model.graph):
        if not is_op(node, "Attention"):
            continue
        if not _is_joined(node):
            make_flat(node, model.graph, QUERY)
        mask, past = _input(node, _MASK), [_input(node, _PAST), _input(node, _PAST + 1)]
        read: list[ir.Value | None] = list(node.inputs[:3])
        heads = ir.AttrInt64("num_heads", node.attributes["q_num_heads"].as_int())
        attributes = [heads, *(node.attributes[n] for n in ("scale",) if n in node.attributes)]
        if _shares_keys(node):
            assert mask is not None
            if mask not in lengths:
                lengths[mask] = _lengths(mask, node)
            attributes.append(node.attributes["kv_num_heads"])
            inputs = [*read, *past, *lengths[mask], None, None, None, mask]
            kind = "GroupQueryAttention"
        else:
            inputs = [*read, None, None, mask, *past]
            kind = "MultiHeadAttention"
        new = ir.Node(
            MICROSOFT, kind, inputs, attributes, num_outputs=len(node.outputs), name=node.name
        )
        ir.convenience.replace_nodes_and_values(
            model.graph, node, [node], [new], node.outputs, new.outputs
        )
        model.opset_imports[MICROSOFT] = 1
    RemoveUnusedNodesPass()(
        model
    )  # what turned the heads: in place of four sizes it is given three


def shares_keys(model: ir.Model) -> bool:
    """Say whether an attention of a graph will be ``GroupQueryAttention``."""
    nodes = [node for node in model.graph if is_op(node, "Attention")]
    return any(_is_joined(node) and _shares_keys(node) for node in nodes)


def one_row_behind_a_past(probe: Probe) -> Probe:
    """Return the recipe with one row only where several tokens follow a past.

    Of more ``GroupQueryAttention`` says that it does not take them so (onnxruntime 1.31.1): a
    prompt may have several rows, and each later step.
    """
    cases = []
    for sizes in probe.cases:
        if sizes.get(PAST_SIZE) and sizes["sequence_length"] > 1:
            sizes = {**sizes, "batch_size": 1}
        cases.append(sizes)
    return replace(probe, cases=tuple(cases))


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _is_joined(node: ir.Node) -> bool:
    """Say whether an attention reads and gives joined heads."""
    return "q_num_heads" in node.attributes


def _can_be_joined(node: ir.Node) -> bool:
    """Say whether one whose keys and values lie apart, as they are kept, can read joined queries.

    So a decoder reads what it kept of the encoder.
    """
    key, value = (_input(node, index) for index in (1, 2))
    query = node.inputs[0]
    if _input(node, _PAST) is not None or not can_be_flat(node, QUERY):
        return False
    shapes = [each.shape for each in (query, key, value) if each is not None]
    return all(shape is not None and shape.rank() == 4 for shape in shapes) and (
        len({shape[1] for shape in shapes if shape is not None}) == 1
    )


def _shares_keys(node: ir.Node) -> bool:
    return node.attributes["q_num_heads"].as_int() != node.attributes["kv_num_heads"].as_int()


def _head_size(node: ir.Node) -> Any:
    past = _input(node, _PAST)
    assert past is not None and past.shape is not None
    return past.shape[3]


def _lengths(mask: ir.Value, before: ir.Node) -> list[ir.Value]:
    """Return two inputs of the operator: tokens of each row less one, and of all rows.

    Every row counts all tokens: which of them are none the mask says.
    """
    graph = before.graph
    assert graph is not None
    one = graph.initializers.get(ONE)  # of another mask
    if one is None:
        one = store(graph, ONE, ir.tensor(np.array([1], np.int32)))
    rows = ir.node("Shape", [before.inputs[0]], {"start": 0, "end": 1})
    width = ir.node("Shape", [mask], {"start": 3, "end": 4})
    whole = ir.node("Cast", [width.outputs[0]], {"to": ir.DataType.INT32})
    less = ir.node("Sub", [whole.outputs[0], one])
    each = ir.node("Expand", [less.outputs[0], rows.outputs[0]])
    single = ir.node("Squeeze", [whole.outputs[0]])
    nodes = [rows, width, whole, less, each, single]
    for number, node in enumerate(nodes):
        node.outputs[0].name = f"{mask.name}/length.{number}"
    graph.insert_before(before, nodes)
    return [each.outputs[0], single.outputs[0]]
