"""The ways in which a model can be shipped under a size, measured against each other.

``compress.py`` calls :func:`ways` and takes the best. A way is a precision of the package, and
where that alone does not fit, fewer hidden neurons (``narrow.py``). Of the precisions that fit as
they are only the highest is a way: a lower one loses more. The next higher one, narrowed until it
fits, may be better, and is measured as well. Weights are rounded as in a package
(``precision.py``); what rounding by data brings int4 is not counted.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ffmerge.errors import InputError
from ffmerge.files import size_text
from ffmerge.models.codes import BLOCKS
from ffmerge.passes.weights.evaluate import Score
from ffmerge.passes.weights.merge import Merge
from ffmerge.passes.weights.methods import Merged, in_place
from ffmerge.passes.weights.precision import BITS, bytes_of, rounded

Narrower = Callable[[int], tuple[Merge, Merged]]  # by the bytes of the float32 weights that stay

DTYPES = ("fp32", "int8", "int4")  # fp16 halves a package too, but is slower on most processors
MOST = 0.4  # of all parameters: more are not taken out


@dataclass(frozen=True)
class Way:
    """A precision, its bytes and metric, and what is narrowed for it, if anything.

    ``mixed`` are 2, 4 and 8 bits, chosen for each weight and rounded by data.
    """

    dtype: str
    bytes: int
    value: float
    merge: Merge | None = None
    merged: Merged | None = None
    mixed: bool = False

    @property
    def text(self) -> str:
        """What is done to the model."""
        if self.mixed:
            return "2, 4 and 8 bits by data"
        if self.merge is None:
            return self.dtype
        return f"{self.dtype}, {self.merge.record.narrowed[0].text}"


def ways(model: Any, size: int, beside: int, score: Score, narrower: Narrower) -> list[Way]:
    """Return the ways to ``size`` bytes, the best first; the model stays as it is.

    ``beside`` of them are not for the weights.

    Raises:
        InputError: so few are out of reach.
    """
    found = []
    room = size - beside
    larger = None
    for dtype in DTYPES:
        if bytes_of(model, dtype) <= room:
            found.append(_measured(model, dtype, score))
            break
        larger = dtype
    if larger is not None and (kept := _kept(model, larger, room)):
        merge, merged = narrower(kept)
        with in_place(model, merged):
            found.append(_measured(model, larger, score, merge, merged))
    if not found:
        least = int((1 - MOST) * bytes_of(model, DTYPES[-1]))
        raise InputError(
            f"{size_text(size)} is out of reach: graph and tokenizer take about "
            f"{size_text(beside)}, and the weights in {DTYPES[-1]} with {MOST:.0%} of them gone "
            f"{size_text(least)}: give more than {size_text(beside + least)}."
        )
    return sorted(found, key=lambda way: score.rank(way.value), reverse=True)


def _measured(
    model: Any,
    dtype: str,
    score: Score,
    merge: Merge | None = None,
    merged: Merged | None = None,
) -> Way:
    if dtype == "fp32":
        value = score.measure(model)
    else:
        with rounded(model, dtype):
            value = score.measure(model)
    return Way(dtype, bytes_of(model, dtype), value, merge, merged)


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
