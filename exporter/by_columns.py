"""The table of a decoder that is its embedding and its head, stored by columns.

``exporter/convert.py`` calls :func:`store_by_columns` on the graphs of a package of ``--for cpu``
in float32. ``(W @ x^T)^T``, as ``passes/graph/resident.py`` leaves it, has ONNX Runtime's CPU read
the table slowly where it multiplies one token; ``x @ W^T``, with ``W^T`` as it is stored, takes
half the time, and a token is looked up in its columns. That the table is in memory once is left as
it is: ONNX Runtime packs no tensor that a caller may give in place of the stored one, so the table
becomes an input with a default.
"""

from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ffmerge.models import kv_cache
from ffmerge.passes.graph.resident import (
    may_be_packed,
    obstacle,
    weights_to_left,
    weights_to_right,
)
from ffmerge.passes.graph.rewrite import become, insert, replace_tensor
from ffmerge.passes.graph.tensors import is_op, rewritten, shape_of


def store_by_columns(models: Sequence[ir.Model]) -> None:
    """Store each table so that all graphs look up and multiply as one matrix, in place.

    There must be a graph that keeps a cache, which multiplies one token at a time.
    """
    if not any(_keeps_cache(model) for model in models):
        return
    for model in models:
        weights_to_right(model)
        RemoveUnusedNodesPass()(model)
    for weights in _tables(models):
        for weight in weights:
            _turn(weight)
    for model in models:
        weights_to_left(model)


def _tables(models: Sequence[ir.Model]) -> list[list[ir.Value]]:
    """Return each table as all graphs have it that is nothing but looked up and multiplied by."""
    found: dict[str, list[ir.Value]] = {}
    for model in models:
        for weight in model.graph.initializers.values():
            if may_be_packed(weight) and not weight.is_graph_output():
                found.setdefault(str(weight.name), []).append(weight)
    return [weights for weights in found.values() if _is_table(weights)]


def _is_table(weights: Sequence[ir.Value]) -> bool:
    nodes = [use.node for weight in weights for use in weight.uses()]
    if {node.op_type for node in nodes} != {"Gather", "Gemm"}:
        return False
    return all(_looks_up(node) or _multiplies(node) for node in nodes)


def _keeps_cache(model: ir.Model) -> bool:
    return kv_cache.keeps_cache([str(value.name) for value in model.graph.outputs])


def _looks_up(node: ir.Node) -> bool:
    """Say whether a node gives rows of the table, for ids of a known number of dimensions."""
    if not is_op(node, "Gather") or (node.attributes.get_int("axis", 0) or 0) != 0:
        return False
    ids = node.inputs[1]
    return ids is not None and ids.shape is not None


def _multiplies(node: ir.Node) -> bool:
    """Say whether a node is ``x @ W^T``; it reads no other large matrix."""
    return is_op(node, "Gemm") and obstacle(node) is None


def _turn(weight: ir.Value) -> None:
    """Store the transpose of a table, which a caller may replace, and let its readers read that."""
    tensor, graph = weight.const_value, weight.graph
    assert tensor is not None and isinstance(graph, ir.Graph)
    rows, width = shape_of(tensor)
    turned = rewritten(tensor, lambda values: values.T, tensor.dtype, (width, rows))
    for node, _ in tuple(weight.uses()):
        if is_op(node, "Gemm"):
            become(node, "MatMul", [node.inputs[0], weight])
            continue
        ids = node.inputs[1]
        assert ids is not None and ids.shape is not None
        rank, sizes = ids.shape.rank(), [width, *[None] * ids.shape.rank()]
        found = insert(node, "Gather", [weight, ids], tensor.dtype, sizes, axis=1)
        become(node, "Transpose", [found], perm=[*range(1, rank + 1), 0])
    replace_tensor(weight, turned)
    graph.inputs.append(weight)
