"""Where the bytes of every initializer of a package are, and what they are."""

import mmap
from collections.abc import Iterable
from pathlib import Path

import onnx_ir as ir

from ffmerge.files import sha256
from ffmerge.models.manifest import DIGITS, TensorRecord
from ffmerge.passes.graph.read import read_model
from ffmerge.passes.graph.tensors import graphs
from ffmerge.passes.graph.write import EMBEDDED_TENSOR


def record_tensors(folder: Path, paths: Iterable[str]) -> tuple[TensorRecord, ...]:
    """Return a record of each tensor of 256 bytes or more; one that several graphs read once."""
    found: dict[tuple[str, int], TensorRecord] = {}
    for path in paths:
        for name, file, offset, size in _places(folder / path):
            where = (file.relative_to(folder).as_posix(), offset)
            if where not in found:
                found[where] = TensorRecord(name, *where, size, sha256(file, offset, size)[:DIGITS])
    return tuple(found.values())


def _places(path: Path) -> Iterable[tuple[str, Path, int, int]]:
    """Yield name, file, offset and bytes of each tensor; those in the graph are searched there."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole:
        for graph in graphs(read_model(path)):
            for name, value in graph.initializers.items():
                tensor = value.const_value
                if tensor is None or tensor.nbytes < EMBEDDED_TENSOR:
                    continue
                if isinstance(tensor, ir.ExternalTensor):
                    yield (
                        name,
                        path.parent / str(tensor.location),
                        tensor.offset or 0,
                        tensor.nbytes,
                    )
                elif tensor.dtype != ir.DataType.STRING:
                    offset = whole.find(tensor.tobytes())
                    if offset >= 0:
                        yield name, path, offset, tensor.nbytes
