"""What ONNX's own code says of a model, without its weights.

That code copies and serializes what it reads, and takes no more than 2 GB. So the passes that ask
it (:func:`infer_types`, and the converter of ``opset.py``) keep the weights from it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import onnx
import onnx_ir as ir

from ffmerge.passes.graph.tensors import graphs, shape_of, values_of

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

    What has a type keeps it, sequences and optional values included. Where nothing can be
    inferred, as behind an operator that ONNX does not know, a value stays as it is. Inputs and
    outputs keep the shapes that the file gives them.
    """
    try:
        with weights_taken_out(model):
            proto = ir.to_proto(model)
        inferred = ir.from_proto(onnx.shape_inference.infer_shapes(proto, data_prop=True))
    except Exception:  # whatever its C++ asserts: then nothing is known
        return
    for graph, found in zip(graphs(model), graphs(inferred), strict=True):
        named = {value.name: value for value in _values(found)}
        for value in _values(graph):
            other = named.get(value.name)
            if other is None:
                continue
            value.type = value.type or other.type
            outside = value.is_graph_input() or value.is_graph_output()
            if other.shape is not None and not (outside and value.shape is not None):
                value.shape = other.shape


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs
