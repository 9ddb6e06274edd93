"""What the weights of a model take in a precision, by their shapes alone, and what fits a size.

``early.py`` asks with the shapes that stand in a checkpoint, before torch is there, the search of a
budget and ``compress`` with those of a model. The codes are those of a package (``codes.py``).
"""

from collections.abc import Sequence
from math import prod
from pathlib import Path

from ffmerge.errors import InputError
from ffmerge.files import size_text
from ffmerge.models.codes import BLOCKS, FLOOR, Form, axes_of_scales, is_vector
from ffmerge.models.companions import companion_bytes

Shapes = Sequence[Sequence[int]]  # of maps (outputs, inputs)


class Table(tuple[int, ...]):
    """The shape of a matrix whose rows are looked up: in blocks only if they are whole ones."""


class ByRows(tuple[int, ...]):
    """The shape of a map that int8 multiplies by with one scale for each of its rows."""


BITS = {"int8": 8, "int4": 4}  # of weights in blocks
WIDER = (32, 64, 128)  # blocks of 4 bits that a package of mixed bits may have
DTYPES = ("fp32", "int8", "int4")  # fp16 halves a package too, but is slower on most processors
ON_GPU = ("fp32", "fp16", "int8", "int4")
LOSSLESS = ("fp32", "fp16")  # what fits in one of these keeps more than anything that is narrowed
MOST = 0.4  # of all parameters: more are not taken out
# How much of what 4 bits in their widest blocks take is there at a second try, where that is worth
# its time (docs/quality.md): few neurons go, and some weights have better forms than those; or many
# would have to, and some weights have fewer bits instead. With 0.93 of it the encoder keeps more
# still; SmolLM2 keeps most where all fits.
MORE, LESS = 1.05, 0.97
PARTLY = 1.02  # more is taken by rows of narrowed maps, whose last block is partly filled
FEW, MANY = 0.03, 0.18  # of all parameters, that have to go for the widest blocks
GRAPH = 1_500  # bytes of a graph for each weight: measured 400 (an encoder) to 1,220 (a Llama)


def bytes_of(shapes: Shapes, dtype: str, blocks: Sequence[int] = ()) -> int:
    """Return the bytes of weights of these shapes in a package, scales counted.

    Each matrix has that of the ``blocks`` in which it takes least, or the one of its precision.
    Graph, and copies that runtimes need of a weight, are not in it.
    """
    total = 0
    for shape in shapes:
        count = prod(shape)
        if dtype == "fp16":
            total += 2 * count
        elif dtype == "fp32" or is_vector(shape) or count < FLOOR:
            total += 4 * count
        elif len(shape) > 2:
            total += count + 4 * prod(shape[axis] for axis in axes_of_scales(shape))
        else:
            total += _of_matrix(shape, dtype, blocks)
    return total


def _of_matrix(shape: Sequence[int], dtype: str, blocks: Sequence[int]) -> int:
    """Return the bytes of a matrix in int8 or int4: a table of no whole blocks is int8 in both."""
    rows, width = shape
    sizes = blocks or (BLOCKS[BITS[dtype]],)
    if isinstance(shape, Table):
        sizes = [block for block in sizes if width % block == 0]
        if not sizes:
            return rows * (width + 4)
    if isinstance(shape, ByRows) and dtype == "int8":
        return rows * (width + 4)
    return min(Form(BITS[dtype], block).bytes_of(rows, width) for block in sizes)


def beside(shapes: Shapes, folder: Path) -> int:
    """Return about the bytes of what is shipped beside weights: tokenizer and such, and a graph."""
    return companion_bytes(folder) + GRAPH * (len(shapes) + 10)


def fitting(shapes: Shapes, room: int, dtypes: Sequence[str] = DTYPES) -> str | None:
    """Return the first of ``dtypes`` in which the weights take at most ``room`` bytes, if any."""
    for dtype in dtypes:
        if bytes_of(shapes, dtype) <= room:
            return dtype
    return None


def narrower(
    shapes: Shapes, room: int, dtypes: Sequence[str] = DTYPES
) -> tuple[str, tuple[int, ...]] | None:
    """Return the precision above the highest that fits, and the float32 bytes that may stay.

    Where none fits that is int4 in wider blocks: a trained model loses less in those than by the
    neurons that narrower ones would cost (docs/quality.md). There may be two tries, of which the
    first is so narrow that all of it fits in those, if anything has to go for that. None where
    nothing is to be narrowed, or too much.
    """
    fits, whole = fitting(shapes, room, dtypes), bytes_of(shapes, "fp32")
    if fits is None:
        tries = tuple(whole * room // size for size in _of_four_bits(_least(shapes), room))
        return (DTYPES[-1], tries) if tries else None
    if fits in LOSSLESS:
        return None
    dtype = dtypes[dtypes.index(fits) - 1]
    size = bytes_of(shapes, dtype)
    if not int((1 - MOST) * size) <= room < size:
        return None
    return dtype, (whole * room // size,)


def _of_four_bits(least: int, room: int) -> list[int]:
    """Return what all weights may be taken to need where 4 bits in their widest blocks are least.

    Of so many bytes only ``room`` are there, and so large a part of the parameters is to stay.
    """
    found = []
    if int((1 - MOST) * least) <= room < least:
        found.append(int(PARTLY * least))
    gone = 1 - room / least
    if room < MORE * least and gone < FEW:
        found.append(int(MORE * least))
    elif found and gone > MANY:
        found.append(int(LESS * least))
    return found


def check_reach(shapes: Shapes, size: int, beside: int) -> None:
    """Raise InputError where no way leads to ``size``; ``beside`` of it are not for weights."""
    least = int((1 - MOST) * _least(shapes))
    if size - beside >= least:
        return
    raise InputError(
        f"{size_text(size)} is out of reach: graph and tokenizer take about "
        f"{size_text(beside)}, and the weights in {DTYPES[-1]} with {MOST:.0%} of them gone "
        f"{size_text(least)}: give more than {size_text(beside + least)}."
    )


def _least(shapes: Shapes) -> int:
    """Return what the weights take in 4 bits, each in the blocks that take least."""
    return bytes_of(shapes, DTYPES[-1], WIDER)
