"""The tensors a model stores, read one at a time, and which of them are the same bytes."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Array = npt.NDArray[Any]

BLOCK = 1 << 24  # bytes hashed or compared at a time


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
    found = []
    for graph in graphs(model):
        for value in graph.initializers.values():
            if value.const_value is not None:
                found.append(Stored(value, value.const_value))
        for node in graph:
            if is_op(node, "Constant") and "value" in node.attributes:
                attribute = node.attributes["value"]
                if not attribute.is_ref():
                    found.append(Stored(node.outputs[0], attribute.as_tensor()))
    return found


def bytes_stored(model: ir.Model) -> int:
    """Return the content bytes of all stored tensors."""
    return sum(item.tensor.nbytes for item in stored(model))


def shape_of(tensor: ir.TensorProtocol) -> tuple[int, ...]:
    """Return the shape as plain numbers."""
    return tuple(tensor.shape.numpy())


def values_of(tensor: ir.TensorProtocol) -> Array:
    """Return the values; external data is mapped, and unmapped when the array is dropped.

    An ``ir.ExternalTensor`` keeps its mapping and a file descriptor for as long as it lives:
    models have more tensors than a process may have open files.
    """
    if isinstance(tensor, ir.ExternalTensor):
        tensor = ir.ExternalTensor(
            tensor.location,
            tensor.offset,
            tensor.length,
            tensor.dtype,
            shape=tensor.shape,
            name=tensor.name,
            base_dir=tensor.base_dir,
        )
    return tensor.numpy()


def rewritten(
    tensor: ir.TensorProtocol,
    change: Callable[[Array], Array],
    dtype: ir.DataType,
    shape: Sequence[int],
) -> ir.LazyTensor:
    """Return ``change(values)`` as a C-contiguous tensor that is computed when it is read."""

    def compute() -> ir.TensorProtocol:
        return ir.Tensor(np.array(change(values_of(tensor)), order="C", copy=True), dtype=dtype)

    return ir.LazyTensor(compute, dtype=dtype, shape=ir.Shape(shape), name=tensor.name)


def find_copies(tensors: Sequence[ir.TensorProtocol]) -> list[Copies]:
    """Return every set of tensors of one dtype that hold the same bytes, first ones first.

    Transposed pairs are 2-D with more than one row and column. Candidates are found by dtype,
    shape and the two end elements (which a transpose leaves in place), then by SHA-256, then
    compared byte by byte. Tensors without elements are ignored. One tensor is read at a time,
    two while they are compared.
    """
    buckets: dict[Any, list[int]] = {}
    for index, tensor in enumerate(tensors):
        if tensor.size:
            shape = shape_of(tensor)
            form = tuple(sorted(shape)) if _turnable(shape) else shape
            key = (tensor.dtype, form, _ends(_comparable(tensor)))
            buckets.setdefault(key, []).append(index)
    found = [
        copies
        for bucket in buckets.values()
        if len(bucket) > 1
        for copies in _compare(tensors, bucket)
    ]
    return sorted(found, key=lambda copies: copies.first)


def _compare(tensors: Sequence[ir.TensorProtocol], bucket: Sequence[int]) -> list[Copies]:
    seen: dict[tuple[tuple[int, ...], str], tuple[Copies, bool]] = {}
    found = []
    for index in bucket:
        array, shape = _comparable(tensors[index]), shape_of(tensors[index])
        key = (shape, _digest(array))
        if key not in seen:
            copies = Copies(index)
            found.append(copies)
            seen[key] = (copies, False)
            if _turnable(shape):
                seen.setdefault((shape[::-1], _digest(array.T)), (copies, True))
            continue
        copies, turned = seen[key]
        first = _comparable(tensors[copies.first])
        if _equal(first.T if turned else first, array):
            (copies.transposed if turned else copies.identical).append(index)
    return [copies for copies in found if copies.identical or copies.transposed]


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


def _ends(array: Array) -> bytes:
    first, last = (slice(0, 1),) * array.ndim, (slice(-1, None),) * array.ndim
    return array[first].tobytes() + array[last].tobytes()


def _blocks(array: Array) -> Iterator[npt.NDArray[np.uint8]]:
    rows = max(1, BLOCK * len(array) // array.nbytes)
    for start in range(0, len(array), rows):
        yield np.ascontiguousarray(array[start : start + rows]).reshape(-1).view(np.uint8)


def _digest(array: Array) -> str:
    digest = hashlib.sha256()
    for block in _blocks(array):
        digest.update(block.data)
    return digest.hexdigest()


def _equal(one: Array, other: Array) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(_blocks(one), _blocks(other), strict=True))
