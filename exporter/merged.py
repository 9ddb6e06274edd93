"""The first step and the later ones of a decoder as one graph, so that weights are loaded once."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import NameFixPass

from ffmerge.exporter.graphs import Graph
from ffmerge.exporter.torch_onnx import count_tie_uses
from ffmerge.models.kv_cache import FLAG
from ffmerge.passes.graph.contract import read_ties
from ffmerge.passes.graph.run import ShareResult, share_model


def merge_decoders(first: ir.Model, later: ir.Model, graph: Graph) -> ShareResult:
    """Return one model: ``later`` where the input ``use_cache_branch`` is true, else ``first``.

    It has the inputs of both and the outputs of ``first``; those that ``later`` lacks, keys and
    values of the encoder that do not change, are then empty, as in optimum's merged decoders.
    What both store is stored once. The two models are left as they are.
    """
    branches = {"first": first.clone().graph, "later": later.clone().graph}
    inputs = _inputs(branches.values(), graph)
    outputs = [_like(value) for value in branches["first"].outputs]
    outer = ir.Graph(
        list(inputs.values()), (), nodes=(), opset_imports=dict(first.opset_imports),
        name=graph.name,
    )  # fmt: skip
    for label, branch in branches.items():
        _read_outer_inputs(branch, inputs)
        _put_out(branch, outputs, graph, label)
        _lift_initializers(branch, outer, label)
        branch.name = label
    bodies = {"then_branch": branches["later"], "else_branch": branches["first"]}
    outer.append(ir.node("If", [inputs[FLAG]], bodies, outputs=outputs, name=graph.name))
    outer.outputs.extend(outputs)
    model = ir.Model(outer, ir_version=first.ir_version)
    NameFixPass()(model)
    shared = share_model(model, (*read_ties(first), *read_ties(later)))
    return count_tie_uses(shared, f"{graph.name}.onnx")


def _inputs(branches: Iterable[ir.Graph], graph: Graph) -> dict[str, ir.Value]:
    """Return new inputs for those of all branches, and the flag."""
    flag = ir.Value(name=FLAG, type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([1]))
    values = {FLAG: flag}
    for branch in branches:
        values |= {str(value.name): value for value in branch.inputs}
    return {spec.name: _like(values[spec.name]) for spec in graph.probe.inputs}


def _like(value: ir.Value) -> ir.Value:
    return ir.Value(name=value.name, type=value.type, shape=value.shape)


def _read_outer_inputs(branch: ir.Graph, inputs: Mapping[str, ir.Value]) -> None:
    for value in branch.inputs:
        value.replace_all_uses_with(inputs[str(value.name)])
    branch.inputs.clear()


def _put_out(branch: ir.Graph, outputs: Sequence[ir.Value], graph: Graph, label: str) -> None:
    """Let a branch put out all ``outputs``, under names of its own."""
    computed = {value.name: value for value in branch.outputs}
    branch.outputs.clear()
    for value in outputs:
        branch.outputs.append(computed.get(value.name) or _empty(branch, value, graph))
    for value in branch.outputs:
        value.name = f"{value.name}.{label}"


def _lift_initializers(branch: ir.Graph, outer: ir.Graph, label: str) -> None:
    """Move a branch's tensors to the outer graph, where names are those of both branches."""
    for value in list(branch.initializers.values()):
        branch.initializers.pop(str(value.name))
        if value.name in outer.initializers:
            value.name = f"{value.name}.{label}"
        outer.initializers.add(value)


def _empty(branch: ir.Graph, like: ir.Value, graph: Graph) -> ir.Value:
    """Return a new value of ``branch`` with no elements, for an output it does not compute."""
    sizes = np.array(graph.empty[str(like.name)], np.int64)
    shape = ir.Value(name=f"{like.name}.shape", const_value=ir.tensor(sizes))
    branch.initializers.add(shape)
    dtype = like.dtype or ir.DataType.FLOAT
    zero = ir.tensor(np.zeros(1, dtype.numpy()))
    node = ir.node("ConstantOfShape", [shape], {"value": zero}, name=f"{like.name}.empty")
    node.outputs[0].name = str(like.name)
    branch.append(node)
    return node.outputs[0]
