"""Does the package compute what PyTorch computed? Every output, element by element."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ffmerge.errors import InputError
from ffmerge.models.manifest import GraphRecord, Manifest, reference_key
from ffmerge.models.probe import Array, is_logits, kept, stored_elements
from ffmerge.runtime_tests.locate import Divergence, locate
from ffmerge.runtime_tests.quality import Quality, compare_scores, cosine
from ffmerge.runtime_tests.reference import Reference, read_reference
from ffmerge.runtime_tests.replay import Generation, replay
from ffmerge.runtime_tests.runtimes.base import LEVEL
from ffmerge.runtime_tests.runtimes.registry import find_runtime
from ffmerge.runtime_tests.tolerance import DRAWN, NOISE, Tolerance, for_dtype


@dataclass(frozen=True)
class Worst:
    """The element that uses most of its tolerance; ``index`` is in the full output."""

    case: int
    index: tuple[int, ...]
    expected: float
    got: float


@dataclass(frozen=True)
class CaseParity:
    """One output on one case; ``real`` says that its inputs came with data.

    The differences are None when they could not be computed, ``quality`` where the output has no
    scores of classes.
    """

    case: int
    real: bool
    max_abs: float | None
    max_rel: float | None
    cosine: float | None
    quality: Quality | None
    worst: Worst | None


@dataclass(frozen=True)
class OutputParity:
    """One output of a graph over all cases, at one optimization level.

    ``max_rel`` is over the elements whose expected size exceeds ``atol``. A quantized model is
    judged by the real case if there is one: all numbers are then of it. The differences are
    None when they could not be computed; ``reason`` then says why, as it does whenever not
    ``ok``. ``compared`` of ``elements`` were stored with the package. ``quality`` is that of the
    real case if there is one, else of all.
    """

    graph: str
    name: str
    optimization: str
    max_abs: float | None
    max_rel: float | None
    cosine: float | None
    quality: Quality | None
    worst: Worst | None
    compared: int
    elements: int
    atol: float
    rtol: float
    ok: bool
    reason: str | None
    cases: tuple[CaseParity, ...] = ()


@dataclass(frozen=True)
class _Sample:
    """The stored elements of one output of one case, and the shape they were taken from.

    Of ``width`` elements each, every ``step``-th; ``counted`` says which are no padding.
    """

    case: int
    real: bool
    expected: Array | None
    got: Array
    shape: tuple[int, ...]
    step: int
    width: int
    counted: Array


def check_parity(
    folder: Path, manifest: Manifest, provider: str = "cpu", optimization: str = LEVEL
) -> list[OutputParity]:
    """Return, for each output, how far the package is from the PyTorch outputs it carries.

    Raises:
        InputError: the package has no readable reference, or names no output.
        RuntimeCheckError: the provider was not used, or the model does not load or run.
    """
    if not any(graph.outputs for graph in manifest.graphs):
        raise InputError(f"the manifest in {folder} names no output: export the package again.")
    runtime = find_runtime(provider)
    tolerance = for_dtype(manifest.dtype, runtime.arithmetic)
    reference = read_reference(folder)
    found: list[OutputParity] = []
    for graph in manifest.graphs:
        session = runtime.open(folder / graph.path, optimization)
        samples: dict[str, list[_Sample]] = {name: [] for name in graph.outputs}
        for case in range(len(graph.probe.cases) + graph.probe.real):
            feeds = reference.feeds(graph, case)
            for name, output in session.run(graph.outputs, feeds).items():
                samples[name].append(_sample(graph, case, name, output, feeds, reference))
        found += [_compare(graph, name, optimization, s, tolerance) for name, s in samples.items()]
    return found


def check_generation(
    folder: Path, manifest: Manifest, provider: str = "cpu", optimization: str = LEVEL
) -> Generation | None:
    """Return how the package decodes the prompts it carries; None if it carries none.

    Raises:
        RuntimeCheckError: the provider was not used, or the model does not load or run.
    """
    stored = read_reference(folder).greedy()
    if not stored:
        return None
    runtime = find_runtime(provider)
    tolerance = for_dtype(manifest.dtype, runtime.arithmetic)
    served = [
        (graph, runtime.open(folder / path, optimization))
        for path, graph in manifest.served().items()
    ]
    return replay(served, stored, optimization, tolerance.tie, tolerance.tokens)


def check_nodes(
    folder: Path, manifest: Manifest, provider: str, outputs: Sequence[OutputParity]
) -> list[Divergence]:
    """Return where graphs leave PyTorch: those that fail, and of a quantized package all.

    Raises:
        RuntimeCheckError: a graph does not run with its inner values as outputs.
    """
    runtime = find_runtime(provider)
    tolerance = for_dtype(manifest.dtype, runtime.arithmetic)
    reference = read_reference(folder)
    found = []
    for graph in manifest.graphs:
        failed = next((o for o in outputs if o.graph == graph.path and not o.ok), None)
        if failed or tolerance.real:
            level = failed.optimization if failed else runtime.levels[-1]
            case = failed.worst.case if failed and failed.worst else None
            found.append(
                locate(
                    folder, graph, reference, runtime, level, tolerance.node, tolerance.real, case
                )
            )
    return [divergence for divergence in found if divergence]


def _sample(
    graph: GraphRecord,
    case: int,
    name: str,
    output: Array,
    feeds: Mapping[str, Array],
    reference: Reference,
) -> _Sample:
    real, of = case >= len(graph.probe.cases), len(graph.outputs)
    step, width = kept(output.shape, of, name, real)
    mask = feeds.get("attention_mask")
    counted = np.ones(output.shape[:-1], bool)
    if mask is not None and mask.shape[0] == len(output) and output.ndim == 3:
        counted = mask[:, -output.shape[1] :] != 0
    return _Sample(
        case, real, reference.tensors.get(reference_key(graph.path, case, name)),
        stored_elements(output, of, name, real), output.shape, step, width,
        counted.reshape(-1)[::step] if width > 1 else counted,
    )  # fmt: skip


def _compare(
    graph: GraphRecord,
    name: str,
    optimization: str,
    samples: list[_Sample],
    tolerance: Tolerance,
) -> OutputParity:
    compared = sum(s.got.size for s in samples)
    elements = sum(int(np.prod(s.shape)) for s in samples)

    def result(
        reason: str | None,
        worst: Worst | None = None,
        max_abs: float | None = None,
        max_rel: float | None = None,
        alike: float | None = None,
        quality: Quality | None = None,
    ) -> OutputParity:
        return OutputParity(
            graph.path, name, optimization, max_abs, max_rel, alike, quality, worst, compared,
            elements, tolerance.atol, tolerance.rtol, reason is None, reason, cases,
        )  # fmt: skip

    cases: tuple[CaseParity, ...] = ()
    if not compared:
        return result("there is nothing to compare: no case, or an empty output")
    for sample in samples:
        if sample.expected is None:
            return result(f"the package has no reference for case {sample.case}")
        if sample.expected.shape != sample.got.shape:
            return result(
                f"case {sample.case}: {sample.expected.size} reference elements, but the output of "
                f"shape {list(sample.shape)} has {sample.got.size} to compare"
            )
    tolerance = tolerance.for_size(_rms(samples))
    cases = tuple(_case(name, sample, tolerance) for sample in samples)
    real = [case for case in cases if case.real and case.worst] or cases
    judged = real if tolerance.real else cases
    told = [c.worst for c in cases if c.worst and (c in judged or c.max_abs is None)]
    worst = max(told, key=lambda w: _used(w, tolerance))
    numbers = {case.case for case in judged}
    expected, got = (
        np.concatenate([getattr(s, of) for s in samples if s.case in numbers]).astype(np.float64)
        for of in ("expected", "got")
    )
    if any(case.max_abs is None for case in cases):
        wrong = sum(
            (~np.isfinite(_difference(np.asarray(s.expected), s.got, tolerance)[0])).sum()
            for s in samples
        )
        return result(f"NaN or infinity in {wrong} of {compared} elements", worst)
    difference, bound = _difference(expected, got, tolerance)
    known = [c.quality for c in real if c.quality]
    quality = Quality.mean(known) if known else None
    alike = cosine(expected, got)
    known_data = judged[0].real or not tolerance.real
    least = tolerance.cosine if known_data else min(tolerance.cosine, DRAWN)
    reason: str | None = None
    if (difference > bound).any():
        reason = f"{(difference > bound).sum()} of {compared} elements are out of tolerance"
    elif np.abs(expected).max() > NOISE and alike < least:
        reason = f"cosine {alike:.6f} is below {least}"
    elif quality and known_data and quality.agreement < tolerance.agreement:
        reason = (
            f"the first class is PyTorch's in {quality.agreement:.2%} of {quality.positions} "
            f"positions, {tolerance.agreement:.0%} are needed"
        )
    elif quality and known_data and quality.kl > tolerance.kl:
        reason = f"the mean KL divergence {quality.kl:.2g} is above {tolerance.kl}"
    max_rel = max(c.max_rel or 0 for c in judged)
    return result(reason, worst, float(difference.max()), max_rel, alike, quality)


def _rms(samples: list[_Sample]) -> float:
    """Return the root mean square of what is expected, over all cases."""
    squares = [np.square(np.asarray(s.expected, np.float64)) for s in samples]
    return float(np.sqrt(np.concatenate(squares).mean()))


def _case(name: str, sample: _Sample, tolerance: Tolerance) -> CaseParity:
    """Return how one output is on one case whose reference has its size."""
    assert sample.expected is not None
    expected, got = sample.expected.astype(np.float64), sample.got.astype(np.float64)
    if not expected.size:
        return CaseParity(sample.case, sample.real, 0.0, 0.0, None, None, None)
    difference, bound = _difference(expected, got, tolerance)
    finite = np.isfinite(difference)
    at = int(np.argmax(np.where(finite, difference, np.inf) / bound))
    run, inside = divmod(at, sample.width)
    index = np.unravel_index(run * sample.step * sample.width + inside, sample.shape)
    place = tuple(int(i) for i in index)
    worst = Worst(sample.case, place, float(expected[at]), float(got[at]))
    if not finite.all():
        return CaseParity(sample.case, sample.real, None, None, None, None, worst)
    large = np.abs(expected) > tolerance.atol
    max_rel = float((difference[large] / np.abs(expected[large])).max(initial=0))
    quality = None
    if is_logits(name) and sample.width > 1:
        first, second = (x.reshape(-1, sample.width) for x in (expected, got))
        quality = compare_scores(first, second, sample.counted, tolerance.tie)
    alike = cosine(expected, got)
    largest = float(difference.max())
    return CaseParity(sample.case, sample.real, largest, max_rel, alike, quality, worst)


def _difference(expected: Array, got: Array, tolerance: Tolerance) -> tuple[Array, Array]:
    """Return by how much elements differ, and by how much they may."""
    with np.errstate(invalid="ignore"):  # infinity minus infinity is NaN, and told by the caller
        difference = np.abs(got - expected)
    size = np.abs(np.where(np.isfinite(difference), expected, 0))
    return difference, tolerance.atol + tolerance.rtol * size


def _used(worst: Worst, tolerance: Tolerance) -> float:
    """Return how much of its tolerance an element uses; all and more if it is no number."""
    difference, bound = _difference(np.array(worst.expected), np.array(worst.got), tolerance)
    return float(difference / bound) if np.isfinite(difference) else np.inf
