"""The ways in which a model can be shipped under a size.

``compress.py`` measures these against each other and takes the best. A way is a precision of the
package, and where that alone does not fit, fewer hidden neurons (``narrow.py``). Of the precisions
that fit as they are only the highest is a way (``sizes.fitting``): a lower one loses more. The next
higher one, narrowed until it fits (``sizes.narrower``), may be better. Weights are rounded as in a
package (``precision.py``); what is rounded by data is measured as a package.
"""

from dataclasses import dataclass
from typing import Any

from ffmerge.models.sizes import DTYPES, Shapes, fitting
from ffmerge.passes.weights.evaluate import Score
from ffmerge.passes.weights.precision import bytes_of, rounded


@dataclass(frozen=True)
class Way:
    """A precision, its bytes and metric, and in words what is done to the model."""

    dtype: str
    bytes: int
    value: float
    text: str


def takes_mixed(shapes: Shapes, room: int) -> bool:
    """Say whether 8 bits do not fit, so that 2, 4 and 8 bits are one more way."""
    return fitting(shapes, room) not in DTYPES[:2]


def measured(model: Any, dtype: str, score: Score, text: str) -> Way:
    """Return a way by what the model as it is keeps in a precision."""
    if dtype == "fp32":
        value = score.measure(model)
    else:
        with rounded(model, dtype):
            value = score.measure(model)
    return Way(dtype, bytes_of(model, dtype), value, text)
