"""A package's weights as this processor's kernels read them, so that they stay in the file."""

from pathlib import Path

from ffmerge.exporter.ort_format import Feeds, check_same, save_optimized
from ffmerge.models.manifest import Variant

FOLDER = "prepacked"


def write_prepacked(graph: Path, feeds: Feeds) -> Variant:
    """Write ``prepacked/`` beside ``graph``: the optimized graph and its data, packed as well.

    A session maps the packed weights instead of making its own copy of them: full speed, fast
    to load, no anonymous memory for weights. The file holds each weight raw and packed, and is
    for processors with the same kernels only; elsewhere ONNX Runtime may refuse or repack it.

    Raises:
        ExportError: ONNX Runtime cannot write it, or it computes something else.
    """
    target = graph.parent / FOLDER / graph.name
    target.parent.mkdir()
    entries = {
        "session.save_external_prepacked_constant_initializers": "1",
        "session.optimized_model_external_initializers_file_name": f"{graph.name}_data",
        "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
    }
    save_optimized(graph, target, "ALL", entries)
    check_same(graph, target, feeds)
    return Variant("prepacked", f"{FOLDER}/{graph.name}", portable=False)
