"""The tensors a model stores, read one at a time, and which of them are the same bytes."""

import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Array = npt.NDArray[Any]

CHUNK = 1 << 22  # bytes compared, turned or written at a time
LINE = 64  # bytes of columns turned at a time, a cache line: numpy's own copy is 5 x slower
FEW = 8  # candidates up to which comparing is cheaper than a hash of all bytes
# Bytes from which a tensor is named where it is stored or made twice, or left as it was: exporters
# compute with scalars in every layer, and runtimes fold those.
NOTABLE = 1024
SAMPLES = 16  # elements that must be equal before tensors are read to the end
_SAMPLE = "ffmerge.sample"
T = TypeVar("T")


@dataclass(frozen=True)
class Stored:
    """A tensor written into the file, and the value it gives."""

    value: ir.Value
    tensor: ir.TensorProtocol

    @property
    def name(self) -> str:
        """Name of the initializer, or of the output of the Constant node."""
        return self.value.name or ""


@dataclass
class Copies:
    """Tensors with the bytes of ``first``, and those with the bytes of its transpose."""

    first: int
    identical: list[int] = field(default_factory=list)
    transposed: list[int] = field(default_factory=list)


def is_op(node: ir.Node, *types: str) -> bool:
    """Say whether a node is one of these operators of the standard ONNX domain."""
    return node.domain in ("", "ai.onnx") and node.op_type in types


def graphs(model: ir.Model) -> Iterator[ir.Graph]:
    """Yield the main graph, its subgraphs, then the bodies of functions and their subgraphs."""
    yield from model.graphs()
    for function in model.functions.values():
        yield function.graph
        yield from function.subgraphs()


def stored(model: ir.Model) -> list[Stored]:
    """Return all initializers and all tensors of Constant nodes, in graph order."""
    return [item for graph in graphs(model) for item in stored_in(graph)]


def stored_in(graph: ir.Graph) -> Iterator[Stored]:
    """Yield the initializers and the tensors of Constant nodes of one graph."""
    for value in graph.initializers.values():
        if value.const_value is not None:
            yield Stored(value, value.const_value)
    for node in graph:
        if is_op(node, "Constant") and "value" in node.attributes:
            attribute = node.attributes["value"]
            if not attribute.is_ref():
                yield Stored(node.outputs[0], attribute.as_tensor())


def bytes_stored(model: ir.Model) -> int:
    """Return the content bytes of all stored tensors."""
    return sum(item.tensor.nbytes for item in stored(model))


def distinct_bytes(models: Iterable[ir.Model]) -> int:
    """Return the content bytes of all stored tensors, those at one location once."""
    return sum(
        {
            location_of(item.tensor): item.tensor.nbytes for m in models for item in stored(m)
        }.values()
    )


def location_of(tensor: ir.TensorProtocol) -> object:
    """Return where the bytes are on disk, equal for the same bytes of the same data file."""
    if isinstance(tensor, ir.ExternalTensor):
        return Path(tensor.path).resolve(), tensor.offset or 0
    return tensor


def shape_of(tensor: ir.TensorProtocol) -> tuple[int, ...]:
    """Return the shape as plain numbers."""
    return tuple(tensor.shape.numpy())


def values_of(tensor: ir.TensorProtocol) -> Array:
    """Return the values; external data is mapped, and unmapped when the array is dropped.

    An ``ir.ExternalTensor`` keeps its mapping and a file descriptor for as long as it lives:
    models have more tensors than a process may have open files.
    """
    return copy.copy(tensor).numpy() if type(tensor) is ir.ExternalTensor else tensor.numpy()


def rewritten(
    tensor: ir.TensorProtocol,
    change: Callable[[Array], Array],
    dtype: ir.DataType,
    shape: Sequence[int],
) -> ir.LazyTensor:
    """Return ``change(values)`` as a tensor that is computed when it is read.

    A change that is a view, such as a transpose, costs nothing until its bytes are needed, and
    :func:`blocks` then turns a part at a time.
    """

    def compute() -> ir.TensorProtocol:
        return ir.Tensor(change(values_of(tensor)), dtype=dtype)

    return ir.LazyTensor(compute, dtype=dtype, shape=ir.Shape(shape), name=tensor.name)


def find_copies(tensors: Sequence[ir.TensorProtocol]) -> list[Copies]:
    """Return every set of tensors of one dtype that hold the same bytes, first ones first.

    Transposed pairs are 2-D with more than one row and column. Candidates are found by dtype,
    shape and a sample of elements (which a transpose leaves in place), where these are many by a
    hash of all bytes too, then compared byte by byte with the first of each set, up to where they
    differ. Tensors without elements are ignored. Two tensors are read at a time, and nothing to
    the end that has no candidate.
    """
    buckets: dict[Any, Candidates[Copies]] = {}
    for index, tensor in enumerate(tensors):
        if not tensor.size:
            continue
        shape = shape_of(tensor)
        if _turnable(shape):
            shape = min(shape), max(shape)
        key = tensor.dtype, shape, _sample(tensor)
        sets = buckets.setdefault(key, Candidates(lambda copies: _hashes(tensors[copies.first])))
        likely = sets.like(partial(_hash_of, tensor))
        if not any(_joins(index, copies, tensors) for copies in likely):
            sets.add(Copies(index))
    found = []
    for bucket in buckets.values():
        for copies in bucket.known:
            if copies.identical or copies.transposed:
                found.append(copies)
    return sorted(found, key=lambda copies: copies.first)


class Candidates(Generic[T]):
    """What may have the bytes of a tensor; up to ``FEW`` are looked at, more are hashed first.

    ``hashes`` gives the hashes of all bytes under which one of them is found.
    """

    def __init__(self, hashes: Callable[[T], Iterable[bytes]]) -> None:
        self.known: list[T] = []
        self._hashes = hashes
        self._by_hash: dict[bytes, list[T]] = {}
        self._hashed = 0

    def add(self, one: T) -> None:
        """Add a candidate."""
        self.known.append(one)

    def like(self, hash_wanted: Callable[[], bytes]) -> Sequence[T]:
        """Return those that may be equal to what has the hash."""
        if len(self.known) <= FEW:
            return self.known
        for one in self.known[self._hashed :]:
            for known in set(self._hashes(one)):
                self._by_hash.setdefault(known, []).append(one)
        self._hashed = len(self.known)
        return self._by_hash.get(hash_wanted(), [])


def _hashes(tensor: ir.TensorProtocol) -> Iterator[bytes]:
    """Yield the hash of a tensor's bytes, and of those of its transpose."""
    array = _comparable(tensor)
    yield _hash(array)
    if _turnable(array.shape):
        yield _hash(array.T)


def _hash_of(tensor: ir.TensorProtocol) -> bytes:
    return _hash(_comparable(tensor))


def _hash(array: Array) -> bytes:
    return hash_of((block.data for block in blocks(array)), array.shape)


def hash_of(parts: Iterable[Any], shape: Sequence[int] = ()) -> bytes:
    """Return a hash of bytes that come in parts, and of a shape."""
    total = hashlib.blake2b(repr(tuple(shape)).encode(), digest_size=16)
    for part in parts:
        total.update(part)
    return total.digest()


def _joins(index: int, copies: Copies, tensors: Sequence[ir.TensorProtocol]) -> bool:
    """Add a tensor to a set of copies if it is one of them; say whether it is."""
    first, other = tensors[copies.first], tensors[index]
    one, two = _comparable(first), _comparable(other)
    if one.shape == two.shape and _equal(one, two):
        copies.identical.append(index)
        return True
    if _turnable(shape_of(first)) and one.T.shape == two.shape and _equal(one.T, two):
        copies.transposed.append(index)
        return True
    return False


def _turnable(shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and min(shape) > 1


def _comparable(tensor: ir.TensorProtocol) -> Array:
    """Return an array whose bytes are equal exactly when the tensor's contents are."""
    if tensor.dtype == ir.DataType.STRING:
        strings: Sequence[bytes] = tensor.string_data()  # type: ignore[attr-defined]
        joined = b"".join(len(s).to_bytes(8, "little") + s for s in strings)
        return np.frombuffer(joined, np.uint8)
    values = values_of(tensor)
    # Types below one byte are exact in float32, and the padding bits in memory are not content.
    return np.atleast_1d(values.astype(np.float32) if tensor.dtype.bitwidth < 8 else values)


def _sample(tensor: ir.TensorProtocol) -> bytes:
    """Return some elements, the same ones of a matrix and of its transpose."""
    if isinstance(tensor, ir.LazyTensor):  # computing it may be long
        if _SAMPLE not in tensor.meta:
            tensor.meta[_SAMPLE] = _sample_of(_comparable(tensor))
        known: bytes = tensor.meta[_SAMPLE]
        return known
    return _sample_of(_comparable(tensor))


def _sample_of(array: Array) -> bytes:
    if _turnable(array.shape):
        steps = np.linspace(0, min(array.shape) - 1, SAMPLES).astype(np.intp)
        where = tuple(np.append(steps, length - 1) for length in array.shape)
    else:
        steps = np.linspace(0, array.size - 1, SAMPLES).astype(np.intp)
        where = np.unravel_index(steps, array.shape)
    return array[where].tobytes()


def blocks(array: Array) -> Iterator[npt.NDArray[np.uint8]]:
    """Yield the bytes of an array in C order, ``CHUNK`` at a time, without copying it whole."""
    if array.flags.c_contiguous:
        flat = array.reshape(-1).view(np.uint8)
        for start in range(0, len(flat), CHUNK):
            yield flat[start : start + CHUNK]
        return
    rows = max(1, CHUNK * len(array) // array.nbytes)

    def turned(start: int) -> npt.NDArray[np.uint8]:
        return _contiguous(array[start : start + rows]).reshape(-1).view(np.uint8)

    with ThreadPoolExecutor(1) as ahead:  # numpy copies without the GIL: one is turned, one used
        following = ahead.submit(turned, 0)
        for start in range(0, len(array), rows):
            block = following.result()
            following = ahead.submit(turned, start + rows)  # nothing, behind the last
            yield block


def _contiguous(array: Array) -> Array:
    if array.ndim != 2 or array.flags.c_contiguous:
        return np.ascontiguousarray(array)
    out, step = np.empty(array.shape, array.dtype), max(LINE // array.itemsize, 1)
    for start in range(0, array.shape[1], step):
        out[:, start : start + step] = array[:, start : start + step]
    return out


def _equal(one: Array, other: Array) -> bool:
    rows = max(1, CHUNK * len(one) // one.nbytes)
    for start in range(0, len(one), rows):
        some = slice(start, start + rows)
        if not _same_bytes(_contiguous(one[some]), _contiguous(other[some])):
            return False
    return True


def _same_bytes(one: Array, other: Array) -> bool:
    """Say whether two C-contiguous arrays of the same number of bytes hold the same bytes."""
    words = np.uint64 if one.nbytes % 8 == 0 else np.uint8  # a word at a time is twice as fast
    return np.array_equal(one.reshape(-1).view(words), other.reshape(-1).view(words))
