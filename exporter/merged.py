"""The first step and the later ones of a decoder as one graph, so that weights are loaded once."""

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import NameFixPass

from ffmerge.exporter.graphs import Graph
from ffmerge.exporter.torch_onnx import placed
from ffmerge.models.kv_cache import FLAG
from ffmerge.passes.graph.contract import read_ties
from ffmerge.passes.graph.run import ShareResult, share


def either(first: ir.Model, later: ir.Model, graph: Graph) -> ShareResult:
    """Return one model: ``later`` where the input ``use_cache_branch`` is true, else ``first``.

    It has the inputs of both and the outputs of ``first``; those that ``later`` lacks, keys and
    values of the encoder that do not change, are then empty, as in optimum's merged decoders.
    What both store is stored once. The two models are left as they are.
    """
    branches = {"first": first.clone().graph, "later": later.clone().graph}
    values = {v.name: v for branch in branches.values() for v in branch.inputs}
    flag = ir.Value(name=FLAG, type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([1]))
    inputs = [values.get(s.name, flag) for s in graph.probe.inputs]
    inputs = [ir.Value(name=v.name, type=v.type, shape=v.shape) for v in inputs]
    outer_inputs = {v.name: v for v in inputs}
    outputs = [ir.Value(name=v.name, type=v.type, shape=v.shape) for v in branches["first"].outputs]
    outer = ir.Graph(inputs, (), nodes=(), opset_imports=dict(first.opset_imports))
    for label, branch in branches.items():
        for value in branch.inputs:
            value.replace_all_uses_with(outer_inputs[value.name])
        branch.inputs.clear()
        given = {v.name: v for v in branch.outputs}
        branch.outputs[:] = [
            given[v.name] if v.name in given else _empty(branch, v, graph) for v in outputs
        ]
        for value in list(branch.initializers.values()):
            branch.initializers.pop(str(value.name))
            value.name = f"{value.name}.{label}" * (value.name in outer.initializers) or value.name
            outer.initializers.add(value)
        for value in branch.outputs:
            value.name = f"{value.name}.{label}"
        branch.name = label
    bodies = {"then_branch": branches["later"], "else_branch": branches["first"]}
    outer.append(ir.node("If", [outer_inputs[FLAG]], bodies, outputs=outputs, name=graph.name))
    outer.outputs.extend(outputs)
    outer.name = graph.name
    model = ir.Model(outer, ir_version=first.ir_version)
    NameFixPass()(model)
    shared = share(model, (*read_ties(first), *read_ties(later)))
    return placed(shared, f"{graph.name}.onnx")


def _empty(branch: ir.Graph, like: ir.Value, graph: Graph) -> ir.Value:
    """Return a new value of ``branch`` with no elements, for an output it does not compute."""
    shape = ir.Value(
        name=f"{like.name}.shape", const_value=ir.tensor(graph.module.empty[like.name])
    )
    branch.initializers.add(shape)
    zero = ir.tensor(np.zeros(1, like.dtype.numpy() if like.dtype else np.float32))
    node = ir.node("ConstantOfShape", [shape], {"value": zero}, name=f"{like.name}.empty")
    node.outputs[0].name = str(like.name)
    branch.append(node)
    return node.outputs[0]
