"""The ways in which a model can be shipped under a size.

``compress.py`` measures these against each other and takes the best. A way is a precision of the
package, and where that alone does not fit, fewer hidden neurons (``narrow.py``). Of the precisions
that fit as they are only the highest is a way (:func:`whole`): a lower one loses more. The next
higher one, narrowed until it fits (:func:`narrower`), may be better. Weights are rounded as in a
package (``precision.py``); what rounding by data brings int4 is not counted.
"""

from dataclasses import dataclass
from typing import Any

from ffmerge.errors import InputError
from ffmerge.files import size_text
from ffmerge.models.codes import BLOCKS
from ffmerge.passes.weights.evaluate import Score
from ffmerge.passes.weights.precision import BITS, bytes_of, rounded

DTYPES = ("fp32", "int8", "int4")  # fp16 halves a package too, but is slower on most processors
MOST = 0.4  # of all parameters: more are not taken out


@dataclass(frozen=True)
class Way:
    """A precision, its bytes and metric, and in words what is done to the model."""

    dtype: str
    bytes: int
    value: float
    text: str


def whole(model: Any, room: int, score: Score) -> list[Way]:
    """Return the highest precision that fits, if one does, measured."""
    dtype = fitting(model, room)
    if dtype is None:
        return []
    return [measured(model, dtype, score, dtype)]


def fitting(model: Any, room: int) -> str | None:
    """Return the highest precision in which the weights take at most ``room`` bytes, if any."""
    for dtype in DTYPES:
        if bytes_of(model, dtype) <= room:
            return dtype
    return None


def narrower(model: Any, room: int) -> tuple[str, int] | None:
    """Return the precision above the highest that fits, and the float32 bytes that may stay.

    None where nothing is to be narrowed, or too much.
    """
    fits = fitting(model, room)
    if fits == DTYPES[0]:
        return None
    dtype = DTYPES[-1]
    if fits is not None:
        dtype = DTYPES[DTYPES.index(fits) - 1]
    kept = _kept(model, dtype, room)
    if kept is None:
        return None
    return dtype, kept


def takes_mixed(model: Any, room: int) -> bool:
    """Say whether 8 bits do not fit, so that 2, 4 and 8 bits are one more way."""
    return fitting(model, room) not in DTYPES[:2]


def out_of_reach(model: Any, size: int, beside: int) -> InputError:
    """Return what to say where no way leads to ``size``; ``beside`` of it are not for weights."""
    least = int((1 - MOST) * bytes_of(model, DTYPES[-1]))
    return InputError(
        f"{size_text(size)} is out of reach: graph and tokenizer take about "
        f"{size_text(beside)}, and the weights in {DTYPES[-1]} with {MOST:.0%} of them gone "
        f"{size_text(least)}: give more than {size_text(beside + least)}."
    )


def measured(model: Any, dtype: str, score: Score, text: str) -> Way:
    """Return a way by what the model as it is keeps in a precision."""
    if dtype == "fp32":
        value = score.measure(model)
    else:
        with rounded(model, dtype):
            value = score.measure(model)
    return Way(dtype, bytes_of(model, dtype), value, text)


def _kept(model: Any, dtype: str, room: int) -> int | None:
    """Return the float32 bytes that may stay for ``room`` bytes of ``dtype``; None: too few."""
    weight = 4.0
    if dtype in BITS:
        bits = BITS[dtype]
        weight = bits / 8 + 4 / BLOCKS[bits]
    count = sum(parameter.numel() for parameter in model.parameters())
    gone = (bytes_of(model, dtype) - room) / weight
    if gone > MOST * count:
        return None
    return int(4 * (count - gone))
