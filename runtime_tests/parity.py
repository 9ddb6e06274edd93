"""Does the package compute what PyTorch computed? Every output, element by element."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from ffmerge.errors import InputError
from ffmerge.models.manifest import REFERENCE, GraphRecord, Manifest, reference_key
from ffmerge.models.probe import Array, stored_elements, stride
from ffmerge.runtime_tests.runtimes.base import LEVEL
from ffmerge.runtime_tests.runtimes.registry import find_runtime
from ffmerge.runtime_tests.tolerance import NOISE, Tolerance, for_dtype


@dataclass(frozen=True)
class Worst:
    """The element that uses most of its tolerance; ``index`` is in the full output."""

    case: int
    index: tuple[int, ...]
    expected: float
    got: float


@dataclass(frozen=True)
class OutputParity:
    """One output of a graph over all cases, at one optimization level.

    ``max_rel`` is over the elements whose expected size exceeds ``atol``. The differences are
    None when they could not be computed; ``reason`` then says why, as it does whenever not
    ``ok``. ``compared`` of ``elements`` were stored with the package.
    """

    graph: str
    name: str
    optimization: str
    max_abs: float | None
    max_rel: float | None
    cosine: float | None
    worst: Worst | None
    compared: int
    elements: int
    atol: float
    rtol: float
    ok: bool
    reason: str | None


@dataclass(frozen=True)
class _Sample:
    """The stored elements of one output of one case, and the shape they were taken from."""

    expected: Array | None
    got: Array
    shape: tuple[int, ...]


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
    reference = _load_reference(folder / REFERENCE)
    found: list[OutputParity] = []
    for graph in manifest.graphs:
        session = runtime.open(folder / graph.path, optimization)
        samples: dict[str, list[_Sample]] = {name: [] for name in graph.outputs}
        for case in range(len(graph.probe.cases)):
            outputs = session.run(graph.outputs, graph.probe.draw(case))
            for name, output in outputs.items():
                expected = reference.get(reference_key(graph.path, case, name))
                got = stored_elements(output, len(outputs))
                samples[name].append(_Sample(expected, got, output.shape))
        found += [_compare(graph, name, optimization, s, tolerance) for name, s in samples.items()]
    return found


def _load_reference(path: Path) -> dict[str, Array]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read: {error}. Export the package again.") from error


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
        cosine: float | None = None,
    ) -> OutputParity:
        return OutputParity(
            graph.path, name, optimization, max_abs, max_rel, cosine, worst, compared, elements,
            tolerance.atol, tolerance.rtol, reason is None, reason,
        )  # fmt: skip

    if not compared:
        return result("there is nothing to compare: no case, or an empty output")
    for case, sample in enumerate(samples):
        if sample.expected is None:
            return result(f"the package has no reference for case {case}")
        if sample.expected.shape != sample.got.shape:
            return result(
                f"case {case}: {sample.expected.size} reference elements, but the output of "
                f"shape {list(sample.shape)} has {sample.got.size} to compare"
            )
    expected = np.concatenate([s.expected for s in samples]).astype(np.float64)
    got = np.concatenate([s.got for s in samples]).astype(np.float64)
    with np.errstate(invalid="ignore"):  # infinity minus infinity is NaN, and told below
        difference = np.abs(got - expected)
    finite = np.isfinite(difference)
    bound = tolerance.atol + tolerance.rtol * np.abs(np.where(finite, expected, 0))
    at = int(np.argmax(np.where(finite, difference, np.inf) / bound))
    worst = _locate(at, graph, samples, float(expected[at]), float(got[at]))
    if not finite.all():
        return result(f"NaN or infinity in {(~finite).sum()} of {compared} elements", worst)

    large = np.abs(expected) > tolerance.atol
    max_rel = float((difference[large] / np.abs(expected[large])).max(initial=0))
    norms = np.linalg.norm(expected) * np.linalg.norm(got)
    cosine = float(expected @ got / norms) if norms else float(np.array_equal(expected, got))
    reason = None
    if (difference > bound).any():
        reason = f"{(difference > bound).sum()} of {compared} elements are out of tolerance"
    elif np.abs(expected).max() > NOISE and cosine < tolerance.cosine:
        reason = f"cosine {cosine:.6f} is below {tolerance.cosine}"
    return result(reason, worst, float(difference.max()), max_rel, cosine)


def _locate(
    at: int, graph: GraphRecord, samples: list[_Sample], expected: float, got: float
) -> Worst:
    case = 0
    while at >= samples[case].got.size:
        at -= samples[case].got.size
        case += 1
    shape = samples[case].shape
    flat = at * stride(int(np.prod(shape)), len(graph.outputs))
    index = tuple(int(i) for i in np.unravel_index(flat, shape))
    return Worst(case, index, expected, got)
