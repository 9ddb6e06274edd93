"""Does the package compute what PyTorch computed? Every output, element by element.

:func:`parity_of` runs one graph on all its cases and keeps of each output the elements that the
package stores of PyTorch's; :func:`_judged` then holds an output against its tolerance. In float64.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ffmerge.errors import InputError
from ffmerge.models.kv_cache import is_present, keeps_cache
from ffmerge.models.manifest import GraphRecord, Manifest
from ffmerge.models.probe import Array, is_logits, kept, stored_elements
from ffmerge.runtime_tests.fixed import run_rows
from ffmerge.runtime_tests.quality import (
    Quality,
    Scores,
    compare_scores,
    cosine,
    mean,
    of_all,
    of_best,
)
from ffmerge.runtime_tests.reference import Reference, read_reference
from ffmerge.runtime_tests.results import CaseParity, OutputParity, Worst
from ffmerge.runtime_tests.runtimes.base import LEVEL, Session
from ffmerge.runtime_tests.runtimes.registry import find_runtime
from ffmerge.runtime_tests.tolerance import DRAWN, NOISE, Tolerance, for_dtype, row_of


@dataclass(frozen=True)
class _Sample:
    """The stored elements of one output of one case, and the shape they were taken from.

    Of ``width`` elements each, every ``step``-th. ``read`` says which are no padding's: others are
    0 here and there. ``scores`` are those of classes, if it has any, and ``counted`` says which of
    their positions are no padding.
    """

    case: int
    real: bool
    expected: Array | None
    got: Array
    read: Array
    shape: tuple[int, ...]
    step: int
    width: int
    scores: Scores | None
    counted: Array


def check_parity(
    folder: Path, manifest: Manifest, provider: str = "cpu", optimization: str = LEVEL
) -> list[OutputParity]:
    """Return, for each output, how far the package is from the PyTorch outputs it carries.

    Of several precisions or profiles that is all of them.

    Raises:
        InputError: the package has no readable reference, or names no output.
        RuntimeCheckError: the provider was not used, or the model does not load or run.
    """
    refuse_without_outputs(folder, manifest)
    runtime, reference = find_runtime(provider), read_reference(folder, manifest)
    found: list[OutputParity] = []
    for kind in manifest.kinds:
        one = manifest.of_kind(kind)
        tolerance = for_dtype(row_of(one), runtime.arithmetic)
        for graph in one.graphs:
            session = runtime.open(folder / graph.path, optimization)
            found += parity_of(graph, session, reference, optimization, tolerance)
    return found


def refuse_without_outputs(folder: Path, manifest: Manifest) -> None:
    """Raise InputError if there is nothing to compare."""
    if not any(graph.outputs for graph in manifest.graphs):
        raise InputError(f"the manifest in {folder} names no output: export the package again.")


def parity_of(
    graph: GraphRecord,
    session: Session,
    reference: Reference,
    optimization: str,
    tolerance: Tolerance,
) -> list[OutputParity]:
    """Return, for each output of a graph, how far it is from PyTorch's."""
    samples: dict[str, list[_Sample]] = {name: [] for name in graph.outputs}
    for case in range(len(graph.probe.cases) + graph.probe.real):
        feeds = reference.feeds(graph, case)
        for name, output in run_rows(graph, session, feeds).items():
            samples[name].append(_sample(graph, case, name, output, feeds, reference))
    found = []
    for name, parts in samples.items():
        bounds = tolerance.for_rounding(graph.rounding.get(name, 0.0))
        found.append(_judged(graph, name, optimization, parts, bounds))
    return found


def _sample(
    graph: GraphRecord,
    case: int,
    name: str,
    output: Array,
    feeds: Mapping[str, Array],
    reference: Reference,
) -> _Sample:
    real, of = case >= len(graph.probe.cases), len(graph.outputs)
    expected = reference.expected(graph, case, name)
    step, width = kept(output.shape, of, name, real)
    mask = feeds.get("attention_mask")
    counted: Array = np.ones(output.shape[:-1], bool)
    if mask is not None and mask.shape[0] == len(output) and output.ndim == 3:
        counted = mask[:, -output.shape[1] :] != 0
    counted = counted.reshape(-1)
    got = stored_elements(output, of, name, real)
    comparable = expected is not None and expected.shape == got.shape
    unread, read = _unread(graph, name, output.shape, mask), np.ones(got.shape, bool)
    if unread is not None and comparable:
        assert expected is not None
        read = ~(stored_elements(unread, of, name, real) & np.isfinite(got))
        got, expected = np.where(read, got, 0), np.where(read, expected, 0)
    scores = None
    classes, best = reference.best(graph, case, name)
    if comparable and classes is not None and best is not None:
        scores = of_best(best, output, classes)
    elif comparable and is_logits(name) and width > 1:
        assert expected is not None
        counted = counted[::step]
        scores = of_all(expected.reshape(-1, width), got.reshape(-1, width))
    judges = real and not graph.probe.made
    return _Sample(case, judges, expected, got, read, output.shape, step, width, scores, counted)


def _unread(
    graph: GraphRecord, name: str, shape: Sequence[int], mask: Array | None
) -> Array | None:
    """Return which elements nobody reads, if any: what a model makes of padding.

    An encoder's states of it are masked wherever they are used, and rounding makes more of them
    than of others (four times in int8, on a trained sentence encoder). Of a decoder no later token
    reads it; before the first token, and further behind the last than a window reaches, it has
    nothing to attend to, and each of PyTorch's own kernels makes something else of it.
    """
    if mask is None or mask.ndim != 2:
        return None
    nothing = mask == 0
    if keeps_cache(graph.outputs):
        if is_present(name) and len(shape) == 4 and shape[2] == nothing.shape[1]:
            nothing = nothing[:, None, :, None]
        elif is_logits(name) and len(shape) == 3:
            nothing = nothing[:, nothing.shape[1] - shape[1] :, None]
        else:
            return None
    elif len(shape) == 3 and tuple(shape[:2]) == mask.shape:
        nothing = nothing[:, :, None]
    else:
        return None
    return np.broadcast_to(nothing, shape)


def _judged(
    graph: GraphRecord,
    name: str,
    optimization: str,
    samples: Sequence[_Sample],
    tolerance: Tolerance,
) -> OutputParity:
    """Return what the samples of one output say, and whether they are within tolerance.

    A quantized model is judged by its real case, if it has one.
    """
    verdict = _undecided(graph, name, optimization, samples, tolerance)
    if problem := _incomparable(samples):
        return replace(verdict, reason=problem)
    if is_present(name):
        tolerance = tolerance.for_cache()
    tolerance = tolerance.for_size(_rms(samples))
    verdict = replace(verdict, atol=tolerance.atol, rtol=tolerance.rtol)
    cases = tuple(_compare(sample, tolerance) for sample in samples)
    judged, real = cases, _real(cases)
    if tolerance.real:
        judged = real
    worst = _worst(judged, cases, tolerance)
    verdict = replace(verdict, worst=worst, cases=cases)
    if wrong := _count_wrong(samples):
        return replace(verdict, reason=f"NaN or infinity in {wrong} of {verdict.compared} elements")
    expected, got = _joined(samples, judged)
    alike, quality = cosine(expected, got), mean([case.quality for case in real if case.quality])
    difference, bound = _difference(expected, got, tolerance)
    off = int((difference > bound).sum())
    if off > tolerance.spared(difference.size):
        reason: str | None = f"{off} of {difference.size} elements are out of tolerance"
    else:
        least, scores = tolerance.cosine, quality
        if tolerance.real and not judged[0].real:
            # rounding is made for real data: on drawn inputs it says little of a quantized model
            least, scores = min(least, DRAWN), None
        if np.abs(expected).max() <= NOISE:
            least = -1.0
        reason = _unlike(alike, least, scores, tolerance)
    return replace(
        verdict,
        max_abs=float(difference.max()),
        max_rel=max(case.max_rel or 0 for case in judged),
        cosine=alike,
        quality=quality,
        ok=reason is None,
        reason=reason,
        out=off,
    )


def _undecided(
    graph: GraphRecord,
    name: str,
    optimization: str,
    samples: Sequence[_Sample],
    tolerance: Tolerance,
) -> OutputParity:
    """Return the verdict on an output as it is before anything is compared: not ok."""
    return OutputParity(
        graph=graph.path,
        name=name,
        optimization=optimization,
        max_abs=None,
        max_rel=None,
        cosine=None,
        quality=None,
        worst=None,
        compared=sum(int(sample.read.sum()) for sample in samples),
        elements=sum(int(np.prod(sample.shape)) for sample in samples),
        atol=tolerance.atol,
        rtol=tolerance.rtol,
        ok=False,
        reason=None,
        cases=(),
    )


def _real(cases: tuple[CaseParity, ...]) -> tuple[CaseParity, ...]:
    """Return the cases whose inputs came with data; all if none has any element of this output."""
    real = tuple(case for case in cases if case.real and case.worst)
    return real or cases


def _unlike(
    alike: float, least: float, quality: Quality | None, tolerance: Tolerance
) -> str | None:
    """Return why an output points elsewhere or its scores are not good enough, None if they are."""
    if alike < least:
        return f"cosine {alike:.6f} is below {least}"
    if quality is None:
        return None
    if quality.agreement < tolerance.agreement:
        return (
            f"the first class is PyTorch's in {quality.agreement:.2%} of {quality.positions} "
            f"positions, {tolerance.agreement:.0%} are needed"
        )
    if not quality.kl <= tolerance.kl:  # it may be NaN
        return f"the mean KL divergence {quality.kl:.2g} is above {tolerance.kl}"
    return None


def _worst(
    judged: Sequence[CaseParity], cases: Sequence[CaseParity], tolerance: Tolerance
) -> Worst | None:
    """Return the element that is worst in the cases that judge, and in those that are broken."""
    found, most = None, -1.0
    for case in cases:
        if case.worst and (case in judged or case.max_abs is None):
            used = _used(case.worst, tolerance)
            if used > most:
                found, most = case.worst, used
    return found


def _joined(samples: Sequence[_Sample], judged: Sequence[CaseParity]) -> tuple[Array, Array]:
    """Return what is expected and what came, of all cases that judge."""
    expected, got, numbers = [], [], {case.case for case in judged}
    for sample in samples:
        if sample.case in numbers and sample.expected is not None:
            expected.append(sample.expected)
            got.append(sample.got)
    return np.concatenate(expected).astype(np.float64), np.concatenate(got).astype(np.float64)


def _incomparable(samples: Sequence[_Sample]) -> str | None:
    """Return why the samples of an output cannot be compared with PyTorch's, None if they can."""
    if not any(sample.got.size for sample in samples):
        return "there is nothing to compare: no case, or an empty output"
    for sample in samples:
        if sample.expected is None:
            return f"the package has no reference for case {sample.case}"
        if sample.expected.shape != sample.got.shape:
            return (
                f"case {sample.case}: {sample.expected.size} reference elements, but the output of "
                f"shape {list(sample.shape)} has {sample.got.size} to compare"
            )
    return None


def _compare(sample: _Sample, tolerance: Tolerance) -> CaseParity:
    """Return how one output is on one case whose reference has its size."""
    assert sample.expected is not None
    expected, got = sample.expected.astype(np.float64), sample.got.astype(np.float64)
    if not expected.size:
        return CaseParity(sample.case, sample.real, 0.0, 0.0)
    difference, bound = _difference(expected, got, tolerance)
    finite = np.isfinite(difference)
    at = int(np.argmax(np.where(finite, difference, np.inf) / bound))
    run, inside = divmod(at, sample.width)
    index = np.unravel_index(run * sample.step * sample.width + inside, sample.shape)
    element = tuple(int(i) for i in index)
    worst = Worst(sample.case, element, float(expected[at]), float(got[at]))
    if not finite.all():
        return CaseParity(sample.case, sample.real, worst=worst)
    large = np.abs(expected) > tolerance.atol
    max_rel = float((difference[large] / np.abs(expected[large])).max(initial=0))
    quality = None
    if sample.scores:
        quality = compare_scores(sample.scores, sample.counted, tolerance.tie)
    largest, alike = float(difference.max()), cosine(expected, got)
    return CaseParity(sample.case, sample.real, largest, max_rel, alike, quality, worst)


def _rms(samples: Sequence[_Sample]) -> float:
    """Return the root mean square of what is expected, over all cases."""
    squares = [np.square(np.asarray(s.expected, np.float64)[s.read]) for s in samples]
    return float(np.sqrt(np.concatenate(squares).mean()))


def _count_wrong(samples: Sequence[_Sample]) -> int:
    """Return how many elements are not finite, here or there."""
    wrong = 0
    for sample in samples:
        finite = np.isfinite(np.asarray(sample.expected)) & np.isfinite(sample.got)
        wrong += int((~finite).sum())
    return wrong


def _difference(expected: Array, got: Array, tolerance: Tolerance) -> tuple[Array, Array]:
    """Return by how much elements differ, and by how much they may."""
    with np.errstate(invalid="ignore"):  # infinity minus infinity is NaN, and told by the caller
        difference = np.abs(got - expected)
    size = np.abs(np.where(np.isfinite(difference), expected, 0))
    return difference, tolerance.atol + tolerance.rtol * size


def _used(worst: Worst, tolerance: Tolerance) -> float:
    """Return how much of its tolerance an element uses; all and more if it is no number."""
    difference, bound = _difference(np.array(worst.expected), np.array(worst.got), tolerance)
    if not np.isfinite(difference):
        return np.inf
    return float(difference / bound)
