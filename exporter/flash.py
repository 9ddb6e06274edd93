"""Attention of many tokens without a table of scores, for encoders of ``export --for cpu``.

ONNX Runtime's ``MultiHeadAttention`` has a flash kernel on the CPU where it is given no mask: less
time and less memory than ``Attention``, from :data:`LONG` tokens on. ``exporter/convert.py`` calls
:func:`with_many_tokens` when the graphs are translated, so that what they give for so many tokens
is compared, too, and :func:`use_flash` when they are in their precision. Where a graph is told
neither how many tokens there are nor that none of them is padding, an If chooses for each call.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir

from ffmerge.exporter.graphs import Graph
from ffmerge.exporter.settle import outputs_of
from ffmerge.exporter.turned import session_of
from ffmerge.models import kv_cache
from ffmerge.models.probe import Probe
from ffmerge.passes.graph.blocks import MICROSOFT
from ffmerge.passes.graph.rewrite import insert, store
from ffmerge.passes.graph.tensors import is_op

LONG = 256  # tokens: of fewer the kernel is as fast or slower (benchmarks/flash.py)
_MASK = 3  # of the inputs of Attention
_KNOWN = {"q_num_heads", "kv_num_heads", "scale"}  # attributes that both operators have


def with_many_tokens(graph: Graph, model: ir.Model) -> Graph:
    """Return a graph that is compared on one row of :data:`LONG` tokens, too.

    The same graph, if the kernel is for none of its attentions, or it does not take so many.
    """
    tokens = {_tokens(node) for node in _attentions(model)} & set(graph.probe.cases[0])
    if not tokens:
        return graph
    sizes = {**graph.probe.cases[0], **{str(name): LONG for name in tokens}}
    many = replace(graph.probe, cases=(*graph.probe.cases, sizes))
    if _choices(model, many) and outputs_of(graph, many.draw(len(many.cases) - 1)) is not None:
        return replace(graph, probe=many)
    return graph


def use_flash(model: ir.Model, probe: Probe) -> None:
    """Let the flash kernel compute the attention of many tokens, in place."""
    conditions: dict[Any, ir.Value] = {}
    for node in _choices(model, probe):
        tokens, mask = _tokens(node), _mask(node)
        flash = _multihead(node)
        if isinstance(tokens, int) and mask is None:
            found = flash
        else:
            if (tokens, mask) not in conditions:
                conditions[tokens, mask] = _condition(node, tokens, mask)
            found = _if(conditions[tokens, mask], flash, node)
        ir.convenience.replace_nodes_and_values(
            model.graph, node, [node], [found], node.outputs, found.outputs
        )
        model.opset_imports[MICROSOFT] = 1


def _attentions(model: ir.Model) -> list[ir.Node]:
    """Return the attentions that the kernel could compute if nothing was hidden."""
    if kv_cache.keeps_cache([str(value.name) for value in model.graph.outputs]):
        return []
    found = []
    for node in model.graph:
        if not is_op(node, "Attention") or set(node.attributes) - _KNOWN:
            continue
        heads = [node.attributes.get_int(name) for name in ("q_num_heads", "kv_num_heads")]
        if None not in heads and len(set(heads)) == 1 and len(node.inputs) <= _MASK + 1:
            found.append(node)
    return found


def _choices(model: ir.Model, probe: Probe) -> list[ir.Node]:
    """Return those for which the kernel is chosen in a case of the comparison, if any is."""
    found, hides = [], dict[ir.Value, bool]()
    for node in _attentions(model):
        case, mask = _case_of_many(_tokens(node), probe), _mask(node)
        if case is None:
            continue
        if mask is not None and mask not in hides:
            hides[mask] = _hides(model, mask, probe, case)
        if mask is None or not hides[mask]:
            found.append(node)
    return found


def _case_of_many(tokens: Any, probe: Probe) -> int | None:
    """Return the number of the first case in which a row has many tokens."""
    for number, sizes in enumerate(probe.cases):
        if not isinstance(tokens, int):
            count = sizes.get(str(tokens), 0)
        else:
            count = tokens
        if count >= LONG:
            return number
    return None


def _hides(model: ir.Model, mask: ir.Value, probe: Probe, case: int) -> bool:
    """Say whether a mask adds anything to a score though no token is padding."""
    feeds = probe.draw(case)
    for spec in probe.inputs:
        if spec.kind == "mask":
            feeds[spec.name] = np.ones_like(feeds[spec.name])
    session = session_of(model, mask, [v for v in model.graph.inputs if not v.is_initializer()])
    (added,) = session.run(None, {each.name: feeds[each.name] for each in session.get_inputs()})
    return bool(added.any())


def _tokens(node: ir.Node) -> Any:
    """Return how many tokens the queries of a row are, a number or a name; None: unknown."""
    query = node.inputs[0]
    if query is None or query.shape is None or query.dtype != ir.DataType.FLOAT:
        return None
    size = query.shape[1]
    return size if isinstance(size, int) else size.value


def _mask(node: ir.Node) -> ir.Value | None:
    return node.inputs[_MASK] if len(node.inputs) > _MASK else None


def _multihead(node: ir.Node) -> ir.Node:
    """Return the operator with the flash kernel, for what an attention reads beside its mask."""
    attributes = [ir.AttrInt64("num_heads", node.attributes["q_num_heads"].as_int())]
    if "scale" in node.attributes:
        attributes.append(node.attributes["scale"])
    return ir.Node(MICROSOFT, "MultiHeadAttention", node.inputs[:_MASK], attributes, name=node.name)


def _condition(node: ir.Node, tokens: Any, mask: ir.Value | None) -> ir.Value:
    """Return whether a row has many tokens and the mask hides none of them.

    What computes it stands before the first attention that is chosen by it.
    """
    query, graph, told = node.inputs[0], node.graph, list[ir.Value]()
    assert query is not None and isinstance(graph, ir.Graph)
    if not isinstance(tokens, int):
        long = store(graph, "flash.long", ir.tensor([LONG]))
        count = insert(node, "Shape", [query], ir.DataType.INT64, [1], start=1, end=2)
        told.append(insert(node, "GreaterOrEqual", [count, long], ir.DataType.BOOL, [1]))
    if mask is not None:
        nothing = store(graph, "flash.nothing", ir.tensor(np.zeros(1, np.float32)))
        added = insert(node, "ReduceL1", [mask], ir.DataType.FLOAT, [], keepdims=0)
        told.append(insert(node, "Equal", [added, nothing], ir.DataType.BOOL, [1]))
    if len(told) == 1:
        return told[0]
    return insert(node, "And", told, ir.DataType.BOOL, [1])


def _if(condition: ir.Value, flash: ir.Node, plain: ir.Node) -> ir.Node:
    """Return a node that computes the one where the condition is true, else the other."""
    other = ir.Node("", plain.op_type, plain.inputs, plain.attributes.values(), name=plain.name)
    branches = {}
    for label, node in (("then_branch", flash), ("else_branch", other)):
        node.name = node.outputs[0].name = f"{plain.name}/{node.op_type}"
        node.outputs[0].type = plain.outputs[0].type
        node.outputs[0].shape = plain.outputs[0].shape
        branches[label] = ir.Graph((), node.outputs, nodes=[node], name=node.name)
    return ir.node("If", [condition], branches, name=plain.name)
