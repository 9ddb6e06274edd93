"""Packages that were changed after their export, the manifest written anew as if nothing were."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from ffmerge.exporter.records import record_tensors
from ffmerge.models.manifest import Manifest, record_files


def sealed(folder: Path) -> None:
    """Write the manifest anew, with the checksums of what the files are now."""
    manifest = Manifest.read(folder)
    listed = {file.path for file in manifest.files}
    files = tuple(file for file in record_files(folder) if file.path in listed)
    tensors = record_tensors(folder, [graph.path for graph in manifest.graphs])
    replace(manifest, files=files, tensors=tensors).write(folder)


def flip(folder: Path, name: str) -> None:
    """Flip one bit in the middle of a tensor; nothing is sealed."""
    record = next(t for t in Manifest.read(folder).tensors if t.name == name)
    path = folder / record.path
    data = bytearray(path.read_bytes())
    data[record.offset + record.bytes // 2] ^= 1
    path.write_bytes(data)


def swap(folder: Path, first: str, second: str) -> None:
    """Exchange the bytes of two tensors of one size in the data file."""
    places = {t.name: t for t in Manifest.read(folder).tensors}
    one, two = places[first], places[second]
    assert one.bytes == two.bytes and one.path == two.path
    path = folder / one.path
    data = bytearray(path.read_bytes())
    parts = [data[p.offset : p.offset + p.bytes] for p in (one, two)]
    for place, part in zip((two, one), parts, strict=True):
        data[place.offset : place.offset + place.bytes] = part
    path.write_bytes(data)
    sealed(folder)


def edit(folder: Path, change: Callable[[onnx.GraphProto, dict[str, np.ndarray]], None]) -> None:
    """Change the graph; ``change`` gets it and all its tensors by name, which it may not change."""
    path = folder / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    whole = onnx.load(path).graph.initializer
    change(model.graph, {tensor.name: numpy_helper.to_array(tensor) for tensor in whole})
    path.write_bytes(model.SerializeToString())
    sealed(folder)


def repoint(
    folder: Path, op: str, weight: str, index: int, new: Callable[[np.ndarray], np.ndarray],
    nth: int = 0,
) -> str:  # fmt: skip
    """Let the nth node ``op`` that reads ``weight`` read a changed copy of its input ``index``.

    Return the output of that node.
    """
    found: list[str] = []

    def change(graph: onnx.GraphProto, tensors: dict[str, np.ndarray]) -> None:
        node = [n for n in graph.node if n.op_type == op and weight in n.input][nth]
        copied = numpy_helper.from_array(
            np.ascontiguousarray(new(tensors[node.input[index]])), f"{node.input[index]}.copy"
        )
        graph.initializer.append(copied)
        node.input[index] = copied.name
        found.append(node.output[0])

    edit(folder, change)
    return found[0]


def doubled(folder: Path, weight: str) -> None:
    """Double the scales of a quantized weight."""
    scale = f"{weight}/scale"

    def change(graph: onnx.GraphProto, tensors: dict[str, np.ndarray]) -> None:
        graph.initializer.append(numpy_helper.from_array(2 * tensors[scale], "scale.new"))
        for node in graph.node:
            node.input[:] = ["scale.new" if name == scale else name for name in node.input]

    edit(folder, change)
