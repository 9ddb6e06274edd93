"""Weights as whole numbers of 8, 4 or 2 bits: the one definition of their codes and scales.

The graph passes store codes and scales in a package (``passes/graph/blocks.py``, ``int8.py``); the
search rounds PyTorch's weights in the same way, to choose by what the package will compute.
float32 arrays come in, arrays go out; nothing here knows a model.

* A scale for each row or column of a matrix, codes of 8 bits from -127 to 127 around zero.
* Blocks of 2, 4 or 8 bits: a scale for each ``BLOCKS`` elements of a row, codes from 0 on; the one
  that stands for zero is the middle one, or each block has its own. Two codes of 4 bits make a
  byte, or four of 2.
* Activations: codes from 0 to 255 around a zero point, in a range that was seen. Where that is one
  range for a row, each ``SPREAD`` neighbours of it are spread over each other before.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

FLOOR = 1024  # elements below which scales and nodes cost about what a weight saves
# Elements of a row that share a scale, by bits. Of 8 bits: a trained encoder keeps a cosine of
# 0.9996, 0.9994 and 0.9991 in 32, 64 and 128, and one row takes the same time in 64 and 128.
BLOCKS = {4: 32, 8: 64}
CLIPS = np.linspace(1, 0.75, 11)  # of a block's range, tried for its scale
SHORTEST_ROW = 32  # elements of a row of several matrices that has a scale: no kernel of few taps
AT_ONCE = 1 << 20  # elements of a table that are rounded at a time
SPREAD = 16  # neighbours in a row that are spread over each other
_PAIR = np.array([[1, 1], [1, -1]], np.float32)
# Hadamard's matrix of that size, symmetric and its own inverse; its elements are 1/4 and -1/4
HADAMARD = np.kron(np.kron(_PAIR, _PAIR), np.kron(_PAIR, _PAIR)) / np.float32(4)
# What is below zero counts so much in the largest of a row. Rows are divided by that, and go from
# -128 / 127 to 1: zero has code 128. From -1 to 1 it would be 127.5, which the last bit decides.
BELOW = np.float32(-127 / 128)


@dataclass(frozen=True)
class Form:
    """How a matrix is stored in blocks: bits of a code, elements of a row that share a scale.

    With ``zeros`` each block has its own zero point, which takes the bits of a code.
    """

    bits: int
    block: int
    zeros: bool = False

    def bytes_of(self, rows: int, width: int) -> int:
        """Return what a matrix takes, rows filled up to whole blocks, zero points to bytes."""
        blocks = -(-width // self.block)
        size = blocks * (self.block * self.bits // 8 + 4)
        if self.zeros:
            size += -(-blocks * self.bits // 8)
        return rows * size


class Blocks(NamedTuple):
    """A matrix in blocks: codes [rows, blocks, block], scales and zero points [rows, blocks].

    A zero point is the code that stands for zero.
    """

    codes: Array
    scales: Array
    zeros: Array

    def values(self, width: int) -> Array:
        """Return the matrix [rows, width] that they stand for."""
        values = (self.codes.astype(np.float32) - self.zeros[..., None]) * self.scales[..., None]
        return values.reshape(len(self.codes), -1)[:, :width]


def int8_codes(
    values: Array, axis: int | tuple[int, ...], paired: bool = False
) -> tuple[Array, Array]:
    """Return int8 codes around zero, and scales of size 1 along ``axis``.

    ``paired`` is for a product that sums along ``axis``, one number then: the codes of two
    neighbours sum to 128 at most. x86 without VNNI adds 255 times both in 16 bits and saturates
    (ALBERT-base: 17 % of error instead of 7 %).
    """
    largest = np.abs(values).max(axis=axis, keepdims=True)
    if paired:
        assert isinstance(axis, int)
        rows = np.moveaxis(values, axis, 0)
        if len(rows) > 1:
            sums = np.moveaxis(rows[:-1:2] + rows[1::2], 0, axis)
            largest = np.maximum(largest, np.abs(sums).max(axis=axis, keepdims=True))
    scale = largest / np.float32(127)
    scale[scale == 0] = 1
    return np.rint(values / scale).astype(np.int8), scale


def is_vector(shape: Sequence[int]) -> bool:
    """Say whether a tensor is one row, as a class token (1, 1, d) is, and has one scale at most."""
    return sum(size > 1 for size in shape) < 2


def axes_of_scales(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the axes of a tensor that is no matrix which tell its scales apart.

    Of several matrices, as experts (experts, rows, columns), each row has one, as those of every
    matrix. All else has one for each index of the first axis that has several: position embeddings
    (1, tokens, d) for each token, a convolution for each channel that it gives.
    """
    several = [axis for axis, size in enumerate(shape) if size > 1]
    if len(several) == 3 and shape[several[-1]] >= SHORTEST_ROW:
        return tuple(several[:2])
    return tuple(several[:1]) or (0,)


def codes_of_rows(values: Array) -> tuple[Array, Array]:
    """Return codes of 8 bits of a tensor that is no matrix, and scales (:func:`axes_of_scales`)."""
    axes = axes_of_scales(values.shape)
    return int8_codes(values, tuple(axis for axis in range(values.ndim) if axis not in axes))


def spread(values: Array) -> Array:
    """Return values [..., n] with each ``SPREAD`` of a row multiplied by ``HADAMARD``.

    Twice is what it was. A product of two spread matrices is that of the two, but a value that is
    far larger than all others of its row is a quarter of itself in sixteen places: 8 bits in one
    range leave the others two digits more (block rotations, arXiv 2404.00456 and 2406.01721). Of
    three trained encoders, 1 - cosine is a quarter to a fifth of what it is without.

    By sums and differences of pairs, which every processor rounds alike; a product's kernel is free
    to add up otherwise.
    """
    parts = values.reshape(-1, 2, 2, 2, 2)
    for axis in range(1, parts.ndim):
        one, other = np.take(parts, 0, axis), np.take(parts, 1, axis)
        parts = np.stack([one + other, one - other], axis)
    return (parts / values.dtype.type(4)).reshape(values.shape)


def block_codes(values: Array, form: Form) -> Blocks:
    """Return a matrix in blocks, with the scales and zero points of :func:`block_scales`.

    Rows are filled up with zeros. Some rows are worked on at a time: a large table needs no copies
    of itself.
    """
    blocks = -(-values.shape[1] // form.block)
    codes = np.empty((len(values), blocks, form.block), np.uint8)
    scales = np.empty((len(values), blocks), np.float32)
    zeros = np.empty((len(values), blocks), np.uint8)
    step = max(1, AT_ONCE // values.shape[1])
    for start in range(0, len(values), step):
        rows = slice(start, start + step)
        codes[rows], scales[rows], zeros[rows] = _codes_of_rows(values[rows], form)
    return Blocks(codes, scales, zeros)


def _codes_of_rows(values: Array, form: Form) -> tuple[Array, Array, Array]:
    rows, width = values.shape
    filled = np.pad(values, ((0, 0), (0, -width % form.block))).reshape(rows, -1, form.block)
    scales, zeros = block_scales(filled, form)
    return _nearest(filled, scales, zeros, form.bits), scales, zeros


def block_scales(filled: Array, form: Form, weights: Array | None = None) -> tuple[Array, Array]:
    """Return scales and zero points, both float32, of the blocks of [rows, blocks, block].

    With zero points of their own the codes go from a block's least value to its largest. Without,
    at full range its largest magnitude has the code 0 (that is -8, or -128), whatever its sign: the
    scale takes the sign. With less than 8 bits smaller ranges are tried, which cut it off
    (``CLIPS``); the one with the least squared error stays, each element's by its ``weights``.
    """
    low, high = filled.min(-1, initial=0), filled.max(-1, initial=0)
    if form.zeros:
        full = ((high - low) / (2**form.bits - 1)).astype(np.float32)
        zeros = np.rint(-low / np.where(full == 0, 1, full))
    else:
        full = (np.where(high > -low, high, low) / -middle(form.bits)).astype(np.float32)
        zeros = np.full(full.shape, middle(form.bits))
    if form.bits == 8:
        return full, zeros
    best, least = full, np.full(full.shape, np.inf, np.float32)
    for clip in CLIPS:
        scale = full * np.float32(clip)
        off = (_nearest(filled, scale, zeros, form.bits) - zeros[..., None]) * scale[..., None]
        off -= filled
        squares = off * off if weights is None else off * off * weights
        error = squares.sum(-1)
        best, least = np.where(error < least, scale, best), np.minimum(error, least)
    return best, zeros


def _nearest(filled: Array, scales: Array, zeros: Array, bits: int) -> Array:
    """Return the nearest codes for these scales and zero points, as float32."""
    steps = np.rint(filled / np.where(scales == 0, 1, scales)[..., None])
    return np.clip(steps + zeros[..., None], 0, 2**bits - 1)


def middle(bits: int) -> np.float32:
    """Return the code that stands for zero in blocks without zero points of their own."""
    return np.float32(2 ** (bits - 1))


def pack(codes: Array, bits: int) -> Array:
    """Put codes [..., n] of less than 8 bits together into bytes, the first in the lowest bits."""
    missing = -codes.shape[-1] % (8 // bits)
    if missing:
        codes = np.pad(codes, [*[(0, 0)] * (codes.ndim - 1), (0, missing)])
    packed = codes[..., :: 8 // bits]
    for place in range(1, 8 // bits):
        packed = packed | (codes[..., place :: 8 // bits] << (place * bits))
    return packed


def range_scale(low: float, high: float, bits: int = 8) -> tuple[np.float32, Any]:
    """Return the scale and the zero point of unsigned codes for a range that holds zero.

    The zero point is uint8, of 16 ``bits`` uint16.
    """
    most = 2**bits - 1
    scale = np.float32(max(high - low, 1e-8) / most)
    return scale, np.dtype(f"uint{bits}").type(np.clip(np.rint(-low / scale), 0, most))
