"""What PyTorch computes inside a graph: a small sample of the value of every node.

``package.export`` calls :func:`record_trace` with the ``torch.export`` program that a graph was
translated from. Its nodes are called as the graph's values are, so a value of the finished graph,
in whatever precision, is held against PyTorch's float32 by name. ``runtime_tests/locate.py`` does
that, and names the first node that is off.
"""

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
import torch
from torch.utils import _pytree as pytree

from ffmerge.exporter.graphs import Graph
from ffmerge.models.inputs import to_tensors
from ffmerge.models.probe import Array
from ffmerge.models.read_once import give_back_weight
from ffmerge.models.trace import Trace, TracedValue, sampled, traced_feeds

# What these put out is an input seen in another shape.
_VIEWS = {"Cast", "Concat", "Expand", "Identity", "Reshape", "Slice", "Split", "Squeeze",
          "Transpose", "Unsqueeze"}  # fmt: skip


def record_trace(graph: Graph, program: Any, model: ir.Model, real: Mapping[str, Array]) -> Trace:
    """Return what PyTorch computes, in float32, at the nodes of ``program`` that ``model`` names.

    The program is run by PyTorch's own kernels, node by node, on the traced case: rows of the
    ``real`` one, if there is one.
    """
    names = set()
    for node in model.graph:
        if node.op_type not in _VIEWS:
            names |= {str(value.name) for value in node.outputs}
    feeds = to_tensors(traced_feeds(graph.probe, real), graph.module.model)
    given = iter(pytree.tree_leaves(dict(feeds)))
    held = {**program.state_dict, **program.constants}
    arguments = []
    for spec in program.graph_signature.input_specs:
        arguments.append(next(given) if spec.target is None else held[spec.target])
    recorder = _Recorder(program.graph_module, names)
    with torch.no_grad():
        recorder.run(*arguments)
    return recorder.trace


class _Recorder(torch.fx.Interpreter):
    """Runs a program and keeps a sample of each float tensor that has one of the ``names``."""

    def __init__(self, module: torch.fx.GraphModule, names: set[str]) -> None:
        super().__init__(module)
        self.names = names
        self.trace: list[TracedValue] = []

    def run_node(self, node: torch.fx.Node) -> Any:
        """Compute one node, as the interpreter does."""
        value = super().run_node(node)
        for each in node.all_input_nodes:
            if each.op == "placeholder" and isinstance(self.env[each], torch.Tensor):
                give_back_weight(self.env[each])
        wanted = node.op == "call_function" and node.name in self.names
        if wanted and isinstance(value, torch.Tensor) and value.is_floating_point():
            if value.numel():
                sample = sampled(value.float().cpu().numpy())
                shape = tuple(value.shape)
                self.trace.append(TracedValue(node.name, shape, _layer_of(node), sample))
        return value


def _layer_of(node: torch.fx.Node) -> str:
    """Return the PyTorch module, by its name in the model, that computes a node."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    name, _ = list(stack.values())[-1]
    return str(name).partition("model.")[2]
