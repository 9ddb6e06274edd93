"""Writing graphs whose weights lie in one data file, equal bytes once."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path

import numpy as np
import onnx_ir as ir

from ffmerge.errors import InputError
from ffmerge.files import refuse_existing, scratch
from ffmerge.models.pages import give_back_array
from ffmerge.passes.graph.read import MappedTensor
from ffmerge.passes.graph.tensors import (
    CHUNK,
    SAMPLES,
    Array,
    Candidates,
    blocks,
    bytes_stored,
    hash_of,
    rewritten,
    shape_of,
    stored,
    values_of,
)

EMBEDDED_TENSOR = 256  # bytes below which a tensor stays in the graph, as onnx and onnx_ir have it
PAGE, LARGE = 4096, 1 << 20  # tensors above LARGE bytes start a page, so that mapping is exact
ALIGNMENT = 64  # what every element type and vector unit asks for
PROTOBUF_LIMIT = (1 << 31) - 1
_WORD = 16


def write_models(
    models: Mapping[Path, ir.Model],
    data: Path | None = None,
    check: Callable[[Path], None] | None = None,
) -> tuple[Path, ...]:
    """Write each graph to its path, their tensors of 256 bytes or more once in ``data``.

    Tensors with equal bytes, whatever their names, shapes, types and graphs, are one place in
    the file. They are streamed in their order, a block at a time; what is computed lazily is
    computed when its turn comes and dropped. Without ``data`` each graph is one file. All are
    written in a folder beside and renamed, the data first; on an error nothing is left, and the
    models are what they were. ``check`` is called with each graph before it is renamed, and may
    raise.

    Raises:
        InputError: a path exists, cannot be written or is not beside the data, or a graph would
            be larger than the 2 GB that one file of protobuf can be.
    """
    targets = tuple(models)
    if data:
        targets += (data,)
    _refuse(targets, models, data)
    done: list[Path] = []
    try:
        with scratch(targets[0]) as folder:
            _write_into(folder, models, data)
            for path in models:
                if check:
                    check(folder / path.name)
            for path in reversed(targets):  # a graph never stands without its data
                os.replace(folder / path.name, path)
                done.append(path)
    except OSError as error:
        for path in done:
            path.unlink()
        raise InputError(f"cannot write {targets[0]}: {error.strerror or error}.") from error
    return targets


def _refuse(targets: Sequence[Path], models: Mapping[Path, ir.Model], data: Path | None) -> None:
    refuse_existing(*targets)
    if len({path.parent for path in targets}) > 1:
        raise InputError(f"{', '.join(map(str, targets))} are not in one folder.")
    for path, model in models.items():
        if data is None and bytes_stored(model) > PROTOBUF_LIMIT:
            raise InputError(
                f"{path} would be larger than 2 GB, which one ONNX file cannot be: keep its "
                "weights in a data file."
            )


def _write_into(folder: Path, models: Mapping[Path, ir.Model], data: Path | None) -> None:
    if data is None:
        for path, model in models.items():
            _write(model, folder / path.name, _embedded)
        return
    with open(folder / data.name, "w+b", 0) as file:  # unbuffered is 4 x faster
        store = _Store(file, data.name)
        for path, model in models.items():
            _write(model, folder / path.name, store.add)


def _write(
    model: ir.Model, path: Path, written: Callable[[ir.TensorProtocol], ir.TensorProtocol]
) -> None:
    """Serialize a graph with its tensors as ``written`` gives them; leave the model as it was."""
    items = stored(model)
    try:
        for item in items:
            if item.value.is_initializer():
                tensor = written(item.tensor)
                tensor.name = item.name
                _set(item.value, tensor)
            else:
                _set(item.value, _embedded(item.tensor))
        ir.save(model, path, "protobuf")
    finally:
        for item in items:
            _set(item.value, item.tensor)


def _set(value: ir.Value, tensor: ir.TensorProtocol) -> None:
    node = value.producer()
    if node is None:
        value.const_value = tensor
    else:
        node.attributes.add(ir.AttrTensor("value", tensor))


def _embedded(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """Return a tensor that is written into the graph: external data would keep its old place."""
    if not isinstance(tensor, ir.ExternalTensor):
        return tensor
    return rewritten(tensor, lambda values: values, tensor.dtype, shape_of(tensor))


class _Store:
    """A data file in which no bytes are twice.

    Tensors are candidates by their length and a sample of their bytes, then compared byte by
    byte; nothing is read back that has no candidate. This is not ``find_copies``: equal bytes of
    any type and shape are one here, and a tensor that is computed when it is read is computed
    once, for which what is compared with is read from the file.
    """

    def __init__(self, file: FileIO, name: str) -> None:
        self.file, self.name = file, name
        self.end = 0
        self.offsets: dict[bytes, Candidates[int]] = {}

    def add(self, tensor: ir.TensorProtocol) -> ir.TensorProtocol:
        """Return the tensor as external data, at the offset in the file where its bytes now are."""
        if tensor.nbytes < EMBEDDED_TENSOR or tensor.dtype == ir.DataType.STRING:
            return _embedded(tensor)
        array = _stored_values(tensor)
        offset = self._find(array)
        if offset is None:
            offset = self._append(array, tensor)
            self.offsets[_sample(array)].add(offset)
        give_back_array(array)  # one of a checkpoint would stay in memory
        return ir.ExternalTensor(
            self.name, offset, array.nbytes, tensor.dtype,
            shape=ir.Shape(shape_of(tensor)), name=tensor.name or "",
        )  # fmt: skip

    def _find(self, array: Array) -> int | None:
        """Return where the bytes of an array are in the file already."""
        alike = self.offsets.setdefault(
            _sample(array), Candidates(lambda offset: [hash_of(self._parts(offset, array.nbytes))])
        )
        for offset in alike.like(lambda: hash_of(block.data for block in blocks(array))):
            self.file.seek(offset)
            if all(self.file.read(len(block)) == block.data for block in blocks(array)):
                return offset
        return None

    def _parts(self, offset: int, length: int) -> Iterator[bytes]:
        self.file.seek(offset)
        for start in range(0, length, CHUNK):
            yield self.file.read(min(CHUNK, length - start))

    def _append(self, array: Array, tensor: ir.TensorProtocol) -> int:
        step = PAGE if array.nbytes > LARGE else ALIGNMENT
        offset = -(-self.end // step) * step
        self.end = offset + array.nbytes
        if isinstance(tensor, MappedTensor) and tensor.copy_to(self.file.fileno(), offset):
            return offset  # by the kernel, twice as fast
        self.file.seek(offset)
        for block in blocks(array):
            left = block.data
            while left:
                left = left[self.file.write(left) :]
        return offset


def _stored_values(tensor: ir.TensorProtocol) -> Array:
    """Return an array with the bytes the file has, which for types below a byte are packed."""
    if isinstance(tensor, MappedTensor):
        return tensor.bytes_mapped()
    if tensor.dtype.bitwidth < 8:
        return np.frombuffer(tensor.tobytes(), np.uint8)
    return values_of(tensor)


def _sample(array: Array) -> bytes:
    """Return the length and some words of the bytes in C order, the same for any type and shape."""
    step = max(_WORD // array.itemsize, 1)
    words = np.linspace(0, array.nbytes // _WORD - 1, SAMPLES).astype(np.intp)
    where = np.unravel_index((words[:, None] * step + np.arange(step)).reshape(-1), array.shape)
    return array.nbytes.to_bytes(8, "little") + array[where].tobytes()
