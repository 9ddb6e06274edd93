"""Reading an ONNX file that may be broken or hostile; tensors stay mapped on disk."""

import mmap
import os
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from ffmerge.errors import InputError, first_line
from ffmerge.files import open_inside
from ffmerge.passes.graph.tensors import Array, graphs, shape_of


class DataFile:
    """A data file opened once; the descriptor is closed with the last tensor that reads it."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.size = os.fstat(descriptor).st_size

    def __del__(self) -> None:
        os.close(self.descriptor)


class MappedTensor(ir.ExternalTensor):
    """External data read from the very file that was checked, mapped while it is in use.

    Renaming or replacing the file has no effect; cutting the same file short under a running
    process is not survived (SIGBUS), as with any mapped file.
    """

    __slots__ = ("_file",)

    def __init__(self, tensor: ir.ExternalTensor, file: DataFile) -> None:
        super().__init__(
            tensor.location, tensor.offset, tensor.length, tensor.dtype,
            shape=tensor.shape, name=tensor.name or "", base_dir=tensor.base_dir,
        )  # fmt: skip
        self._file = file

    def bytes_mapped(self) -> Array:
        """Return the stored bytes."""
        if not self.nbytes:
            return np.empty(0, np.uint8)
        inside = (self.offset or 0) % mmap.ALLOCATIONGRANULARITY
        start, length = (self.offset or 0) - inside, inside + self.nbytes
        mapped = mmap.mmap(self._file.descriptor, length, offset=start, access=mmap.ACCESS_READ)
        return np.frombuffer(mapped, np.uint8, self.nbytes, inside)

    def copy_to(self, descriptor: int, place: int) -> bool:
        """Let the kernel copy the stored bytes into another file; False where it cannot."""
        done, start, end = 0, self.offset or 0, self.nbytes
        with suppress(AttributeError, OSError):  # not on this system, or between file systems
            while copied := os.copy_file_range(
                self._file.descriptor, descriptor, end - done, start + done, place + done
            ):
                done += copied
        return done == end

    def numpy(self) -> Array:
        """Return the values."""
        raw, shape = self.bytes_mapped(), shape_of(self)
        if self.dtype.bitwidth < 8:
            return ir.PackedTensor(raw, self.dtype, shape=ir.Shape(shape)).numpy()
        return raw.view(self.dtype.numpy()).reshape(shape)

    def __array__(self, dtype: Any = None) -> Array:
        return self.numpy().__array__(dtype)

    def tobytes(self) -> bytes:
        """Return the stored bytes as an object of their own."""
        return self.bytes_mapped().tobytes()

    def tofile(self, file: Any) -> None:
        """Write the stored bytes."""
        file.write(self.bytes_mapped().data)


def read_model(path: Path) -> ir.Model:
    """Return the model in an ONNX file; all its tensors are there and can be read.

    External data must be a whole regular file in the model's folder or below, reached neither
    by ``..`` nor by an absolute path nor by a link; it is opened once, and read from there even
    if another file takes its place. Nodes are put into an order in which they can run.
    Operators, domains and versions that are not known pass.

    Raises:
        InputError: the file is missing, truncated or not ONNX, has a name twice or a cycle, or
            its external data is not so.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} {'is not a file' if path.exists() else 'does not exist'}.")
    model = _parsed(path)
    _check_outputs(path, model)
    files: dict[str, DataFile] = {}
    for graph in graphs(model):
        try:
            graph.sort()
        except ValueError as error:
            raise InputError(f"{path} is not valid ONNX: its nodes form a cycle.") from error
        for value in graph.initializers.values():
            if value.const_value is not None:
                value.const_value = _checked(path, value.const_value, files)
        for node in graph:
            _check_attributes(path, node, files)
    return model


def _parsed(path: Path) -> ir.Model:
    try:
        proto = onnx.load(path, format="protobuf", load_external_data=False)
        _check_names(path, proto.graph)
        model = ir.from_proto(proto)
    except InputError:
        raise
    except Exception as error:  # onnx, protobuf and onnx_ir raise whatever the broken part hits
        raise InputError(f"{path} is truncated or not ONNX: {_cause(error)}.") from error
    if not proto.ir_version or not proto.opset_import or not proto.graph.output:
        raise InputError(f"{path} is truncated or not ONNX: no version, opset or output in it.")
    if proto.graph.sparse_initializer:
        raise InputError(f"{path} has sparse initializers, which ffmerge does not read.")
    return model


def _check_outputs(path: Path, model: ir.Model) -> None:
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if not node.outputs:
            what = f"{node.op_type} {node.name!r}"
            raise InputError(f"{path} is not valid ONNX: {what} has no output.")


def _check_attributes(path: Path, node: ir.Node, files: dict[str, DataFile]) -> None:
    """Put checked tensors in the place of those in a node's attributes."""
    for attribute in tuple(node.attributes.values()):
        if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref():
            tensor = _checked(path, attribute.as_tensor(), files)
            node.attributes.add(ir.AttrTensor(attribute.name, tensor))


def _check_names(path: Path, graph: onnx.GraphProto, outer: Sequence[Container[str]] = ()) -> None:
    """Nothing is given twice: which of two would count depends on the reader.

    A tensor of a branch under the name of an ``outer`` value is that, too: ONNX Runtime takes the
    outer one, by the rule of scopes it is the inner.
    """
    stored = [tensor.name for tensor in graph.initializer]
    names = Counter(stored)
    names.update({value.name for value in graph.input} - names.keys())  # what is stored is default
    for node in graph.node:
        names.update(filter(None, node.output))
    for name, times in names.items():
        if times > 1:
            raise InputError(f"{path} is not valid ONNX: {name!r} is defined twice.")
    for name in stored:
        if any(name in scope for scope in outer):
            raise InputError(
                f"{path} is not valid ONNX: {name!r} is defined in a subgraph and around it."
            )
    for subgraph in _subgraphs(graph):
        _check_names(path, subgraph, (*outer, names))


def _subgraphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    for node in graph.node:
        for attribute in node.attribute:
            yield from (attribute.g, *attribute.graphs)


def _checked(
    path: Path, tensor: ir.TensorProtocol, files: dict[str, DataFile]
) -> ir.TensorProtocol:
    """Return the tensor, mapped if its data is external; what it holds fits its shape."""
    if isinstance(tensor, ir.ExternalTensor):
        return MappedTensor(tensor, _open_data(path, tensor, files))
    what = f"{path}: tensor {tensor.name!r} is not what its shape says"
    if tensor.dtype == ir.DataType.STRING:
        strings: Any = tensor
        if len(strings.string_data()) != tensor.size:
            raise InputError(f"{what}: {len(strings.string_data())} texts of {tensor.size}.")
    else:
        try:
            tensor.numpy()
        except Exception as error:  # as above
            raise InputError(f"{what}: {_cause(error)}.") from error
    return tensor


def _open_data(path: Path, tensor: ir.ExternalTensor, files: dict[str, DataFile]) -> DataFile:
    location, offset, length = str(tensor.location), tensor.offset or 0, tensor.length
    where = f"{path}: the external data of {tensor.name!r}, {location!r},"
    needed = tensor.nbytes
    if location not in files:
        try:
            files[location] = DataFile(open_inside(path.parent, location))
        except InputError as error:
            raise InputError(f"{where} {error}") from error
    file = files[location]
    if offset < 0 or length not in (None, needed):
        raise InputError(f"{where} has {length} bytes at {offset}; its shape needs {needed}.")
    if offset + needed > file.size:
        raise InputError(f"{where} is too short: {file.size} bytes of {offset + needed}.")
    return file


def _cause(error: Exception) -> str:
    """Return what the error that began it says."""
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    return first_line(error).rstrip(".")
