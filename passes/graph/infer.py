"""What ONNX's own code and ONNX Runtime say of a model, without its weights.

That code copies and serializes what it reads, and takes no more than 2 GB. So the passes that ask
it (:func:`infer_types`, and the converter of ``opset.py``) keep the weights from it.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import onnx
import onnx_ir as ir

from ffmerge.passes.graph.tensors import graphs, shape_of, values_of

# ONNX Runtime's names of the types that decide how a node computes.
TENSORS = {
    "tensor(float)": ir.DataType.FLOAT,
    "tensor(float16)": ir.DataType.FLOAT16,
    "tensor(bfloat16)": ir.DataType.BFLOAT16,
    "tensor(double)": ir.DataType.DOUBLE,
    "tensor(int32)": ir.DataType.INT32,
    "tensor(int64)": ir.DataType.INT64,
    "tensor(int8)": ir.DataType.INT8,
    "tensor(uint8)": ir.DataType.UINT8,
    "tensor(bool)": ir.DataType.BOOL,
}
HEAVY = 4096  # bytes from which a tensor is a weight; below it may be a shape, which is read


@contextmanager
def weights_taken_out(model: ir.Model) -> Iterator[dict[str, ir.TensorProtocol]]:
    """Yield the large tensors of a model by name; meanwhile data that is not there stands in."""
    before, weights = {}, {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None:
            continue
        before[name] = tensor
        if tensor.nbytes >= HEAVY:
            weights[name] = tensor
            value.const_value = ir.ExternalTensor(
                "weights", 0, tensor.nbytes, tensor.dtype,
                shape=ir.Shape(shape_of(tensor)), name=name,
            )  # fmt: skip
        elif isinstance(tensor, ir.ExternalTensor):  # its file would be looked for elsewhere
            value.const_value = ir.Tensor(values_of(tensor), dtype=tensor.dtype, name=name)
    try:
        yield weights
    finally:
        for name, tensor in before.items():
            model.graph.initializers[name].const_value = tensor


def infer_types(model: ir.Model) -> None:
    """Give the values of a model the types and shapes that ONNX infers.

    What has a type keeps it, sequences and optional values included. Behind an operator that ONNX
    does not know ONNX Runtime is asked; where it does not know either, a value stays as it is.
    Inputs and outputs keep the shapes that the file gives them.
    """
    _infer_by_onnx(model)
    unknown = {}
    for node in model.graph:
        for value in node.outputs:
            if value.name and value.type is None:
                unknown[value.name] = value
    if unknown:
        _infer_by_runtime(model, unknown)


def _infer_by_onnx(model: ir.Model) -> None:
    try:
        with weights_taken_out(model):
            proto = ir.to_proto(model)
        inferred = ir.from_proto(onnx.shape_inference.infer_shapes(proto, data_prop=True))
    except Exception:  # whatever its C++ asserts: then nothing is known
        return
    for graph, found in zip(graphs(model), graphs(inferred), strict=True):
        named = {value.name: value for value in _values(found)}
        for value in _values(graph):
            if value.name in named:
                _take(value, named[value.name])


def _take(value: ir.Value, inferred: ir.Value) -> None:
    """Let a value have the type and shape that were inferred for it."""
    value.type = value.type or inferred.type
    outside = value.is_graph_input() or value.is_graph_output()
    if inferred.shape is not None and not (outside and value.shape is not None):
        value.shape = inferred.shape


def _infer_by_runtime(model: ir.Model, unknown: Mapping[str, ir.Value]) -> None:
    """Let tensors of the main graph have the types and shapes that ONNX Runtime finds."""
    import onnxruntime

    proto = _with_weights_as_inputs(model)
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in unknown)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = onnxruntime.InferenceSession(
            proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except Exception:  # ONNX Runtime's errors have no common class of their own
        return
    for found in session.get_outputs():
        if found.name in unknown and found.type in TENSORS:
            value = unknown[found.name]
            value.type = ir.TensorType(TENSORS[found.type])
            if found.shape:  # none and a scalar's look alike
                value.shape = ir.Shape(found.shape)


def _with_weights_as_inputs(model: ir.Model) -> onnx.ModelProto:
    """Return the model as ONNX Runtime loads it without any weight: an input in place of each."""
    with weights_taken_out(model) as weights:
        proto = ir.to_proto(model)
    small = [tensor for tensor in proto.graph.initializer if tensor.name not in weights]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(small)
    given = {value.name for value in proto.graph.input}
    for name, tensor in weights.items():
        if name not in given:
            info = onnx.helper.make_tensor_value_info(name, int(tensor.dtype), shape_of(tensor))
            proto.graph.input.append(info)
    return proto


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs
