"""How alike the feed-forward sublayers of a stack are: what they put out, and their neurons.

Outputs are compared by linear CKA (Kornblith et al., arXiv 1905.00414), taken after W_out and
before the residual is added, as in arXiv 2501.06126, appendix G. In the form
``|Y^T X|^2 / (|X^T X| |Y^T Y|)`` of centred X and Y it needs products of width d_model only, which
Moments adds up batch by batch. Hidden neurons are compared by the mean of their correlations
after alignment.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, combinations_with_replacement
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ffmerge.config import SimilarityConfig
from ffmerge.errors import InputError
from ffmerge.files import plain
from ffmerge.heatmap import picture
from ffmerge.models.data import Data, examples_for
from ffmerge.models.finite import check_weights
from ffmerge.models.prove import proven
from ffmerge.models.sublayer import FeedForward, stacks
from ffmerge.passes.weights.activations import Batches, add_up
from ffmerge.passes.weights.align import match
from ffmerge.passes.weights.moments import Moments
from ffmerge.passes.weights.progress import shown_batches
from ffmerge.progress import Progress, silent

Matrix = npt.NDArray[np.float64]
Stacks = Mapping[str, tuple[FeedForward, ...]]
Pairs = dict[tuple[str, str], list[tuple[int, int]]]  # layers, by stack and what is compared
_OUTPUTS, _FEATURES = "outputs", "features"  # of Activations


@dataclass(frozen=True, repr=False)
class Similarity:
    """What was found for one stack.

    ``cka`` and ``correlation`` are symmetric, with a row for each of ``layers``. NaN stands where
    nothing can be said: neurons of layers out of reach or of unlike size, an output that is
    constant.
    """

    name: str
    layers: tuple[int, ...]
    positions: int
    cka: Matrix
    correlation: Matrix

    def __repr__(self) -> str:
        return f"<Similarity: {self.name}, {len(self.layers)} layers, {self.positions:,} positions>"

    def _repr_html_(self) -> str:
        return picture([self.to_json()])

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; NaN becomes null."""
        matrices = {"cka": self.cka.tolist(), "correlation": self.correlation.tolist()}
        return plain({**vars(self), **matrices})


def similarity(
    model: Any,
    data: Data,
    config: SimilarityConfig = SimilarityConfig(),
    progress: Progress = silent,
) -> tuple[Similarity, ...]:
    """Return how alike the sublayers are, for every stack that has at least two.

    Raises:
        InputError: no stack has two, the model does not take the data, or what it computes is not
            finite.
    """
    check_weights(model)
    examples = examples_for(model, data)
    found = {name: members for name, members in stacks(proven(model)[0]).items() if members[1:]}
    if not found:
        raise InputError(f"{type(model).__name__} has no two feed-forward sublayers to compare.")
    values: dict[tuple[str, str, int, int], float] = {}
    counts: dict[str, int] = {}
    passes = list(_passes(found, config))
    for number, pairs in enumerate(passes, 1):
        step = f"pass {number}/{len(passes)}"
        batches = shown_batches(examples, config.batch_size, progress, step)
        seen = _collected(model, found, pairs, batches, config.tokens)
        for (name, what), moments in seen.items():
            counts[name] = moments.count
            for done, (a, b) in enumerate(moments.pairs, 1):
                values[name, what, a, b] = _MEASURES[what](moments, a, b)
                progress(f"comparing {what} of {name}", done, len(moments.pairs))
    results = []
    for name, members in found.items():
        layers = tuple(s.layer for s in members)
        norms = _matrix(values, (name, _OUTPUTS), layers)
        with np.errstate(invalid="ignore"):  # a constant output: 0 / 0
            cka = np.square(norms) / np.outer(norms.diagonal(), norms.diagonal())
        correlation = _matrix(values, (name, _FEATURES), layers)
        np.fill_diagonal(correlation, 1.0)
        results.append(Similarity(name, layers, counts[name], cka, correlation))
    return tuple(results)


def _passes(found: Stacks, config: SimilarityConfig) -> Iterator[Pairs]:
    """Yield what to compare in each pass over the data, so that its matrices fit the memory."""
    pairs, left = Pairs(), config.memory * 1e9
    for key, pair, size in _compared(found, config.reach):
        if pairs and size > left:
            yield pairs
            pairs, left = Pairs(), config.memory * 1e9
        pairs.setdefault(key, []).append(pair)
        left -= size
    yield pairs


def _compared(
    found: Stacks, reach: int | None
) -> Iterator[tuple[tuple[str, str], tuple[int, int], int]]:
    """Yield what is compared of which two layers, and the bytes of their matrix in float32."""
    for name, members in found.items():
        for a, b in combinations_with_replacement(members, 2):
            yield (name, _OUTPUTS), (a.layer, b.layer), 4 * a.d_model * b.d_model
        for a, b in combinations(members, 2):
            near = reach is None or b.layer - a.layer <= reach
            if near and (a.d_ff, a.gated) == (b.d_ff, b.gated):
                views = 3 if a.gated else 1
                yield (name, _FEATURES), (a.layer, b.layer), 4 * views * a.d_ff * b.d_ff


def _collected(
    model: Any, found: Stacks, pairs: Pairs, batches: Batches, tokens: int
) -> dict[tuple[str, str], Moments]:
    """Return the moments of one pass, by stack and by what is compared."""
    moments: dict[str, dict[str, Moments]] = {}
    for (name, what), each in pairs.items():
        moments.setdefault(name, {})[what] = Moments(tuple(each))
    add_up(model, {name: found[name] for name in moments}, moments, batches, tokens)
    flat = {(name, what): moments[name][what] for name, what in pairs}
    return flat


def _cross_norm(moments: Moments, a: int, b: int) -> float:
    """Return the Frobenius norm of Y^T X."""
    return float(torch.linalg.vector_norm(moments.cross[a, b], dtype=torch.float64))


def _aligned(moments: Moments, a: int, b: int) -> float:
    """Return the mean correlation of the neurons of ``a`` with their partners in ``b``."""
    correlation = moments.correlation(a, b).cpu() / len(moments.cross[a, b])
    return float(correlation.gather(1, match(correlation)[:, None]).mean())


_MEASURES = {_OUTPUTS: _cross_norm, _FEATURES: _aligned}


def _matrix(
    values: dict[tuple[str, str, int, int], float], key: tuple[str, str], layers: Sequence[int]
) -> Matrix:
    unknown = float("nan")
    ordered = [[(*key, min(i, j), max(i, j)) for j in layers] for i in layers]
    return np.array([[values.get(place, unknown) for place in row] for row in ordered])
