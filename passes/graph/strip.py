"""Nothing in the file tells where, or by which tool's internals, the model was made."""

from collections.abc import Iterator

import onnx_ir as ir

from ffmerge.passes.graph.tensors import graphs

_Described = ir.Model | ir.Graph | ir.Function | ir.Node | ir.Value

# What PyTorch's exporter writes beside its ``pkg.*`` entries, of every node.
OF_EXPORTER = ("namespace",)
TRACE = 'File "'  # in documentation: a stack trace, as the TorchScript exporter writes them


def strip(model: ir.Model) -> None:
    """Clear what exporters wrote for themselves; the producer is ffmerge.

    That is metadata of ``pkg.*``, with absolute source paths, and stack traces in place of
    documentation. All else stays: applications read it (labels, strides, ``ffmerge.ties``, units
    of an input). Initializers have no value_info: the tensor says its type and shape, and where a
    quantizer rewrites the tensor, a stale entry makes shape inference fail.
    """
    model.producer_name, model.producer_version = "ffmerge", None
    for item in (model, *_described(model)):
        _forget_exporter(item)
    for graph in graphs(model):
        for value in graph.initializers.values():
            is_outside = value.is_graph_input() or value.is_graph_output()
            if value.const_value is not None and not is_outside:
                value.type = value.shape = None


def _forget_exporter(item: _Described) -> None:
    for key in tuple(item.metadata_props):
        if key.startswith("pkg.") or key in OF_EXPORTER:
            del item.metadata_props[key]
    if item.doc_string and TRACE in item.doc_string:
        item.doc_string = None


def _described(model: ir.Model) -> Iterator[_Described]:
    yield from model.functions.values()
    for graph in graphs(model):
        yield graph
        yield from graph.inputs
        yield from graph.initializers.values()
        for node in graph:
            yield node
            yield from node.outputs
