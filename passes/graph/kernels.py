"""Which nodes have a float16 form, and what of them is float16 in it.

The operators' schemas say which inputs may be float16. Whether a runtime has the operator so, and
what it then gives, ONNX Runtime's CPU provider is asked, with a model of that one node: schemas
know neither its own operators nor what it has no kernel for. ``float16.py`` asks for every node;
nodes alike are loaded once.
"""

from dataclasses import dataclass
from typing import Any

import onnx
import onnx_ir as ir

from ffmerge.passes.graph.rewrite import type_of
from ffmerge.passes.graph.tensors import shape_of

_FLOAT, _HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
IR_VERSION = 10  # that of opset 21
SHAPES = 4096  # bytes of a constant that a node may have to know when it is loaded


@dataclass(frozen=True)
class HalfForm:
    """The float32 inputs and outputs of a node that are float16 in its float16 form, by place."""

    inputs: frozenset[int]
    outputs: frozenset[int]


def plain_type(value: ir.Value) -> ir.DataType | None:
    """Return the type of a tensor; None for what is not known, a sequence or an optional."""
    if value.const_value is None and not isinstance(value.type, ir.TensorType):
        return None
    return type_of(value)


class Kernels:
    """The float16 forms of the nodes of one model."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self._known: dict[Any, frozenset[int] | None] = {}

    def form(self, node: ir.Node) -> HalfForm | None:
        """Return the float16 form of a node; None where it has none, or types are not known."""
        if any(attribute.type in _GRAPHS for attribute in node.attributes.values()):
            return None  # what is in the bodies has forms of its own
        types = _input_types(node)
        if types is None:
            return None
        halves = [i for i, kind in enumerate(types) if kind == _FLOAT and self._takes(node, i)]
        if not halves:
            return None
        key = (node.op_identifier(), types, *_choices(node))
        if key not in self._known:
            self._known[key] = self._loaded(node, halves)
        outputs = self._known[key]
        return None if outputs is None else HalfForm(frozenset(halves), outputs)

    def _takes(self, node: ir.Node, index: int) -> bool:
        """Say whether an input may be float16 by the schema; yes where there is none."""
        domain = node.domain.removeprefix("ai.onnx") if node.domain == "ai.onnx" else node.domain
        try:
            version = self.model.opset_imports.get(domain, 1)
            schema = onnx.defs.get_schema(node.op_type, version, domain)
        except onnx.defs.SchemaError:
            return True
        return "tensor(float16)" in schema.inputs[min(index, len(schema.inputs) - 1)].types

    def _loaded(self, node: ir.Node, halves: list[int]) -> frozenset[int] | None:
        """Return which outputs are float16 where ONNX Runtime loads the form, else None."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        model = self._alone(node, halves).SerializeToString()
        try:
            session = onnxruntime.InferenceSession(
                model, options, providers=["CPUExecutionProvider"]
            )
        except Exception:  # ONNX Runtime's errors have no common class of their own
            return None
        types = {output.name: output.type for output in session.get_outputs()}
        outputs = [f"out{i}" for i in range(len(node.outputs))]
        return frozenset(i for i, o in enumerate(outputs) if types.get(o) == "tensor(float16)")

    def _alone(self, node: ir.Node, halves: list[int]) -> onnx.ModelProto:
        """Return a model of one node, its inputs at ``halves`` float16."""
        proto = ir.to_proto(node)
        inputs, constants = [], []
        for index, value in enumerate(node.inputs):
            if value is None:
                continue
            name, kind, tensor = f"in{index}", type_of(value), value.const_value
            proto.input[index] = name
            if index in halves:
                kind = _HALF
            elif tensor is not None and tensor.nbytes <= SHAPES:
                stored = ir.to_proto(tensor)
                stored.name = name
                constants.append(stored)
                continue
            assert kind is not None
            shape = shape_of(tensor) if tensor is not None else _dims(value)
            inputs.append(onnx.helper.make_tensor_value_info(name, int(kind), shape))
        outputs = []
        for index, output in enumerate(node.outputs):
            if output.name:
                proto.output[index] = f"out{index}"
                outputs.append(onnx.ValueInfoProto(name=f"out{index}"))
        graph = onnx.helper.make_graph([proto], "node", inputs, outputs, constants)
        opsets = []
        for domain, version in self.model.opset_imports.items():
            opsets.append(onnx.helper.make_opsetid(domain, version))
        # a file may be of a newer version than the runtime knows; a single node needs none of it
        version = min(self.model.ir_version, IR_VERSION)
        return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=version)


_GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


def _dims(value: ir.Value) -> list[int | None] | None:
    """Return the shape of a value, None for what is not known of it."""
    if value.shape is None:
        return None
    return [dim if isinstance(dim, int) else None for dim in value.shape]


def _input_types(node: ir.Node) -> tuple[ir.DataType | None, ...] | None:
    """Return the types of what a node reads; None if one, or that of an output, is not known."""
    types = []
    for value in node.inputs:
        kind = plain_type(value) if value is not None else None
        if value is not None and kind is None:
            return None
        types.append(kind)
    for output in node.outputs:
        if output.name and plain_type(output) is None:
            return None
    return tuple(types)


def _choices(node: ir.Node) -> tuple[Any, ...]:
    """Return what a kernel is chosen by beside types: the outputs that are wanted, and words."""
    words = []
    for name, attribute in node.attributes.items():
        if attribute.type in (ir.AttributeType.INT, ir.AttributeType.STRING):
            words.append((name, attribute.value))
    return tuple(bool(output.name) for output in node.outputs), tuple(sorted(words))
