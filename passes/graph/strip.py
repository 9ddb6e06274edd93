"""Nothing in the file tells where, or by which tool's internals, the model was made."""

from collections.abc import Iterator

import onnx_ir as ir

from ffmerge.passes.graph.tensors import graphs


def strip(model: ir.Model) -> None:
    """Clear metadata and doc strings of graphs, nodes and values; the producer is ffmerge.

    The PyTorch exporter writes its ``pkg.*`` metadata with absolute source paths. Model-level
    entries other than those stay: applications read them (labels, strides, ``ffmerge.ties``).
    Initializers have no value_info: the tensor says its type and shape, and where a quantizer
    rewrites the tensor, a stale entry makes shape inference fail.
    """
    model.producer_name, model.producer_version = "ffmerge", None
    for key in tuple(model.metadata_props):
        if key.startswith("pkg."):
            del model.metadata_props[key]
    for item in _described(model):
        item.metadata_props.clear()
        item.doc_string = None
    for graph in graphs(model):
        for value in graph.initializers.values():
            is_outside = value.is_graph_input() or value.is_graph_output()
            if value.const_value is not None and not is_outside:
                value.type = value.shape = None


def _described(model: ir.Model) -> Iterator[ir.Graph | ir.Function | ir.Node | ir.Value]:
    yield from model.functions.values()
    for graph in graphs(model):
        yield graph
        yield from graph.inputs
        yield from graph.initializers.values()
        for node in graph:
            yield node
            yield from node.outputs
