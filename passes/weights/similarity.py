"""How alike the feed-forward sublayers of a stack are: what they put out, and their neurons.

Outputs are compared by linear CKA (Kornblith et al., arXiv 1905.00414), taken after W_out and
before the residual is added, as in arXiv 2501.06126, appendix G. In the form
``|Y^T X|^2 / (|X^T X| |Y^T Y|)`` of centred X and Y it needs products of width d_model only, which
Moments adds up batch by batch. Hidden neurons are compared by the mean of their correlations
after alignment.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, combinations_with_replacement
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ffmerge.errors import InputError
from ffmerge.files import plain
from ffmerge.models.data import Examples
from ffmerge.models.feedforward import FeedForward, proven, stacks
from ffmerge.models.probe import Array
from ffmerge.passes.weights.align import match
from ffmerge.passes.weights.statistics import Moments, collect

Matrix = npt.NDArray[np.float64]
Pairs = dict[str, list[tuple[FeedForward, FeedForward]]]  # by stack
Progress = Callable[[str, int, int], None]
_OUTPUTS = "outputs of "  # before the name of a stack: pairs of what its sublayers put out


@dataclass(frozen=True)
class SimilarityConfig:
    """Settings of a comparison.

    Each stack is compared on ``tokens`` positions. Neurons are aligned for layers at most
    ``reach`` apart (None: all, 0: none). The matrices of one pass over the data take ``memory``
    bytes, or those of one pair if that is more: less memory is more passes.
    """

    tokens: int = 10_000
    reach: int | None = None
    batch_size: int = 32
    memory: float = 2e9


@dataclass(frozen=True)
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

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; NaN becomes null."""
        matrices = {"cka": self.cka.tolist(), "correlation": self.correlation.tolist()}
        return plain({**vars(self), **matrices})


def compare(
    model: Any,
    examples: Examples,
    config: SimilarityConfig = SimilarityConfig(),
    progress: Progress = lambda step, done, total: None,
) -> tuple[Similarity, ...]:
    """Return how alike the sublayers are, for every stack that has at least two.

    Raises:
        InputError: no stack has two, a setting is out of range, the model does not take the data,
            or what it computes is not finite.
    """
    if config.tokens < 2 or config.batch_size < 1 or (config.reach or 0) < 0:
        raise InputError("tokens must be 2 or more, batch_size 1 or more, reach 0 or more.")
    found = {name: members for name, members in stacks(proven(model)[0]).items() if members[1:]}
    if not found:
        raise InputError(f"{type(model).__name__} has no two feed-forward sublayers to compare.")
    values: dict[tuple[str, int, int], float] = {}
    counts: dict[str, int] = {}
    passes = list(_passes(found, config))
    for number, pairs in enumerate(passes, 1):
        batches = _watched(examples, config.batch_size, progress, f"pass {number}/{len(passes)}")
        moments = collect(model, pairs, batches, config.tokens)
        for name, each in pairs.items():
            counts[name] = moments[name].count
            measure = _cross_norm if name.startswith(_OUTPUTS) else _aligned
            for done, (a, b) in enumerate(each, 1):
                values[name, a.layer, b.layer] = measure(moments[name], a, b)
                progress(f"comparing {name}", done, len(each))
    results = []
    for name, members in found.items():
        layers = tuple(s.layer for s in members)
        norms = _matrix(values, _OUTPUTS + name, layers)
        with np.errstate(invalid="ignore"):  # a constant output: 0 / 0
            cka = np.square(norms) / np.outer(norms.diagonal(), norms.diagonal())
        correlation = _matrix(values, name, layers)
        np.fill_diagonal(correlation, 1.0)
        results.append(Similarity(name, layers, counts[_OUTPUTS + name], cka, correlation))
    return tuple(results)


def _passes(found: dict[str, tuple[FeedForward, ...]], config: SimilarityConfig) -> Iterator[Pairs]:
    """Yield what to compare in each pass over the data, so that its matrices fit the memory."""
    wanted: list[tuple[str, FeedForward, FeedForward]] = []
    for name, members in found.items():
        outputs = [_output(s) for s in members]
        wanted += [(_OUTPUTS + name, a, b) for a, b in combinations_with_replacement(outputs, 2)]
        wanted += [
            (name, a, b)
            for a, b in combinations(members, 2)
            if (a.d_ff, a.gated) == (b.d_ff, b.gated)
            and (config.reach is None or b.layer - a.layer <= config.reach)
        ]
    pairs, left = Pairs(), config.memory
    for name, a, b in wanted:
        size = 4 * (3 if a.gated else 1) * a.d_ff * b.d_ff  # Moments: float32, 3 views if gated
        if pairs and size > left:
            yield pairs
            pairs, left = Pairs(), config.memory
        pairs.setdefault(name, []).append((a, b))
        left -= size
    yield pairs


def _output(sublayer: FeedForward) -> FeedForward:
    """Return what stands for a sublayer where its output is looked at, not its hidden neurons."""
    return replace(
        sublayer,
        inputs=(sublayer.output,), weights=sublayer.weights[-1:], d_ff=sublayer.d_model,
    )  # fmt: skip


def _cross_norm(moments: Moments, a: FeedForward, b: FeedForward) -> float:
    """Return the Frobenius norm of Y^T X."""
    _refuse_infinite(moments, a, b)
    return float(torch.linalg.vector_norm(moments.cross[a.layer, b.layer], dtype=torch.float64))


def _aligned(moments: Moments, a: FeedForward, b: FeedForward) -> float:
    """Return the mean correlation of the neurons of ``a`` with their partners in ``b``, over f."""
    _refuse_infinite(moments, a, b)
    views = len(moments.cross[a.layer, b.layer])
    correlation = moments.correlation(a.layer, b.layer).cpu() / views
    return float(correlation.gather(1, match(correlation)[:, None]).mean())


def _refuse_infinite(moments: Moments, *sublayers: FeedForward) -> None:
    for sublayer in sublayers:
        if not torch.isfinite(moments.squares[sublayer.layer]).all():
            raise InputError(f"{sublayer.path} gives NaN or infinite values on this data.")


def _matrix(values: dict[tuple[str, int, int], float], name: str, layers: Sequence[int]) -> Matrix:
    unknown = float("nan")
    ordered = [[(name, min(i, j), max(i, j)) for j in layers] for i in layers]
    return np.array([[values.get(key, unknown) for key in row] for row in ordered])


def _watched(
    examples: Examples, size: int, progress: Progress, step: str
) -> Iterator[dict[str, Array]]:
    for done, batch in enumerate(examples.batches(size), 1):
        yield batch
        progress(step, min(done * size, len(examples)), len(examples))
