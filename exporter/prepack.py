"""A package's weights as this processor's kernels read them, so that they stay in the file."""

from collections.abc import Sequence
from pathlib import Path

from ffmerge.exporter.ort_format import check_same, save_optimized
from ffmerge.models.manifest import GraphRecord, Variant

FOLDER = "prepacked"


def write_prepacked(folder: Path, records: Sequence[GraphRecord]) -> list[Variant]:
    """Write each graph into ``prepacked/``: optimized, with its data, packed as well.

    A session maps the packed weights instead of making its own copy of them: full speed, fast
    to load, no anonymous memory for weights. The files hold each weight raw and packed, and are
    for processors with the same kernels only; elsewhere ONNX Runtime may refuse or repack them.

    Raises:
        ExportError: ONNX Runtime cannot write it, or it computes something else.
    """
    variants = []
    for record in records:
        graph, path = folder / record.path, f"{FOLDER}/{record.path}"
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        entries = {
            "session.save_external_prepacked_constant_initializers": "1",
            "session.optimized_model_external_initializers_file_name": f"{graph.name}_data",
            "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
        }
        save_optimized(graph, folder / path, "ALL", entries)
        check_same(graph, folder / path, record)
        variants.append(Variant("prepacked", path, portable=False, graph=record.path))
    return variants
