"""Which neurons a map can do without, if the others take over what they did.

A map f -> d with weights W reads n positions of f neurons. With W solved for anew each time, what
taking out neuron j costs is ``|w_j|^2 / P_jj``, P the inverse of the (damped) sums of products:
optimal brain surgery (Hassibi and Stork, 1993) for whole neurons. ``narrow.py`` calls this.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import LinAlgError, cho_factor, cho_solve

from ffmerge.errors import InputError

Matrix = NDArray[np.float64]

_BLOCK = 32  # neurons that go before all costs are reckoned anew
_LOOKED_AT = 4  # times as many are looked at for it, with all that one does to another


@dataclass(frozen=True)
class Elimination:
    """Neurons in the order in which they go, and the error once each of them has gone.

    ``errors[i]`` is by how much the least error, damping included, has grown once the first i
    neurons of ``order`` are gone.
    """

    order: NDArray[np.int64]
    errors: Matrix

    def kept(self, width: int, neurons: int) -> NDArray[np.int64]:
        """Return the neurons that are left at a width, in their own order."""
        gone = self.order[: neurons - width]
        return np.setdiff1d(np.arange(neurons), gone)


def eliminate(damped: Matrix, weight: Matrix, smallest: int) -> Elimination:
    """Return the order in which neurons go, down to the width ``smallest``.

    ``damped`` (f, f) are the sums of products with something on the diagonal, and ``weight`` (f, d)
    is the W that solves them with all neurons.

    Raises:
        InputError: the sums are not definite.
    """
    try:
        inverse = cho_solve(cho_factor(damped, lower=True), np.eye(len(damped)))
    except LinAlgError as error:
        raise InputError("the statistics of this data are not definite: give more data.") from error
    weight = weight.copy()
    alive = np.arange(len(damped))
    order: list[int] = []
    errors = [0.0]
    while len(alive) > smallest:
        count = min(_BLOCK, len(alive) - smallest)
        costs = np.square(weight).sum(1) / inverse.diagonal()
        cheap = np.sort(np.argsort(costs, kind="stable")[: _LOOKED_AT * count])
        rows = np.asarray(np.linalg.qr(weight[cheap].T, mode="r")).T  # with the same products
        first, paid = _one_by_one(inverse[np.ix_(cheap, cheap)], rows, count)
        gone = cheap[first]
        order += alive[gone].tolist()
        errors += (errors[-1] + np.cumsum(paid)).tolist()
        rest = np.setdiff1d(np.arange(len(alive)), gone)
        across = inverse[np.ix_(rest, gone)]
        solved = np.linalg.solve(
            inverse[np.ix_(gone, gone)], np.concatenate([across.T, weight[gone]], 1)
        )
        inverse = inverse[np.ix_(rest, rest)] - across @ solved[:, : len(rest)]
        weight = weight[rest] - across @ solved[:, len(rest) :]
        alive = alive[rest]
    return Elimination(np.array(order, dtype=np.int64), np.array(errors))


def _one_by_one(inverse: Matrix, weight: Matrix, count: int) -> tuple[list[int], list[float]]:
    """Return which of a few neurons go, the cheapest first, and what each of them costs."""
    inverse, weight = inverse.copy(), weight.copy()
    gone: list[int] = []
    paid: list[float] = []
    costs = np.square(weight).sum(1) / inverse.diagonal()
    for _ in range(count):
        one = int(costs.argmin())
        gone.append(one)
        paid.append(float(costs[one]))
        across = inverse[:, one] / inverse[one, one]
        weight -= np.outer(across, weight[one])
        inverse -= np.outer(across, inverse[one])
        diagonal = inverse.diagonal().copy()
        diagonal[gone] = 1.0
        costs = np.square(weight).sum(1) / diagonal
        costs[gone] = np.inf
    return gone, paid
