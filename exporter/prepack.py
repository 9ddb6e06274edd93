"""A package's weights as this processor's kernels read them, so that they stay in the file."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import onnx

from ffmerge.exporter.ort_format import check_same, save_optimized
from ffmerge.models.manifest import GraphRecord, Variant

FOLDER = "prepacked"
PART = 1 << 20  # bytes that are copied at once
LINE = 64  # bytes that a kernel loads at once from packed weights


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
        write_packed(graph, folder / path)
        check_same(graph, folder / path, record)
        variants.append(Variant("prepacked", path, portable=False, graph=record.path))
    return variants


def write_packed(graph: Path, target: Path) -> None:
    """Write a graph optimized, with its tensors and what is packed of them in a file beside it.

    Raises:
        ExportError: ONNX Runtime cannot write it.
    """
    entries = {
        "session.save_external_prepacked_constant_initializers": "1",
        "session.optimized_model_external_initializers_file_name": f"{target.name}_data",
        "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
    }
    save_optimized(graph, target, "ALL", entries)
    _align(target)


def _align(path: Path) -> None:
    """Move tensors and packed weights in the data file of a graph to multiples of a line.

    ONNX Runtime writes them behind one another and maps them as they lie: a kernel that loads
    whole lines ended the process where the bytes before were no multiple of one.
    """
    model = onnx.load(path, load_external_data=False)
    data = path.with_name(f"{path.name}_data")
    moved = data.with_name(f"{data.name}.moved")
    with open(data, "rb") as source, open(moved, "wb") as target:
        for tensor in _tensors(model.graph):
            place = {entry.key: entry for entry in tensor.external_data}
            if "offset" in place:
                length = int(place["length"].value)
                start = _moved(source, target, int(place["offset"].value), length)
                place["offset"].value = str(start)
            for key in place:
                if key.startswith("prepacked"):  # of a kernel: |offset;length;checksum of each
                    kernel, *parts = place[key].value.split("|")
                    for part in parts:
                        offset, length, rest = part.split(";")
                        start = _moved(source, target, int(offset), int(length))
                        kernel += f"|{start};{length};{rest}"
                    place[key].value = kernel
    moved.replace(data)
    onnx.save(model, path)


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Yield the initializers of a graph and of the graphs in its nodes."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _tensors(attribute.g)


def _moved(source: BinaryIO, target: BinaryIO, offset: int, length: int) -> int:
    """Copy a part of a file behind what another has, at a multiple of a line; return where."""
    start = -(-target.tell() // LINE) * LINE
    target.seek(start)
    source.seek(offset)
    for done in range(0, length, PART):
        target.write(source.read(min(length - done, PART)))
    return start
