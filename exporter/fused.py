"""Attention, norms and rotation as one operator each, for ``export --for cpu``.

``torch_onnx.py`` calls :func:`fused_attention` around the tracing: transformers' models let a
function that was registered compute their attention, and :func:`attend` puts the operator
``Attention`` of ONNX (opset 23) into the program. :func:`fuse` works on the finished graph: RMS
norms and rotations become the operators of that opset, and keys and values of the past go into
the attention that appends to them. All are operators of the standard; ONNX Runtime's CPU has
kernels for them that need no copy of the keys for each head that reads them.

A model that computes its attention otherwise, or not the same as with its own function, is
exported with plain products, and the reason is kept.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import CommonSubexpressionEliminationPass, RemoveUnusedNodesPass
from onnxscript.rewriter import onnx_fusions
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
from transformers.masking_utils import eager_mask

from ffmerge.errors import ExportError
from ffmerge.exporter.flat import read_flat
from ffmerge.exporter.graphs import Graph
from ffmerge.exporter.settle import has_large_pictures
from ffmerge.exporter.simplify import trivial
from ffmerge.models.probe import Array
from ffmerge.passes.graph.rewrite import store
from ffmerge.passes.graph.tensors import is_op, shape_of

OPSET = 23  # the first that has the operators
FUNCTION = "onnx_attention"  # the name under which transformers knows it
# by which every token reads every other; transformers 4 has none
READS_ALL = getattr(masking_utils, "bidirectional_mask_function", None)
HIDDEN = -1e30  # added to a score that does not count; for float32's lowest ONNX Runtime gives
# zeros where nothing counts, as in rows of padding, and PyTorch does not
# of the largest element of an output: how far the two may be apart in float64, and in float32
CLOSE, CLOSE_32 = 1e-6, 1e-4


class NotFused(ExportError):
    """A model's attention is not computed by one operator; the message says why."""


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, softcap: float | None = None,
    position_bias: Tensor | None = None, **given: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Return the attention of (batch, heads, tokens, size) as (batch, tokens, heads, size).

    Raises:
        NotFused: the operator cannot be told what the model asks for.
    """
    if softcap is not None:
        raise NotFused("scores are capped, in an order that runtimes do not agree on")
    if value.shape[-1] != key.shape[-1]:
        raise NotFused("values have another size than keys")
    if given.get("dropout") and module.training:
        raise NotFused("the model is in training")
    if attention_mask is not None and position_bias is not None:
        position_bias = position_bias + attention_mask
    if position_bias is None:
        position_bias = attention_mask
    if position_bias is not None and _is_one(position_bias.shape[2]):
        position_bias = position_bias.expand(-1, -1, query.shape[2], -1)
    mixed, *_ = torch.onnx.ops.attention(query, key, value, attn_mask=position_bias, scale=scaling)
    return mixed.transpose(1, 2).contiguous(), None


def _is_one(size: Any) -> bool:
    """Say whether a mask has one row for every query, which ONNX Runtime would not repeat."""
    return isinstance(size, int) and size == 1


def _mask(**given: Any) -> Tensor | None:
    """Return the mask of plain attention, what does not count a large number below zero.

    Where every token reads every other, that is the padding of each row: few nodes of a graph.
    """
    padding = given.get("attention_mask")
    reads_all = READS_ALL is not None and given.get("mask_function") is READS_ALL
    if reads_all and padding is not None:
        added = torch.where(padding[:, None, None, :].bool(), 0.0, HIDDEN)
        return added.expand(given["batch_size"], 1, given["q_length"], given["kv_length"])
    mask = eager_mask(**given)
    if mask is None:
        return None
    return mask.clamp(min=HIDDEN)


@contextlib.contextmanager
def fused_attention(model: Any) -> Iterator[None]:
    """Let :func:`attend` compute the attention of a model.

    Raises:
        NotFused: the model's class does not let its attention be set.
    """
    if not model._can_set_attn_implementation():
        raise NotFused(f"{type(model).__name__} computes its attention by code of its own")
    before = model.config._attn_implementation
    AttentionInterface.register(FUNCTION, attend)
    AttentionMaskInterface.register(FUNCTION, _mask)
    try:
        model.set_attn_implementation(FUNCTION)
        yield
    finally:
        model.set_attn_implementation(before)


def check_fused(graph: Graph) -> Graph:
    """Return the graph, which gives the same with :func:`attend` as with its own attention.

    On the cases that it is compared on later, of large pictures on the first, by PyTorch, in
    float64 if its operators can: what differs then is no rounding, however little attention says.
    It knows what it gives for them.

    Raises:
        NotFused: it does not give the same.
    """
    for case in range(len(graph.probe.cases)):
        feeds = graph.probe.draw(case)
        if case and has_large_pictures(feeds):
            continue
        exact, close = True, CLOSE
        try:
            expected = graph.answer(feeds, exact)
        except RuntimeError:  # an operator has no float64 kernel
            exact, close = False, CLOSE_32
            expected = graph.answer(feeds)
        with fused_attention(graph.module.model):
            found = _run(graph, feeds, exact)
        for name, array in expected.items():
            off = np.abs(found[name] - array).max(initial=0)
            if not off <= close * np.abs(array).max(initial=0):
                raise NotFused(f"with the operator {name} is not what the model gives")
        graph = graph.knowing(feeds, expected, exact)
    return graph


def _run(graph: Graph, feeds: Mapping[str, Array], exact: bool) -> dict[str, Array]:
    try:
        return graph.run(feeds, exact)
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise NotFused(f"the operator does not take what the model gives it: {error}") from error


def fuse(model: ir.Model) -> None:
    """Let one operator compute each norm and rotation, and attention append to the past."""
    for value in model.graph.initializers.values():
        if value.const_value is not None:  # the rules look at the types of values
            value.dtype = value.const_value.dtype
            value.shape = ir.Shape(shape_of(value.const_value))
    onnx_fusions.fuse(model)
    onnx_fusions.fuse(trivial(OPSET))  # rules hold the last graph that they saw
    CommonSubexpressionEliminationPass()(model)  # angles, once for all layers
    _repeat_angles(model.graph)
    for node in list(model.graph):
        if is_op(node, "Attention") and len(node.inputs) <= 4:
            _append_inside(node)
    read_flat(model)
    RemoveUnusedNodesPass()(model)
    CommonSubexpressionEliminationPass()(model)


def _repeat_angles(graph: ir.Graph) -> None:
    """Let cosines and sines that one row has for all be there for each, as the operator asks."""
    made: dict[ir.Value, ir.Value] = {}
    for node in list(graph):
        if not is_op(node, "RotaryEmbedding") or len(node.inputs) != 3:
            continue
        turned = node.inputs[0]
        for index, angle in enumerate(node.inputs[1:], 1):
            if turned is None or angle is None or _rows(angle) == _rows(turned) is not None:
                continue
            if angle not in made:
                made[angle] = _for_each_row(angle, turned, node, graph)
            node.replace_input_with(index, made[angle])


def _rows(value: ir.Value) -> Any:
    """Return the first size of a value, or of what it is a cosine or a sine of, if it is known."""
    node = value.producer()
    if value.shape is None and node is not None and is_op(node, "Cos", "Sin") and node.inputs[0]:
        value = node.inputs[0]
    return value.shape[0] if value.shape is not None else None


def _for_each_row(angle: ir.Value, like: ir.Value, before: ir.Node, graph: ir.Graph) -> ir.Value:
    """Return (1, tokens, size) repeated for as many rows as another value has."""
    ones = store(graph, f"{angle.name}.ones", ir.tensor([1, 1]))
    rows = ir.node("Shape", [like], {"start": 0, "end": 1})
    sizes = ir.node("Concat", [rows.outputs[0], ones], {"axis": 0})
    repeated = ir.node("Expand", [angle, sizes.outputs[0]])
    repeated.outputs[0].type = angle.type
    graph.insert_before(before, [rows, sizes, repeated])
    return repeated.outputs[0]


def _append_inside(node: ir.Node) -> None:
    """Give an attention the past, and what is appended to it, where two nodes joined them."""
    key, value = (_appends(joined) for joined in node.inputs[1:3])
    if key is None or value is None or key is value or not _append_alike(key, value):
        return
    if _leads_to(node, [key.outputs[0], value.outputs[0]]):
        return
    mask = [*node.inputs[3:], None][:1]
    past, new = ([each.inputs[number] for each in (key, value)] for number in (0, 1))
    whole = ir.Node(
        "", "Attention", [node.inputs[0], *new, *mask, *past], node.attributes.values(),
        num_outputs=3, name=node.name,
    )  # fmt: skip
    assert node.graph is not None
    joined = [node.outputs[0], key.outputs[0], value.outputs[0]]
    ir.convenience.replace_nodes_and_values(
        node.graph, node, [node, key, value], [whole], joined, whole.outputs
    )


def _append_alike(key: ir.Node, value: ir.Node) -> bool:
    """Say whether keys and values are appended to as many, as many new ones."""
    for one, other in zip(key.inputs, value.inputs, strict=True):
        if _tokens(one) is None or _tokens(one) != _tokens(other):
            return False
    return True


def _leads_to(node: ir.Node, values: Sequence[ir.Value]) -> bool:
    """Say whether a node reads what others make of values, as a mask that is made of the keys."""
    seen, waiting = {node}, [user for value in values for user in value.consumers()]
    waiting = [user for user in waiting if user is not node]
    while waiting:
        for value in waiting.pop().outputs:
            for user in value.consumers():
                if user is node:
                    return True
                if user not in seen:
                    seen.add(user)
                    waiting.append(user)
    return False


def _appends(value: ir.Value | None) -> ir.Node | None:
    """Return the node that puts two values behind one another along the tokens, if one gives it."""
    node = value.producer() if value is not None else None
    if node is None or not is_op(node, "Concat") or len(node.inputs) != 2:
        return None
    if node.attributes["axis"].as_int() not in (2, -2):
        return None
    return node


def _tokens(value: ir.Value | None) -> Any:
    """Return how many tokens (batch, heads, tokens, size) has, by number or name; None: unknown."""
    if value is None or value.shape is None or value.shape.rank() != 4:
        return None
    return value.shape[2]
