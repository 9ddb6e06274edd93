"""How far one set of scores is from another: first classes, distributions, directions."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ffmerge.models.probe import Array


@dataclass(frozen=True)
class Quality:
    """Scores of classes against the expected ones, over the ``positions`` that are no padding.

    ``agreement`` is the fraction of positions where the class that is first here is first there,
    or within the tie of it; ``kl`` is the mean of KL(expected || got) in nats.
    """

    positions: int
    agreement: float
    kl: float


def mean(parts: Sequence[Quality]) -> Quality | None:
    """Return the quality over the positions of all parts; None if there are none."""
    if not parts:
        return None
    counts = [part.positions for part in parts]
    agreement = np.average([part.agreement for part in parts], weights=counts)
    kl = np.average([part.kl for part in parts], weights=counts)
    return Quality(sum(counts), float(agreement), float(kl))


def compare_scores(expected: Array, got: Array, counted: Array, tie: float) -> Quality | None:
    """Return the quality of (positions, classes) scores; None if no position is counted.

    A class that the expected scores place less than or exactly ``tie`` below the first is as
    good as the first: among equals no choice is wrong. In float64.
    """
    expected = np.asarray(expected, np.float64)[counted]
    got = np.asarray(got, np.float64)[counted]
    if not len(expected):
        return None
    first = np.take_along_axis(expected, got.argmax(-1)[:, None], -1)[:, 0]
    agree = expected.max(-1) - first <= tie
    p, q = log_softmax(expected), log_softmax(got)
    kl = (np.exp(p) * (p - q)).sum(-1)
    return Quality(len(expected), float(agree.mean()), max(float(kl.mean()), 0.0))


def log_softmax(scores: Array) -> Array:
    """Return the logarithms of the softmax along the last axis."""
    shifted = scores - scores.max(-1, keepdims=True)
    logs: Array = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return logs


def cosine(expected: Array, got: Array) -> float:
    """Return the cosine of two flat arrays; of zeros 1 if the other is zero as well, else 0."""
    norms = float(np.linalg.norm(expected) * np.linalg.norm(got))
    if not norms:
        return float(np.array_equal(expected, got))
    return float(expected @ got) / norms
