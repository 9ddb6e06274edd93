"""Nothing in the file tells where, or by which tool's internals, the model was made."""

from collections.abc import Iterator

import onnx_ir as ir

from ffmerge.passes.graph.tensors import graphs


class StripPass(ir.passes.InPlacePass):
    """Graphs, nodes and values carry no metadata and no doc strings; the producer is ffmerge.

    The PyTorch exporter writes its ``pkg.*`` metadata with absolute source paths. Model-level
    entries other than those stay: applications read them (labels, strides, ``ffmerge.ties``).
    Initializers have no value_info: the tensor says its type and shape, and where a quantizer
    rewrites the tensor, a stale entry makes shape inference fail.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Clear each of them, and say whether there was any."""
        modified = (model.producer_name, model.producer_version) != ("ffmerge", None)
        model.producer_name, model.producer_version = "ffmerge", None
        for key in [key for key in model.metadata_props if key.startswith("pkg.")]:
            del model.metadata_props[key]
            modified = True
        for item in _described(model):
            modified |= bool(item.metadata_props or item.doc_string)
            item.metadata_props.clear()
            item.doc_string = None
        for graph in graphs(model):
            for value in graph.initializers.values():
                if value.const_value is None or value.is_graph_input() or value.is_graph_output():
                    continue
                modified |= value.type is not None or value.shape is not None
                value.type = value.shape = None
        return ir.passes.PassResult(model, modified)


def _described(model: ir.Model) -> Iterator[ir.Graph | ir.Function | ir.Node | ir.Value]:
    yield from model.functions.values()
    for graph in graphs(model):
        yield from (graph, *graph.inputs, *graph.initializers.values(), *graph)
        yield from (output for node in graph for output in node.outputs)
