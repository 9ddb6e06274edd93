"""What a merge method can be told; the defaults are those that won in benchmarks/quality."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from ffmerge.models.sublayer import FeedForward


@dataclass(frozen=True)
class Settings:
    """Switches of the methods that align and calibrate.

    ``anchor`` is the member the others are aligned to, or ``joint``: each to the mean of the rest.
    ``after`` aligns on the activations after the nonlinearity instead of before. The parts of
    ``calibrated``: neurons are averaged with their ``importance`` to that power (0: all alike), or
    W_in is solved for by ``regmean``; ``scale`` and ``bias`` that each layer has for its neurons;
    ``least_squares`` for W_out over ``tokens`` positions, solved ``rounds`` times, first on what
    the original layers read, then on what the merged model gives them. ``ridge``, relative to the
    mean variance, holds both solutions to the mean. ``rank`` is that of ``residual``, by default
    one for every 64 dimensions of the model.
    """

    anchor: Literal["first", "middle", "last", "joint"] = "first"
    after: bool = False
    importance: float = 2.0
    regmean: bool = False
    scale: Literal["regress", "repair", "none"] = "regress"
    bias: bool = True
    least_squares: bool = True
    rounds: int = 1
    ridge: float = 1e-2
    tokens: int = 16_384
    rank: int | None = None

    def place(self, size: int) -> int:
        """Return the place of the anchor among ``size`` members."""
        return {"first": 0, "middle": size // 2, "last": size - 1, "joint": 0}[self.anchor]

    def pairs(self, members: Sequence[FeedForward]) -> list[tuple[FeedForward, FeedForward]]:
        """Return the pairs of members whose neurons are compared."""
        if self.anchor == "joint":
            return list(combinations(members, 2))
        anchor = members[self.place(len(members))]
        return [(anchor, other) for other in members if other is not anchor]
