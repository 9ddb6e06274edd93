"""How far one set of scores is from another: first classes, distributions, directions."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ffmerge.models.probe import Array, best_scores


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


@dataclass(frozen=True)
class Scores:
    """Scores of classes, (positions, classes), expected and got, in float64.

    ``behind`` is by how much the class that is first here is behind the first one there.
    """

    expected: Array
    got: Array
    behind: Array


def of_all(expected: Array, got: Array) -> Scores:
    """Return the scores of all classes."""
    expected, got = np.asarray(expected, np.float64), np.asarray(got, np.float64)
    first = np.take_along_axis(expected, got.argmax(-1)[:, None], -1)[:, 0]
    with np.errstate(invalid="ignore"):  # infinite scores are told by the caller
        return Scores(expected, got, expected.max(-1) - first)


def of_best(expected: Array, got: Array, classes: Array) -> Scores:
    """Return the scores of ``classes`` and of the others as one, of which ``expected`` are those.

    A class that is none of them is expected to be as far behind as the last of them, at least.
    """
    expected = np.asarray(expected, np.float64)
    first = got.reshape(len(classes), -1).argmax(-1)
    scores = np.where(classes == first[:, None], expected[:, :-1], -np.inf).max(-1)
    scores = np.maximum(scores, expected[:, :-1].min(-1))
    behind = expected[:, :-1].max(-1) - scores
    return Scores(expected, best_scores(got, classes), behind)


def compare_scores(scores: Scores, counted: Array, tie: float) -> Quality | None:
    """Return the quality of scores at the positions that are ``counted``; None if there is none.

    A class that the expected scores place less than or exactly ``tie`` below the first is as
    good as the first: among equals no choice is wrong.
    """
    expected, got, behind = scores.expected[counted], scores.got[counted], scores.behind[counted]
    if not len(expected):
        return None
    agree = behind <= tie
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
