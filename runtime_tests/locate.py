"""Where a package leaves PyTorch: the first node of a graph whose output is out of tolerance.

``validate.py`` asks for it when an output of a graph is wrong. The graph is saved again with its
inner values as outputs, and these are held against what they should be, in the order of the nodes.
"""

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ffmerge.models.manifest import GraphRecord
from ffmerge.models.probe import Array
from ffmerge.models.trace import Trace, sampled, traced_feeds
from ffmerge.runtime_tests.reference import Reference
from ffmerge.runtime_tests.results import Divergence
from ffmerge.runtime_tests.runtimes.base import Runtime
from ffmerge.runtime_tests.runtimes.registry import find_runtime

if TYPE_CHECKING:  # a device needs onnx only where something is off
    import onnx_ir as ir

STEP = 48  # values that are looked at in one run: what bounds the memory
_LARGEST = 1e30  # a mask's minus infinity is no number to compare

Values = Callable[[Sequence[str]], Mapping[str, Array]]  # from names


def locate(
    graph: GraphRecord,
    reference: Reference,
    runtime: Runtime,
    optimization: str,
    bound: float,
    case: int | None = None,
) -> Divergence | None:
    """Return the first node whose output is off, or None if none is.

    The judge is what PyTorch gave at the nodes, where the package stores that. Where it finds
    nothing on another runtime than the CPU, it is ONNX Runtime on the CPU without optimization, on
    the inputs of ``case``. Values are put out ``STEP`` at a time, so nodes that a runtime would
    fuse are not; a graph of two branches is looked at in its parts.

    Raises:
        RuntimeCheckError: the runtime does not run the graph with more outputs.
    """
    import onnx_ir as ir

    path = reference.folder / graph.path
    with tempfile.TemporaryDirectory(prefix="ffmerge-") as temporary:
        # a link would not do: onnx and this package refuse data under a second name
        for data in path.parent.glob("*.onnx_data"):
            shutil.copyfile(data, Path(temporary) / data.name)
        model, copy = ir.load(path), Path(temporary) / path.name
        run = partial(_run, model, copy)
        names = list(_inner_values(model))
        layers: dict[str, str] = {}
        judge, found = "PyTorch", None
        if trace := reference.trace(graph):
            layers = {value.name: value.layer for value in trace}
            feeds = traced_feeds(graph.probe, reference.real(graph))
            values = partial(run, runtime, optimization, feeds)
            found = _first_off_trace(names, trace, values, bound)
        if found is None and runtime.name != "cpu" and case is not None:
            cpu, inputs = find_runtime("cpu"), graph.probe.runs(reference.feeds(graph, case))[0]
            judge = f"{cpu.requested} ({cpu.levels[0]})"
            there = partial(run, runtime, optimization, inputs)
            found = _first_off(names, partial(run, cpu, cpu.levels[0], inputs), there, bound)
        if found is None:
            return None
        name, off, good = found
        node = _inner_values(model)[name].producer()
        assert node is not None
        return Divergence(
            graph.path, optimization, str(node.name), node.op_type, name, layers.get(name, ""),
            _weights(node, {*good}), next(reversed(good), None), off, bound, judge,
        )  # fmt: skip


def _first_off_trace(
    names: Sequence[str], trace: Trace, values: Values, bound: float
) -> tuple[str, float, list[str]] | None:
    """Return what :func:`_first_off` does, of the values that PyTorch's samples are known of."""
    right, shapes = {}, {}
    for value in trace:
        right[value.name], shapes[value.name] = value.sample, value.shape

    def samples(wanted: Sequence[str]) -> dict[str, Array]:
        got = {}
        for name, array in values(wanted).items():
            if array.shape == shapes[name]:
                got[name] = sampled(array)
        return got

    traced = [name for name in names if name in right]
    return _first_off(traced, lambda wanted: right, samples, bound)


def _first_off(
    names: Sequence[str], right: Values, got: Values, bound: float
) -> tuple[str, float, list[str]] | None:
    """Return the first value that is not ``right``, how far it is off, and those before it."""
    good: list[str] = []
    for start in range(0, len(names), STEP):
        step = names[start : start + STEP]
        wanted = right(step)
        for name, value in got(step).items():
            off = relative(wanted[name], value)
            if off > bound:
                return name, off, good
            good.append(name)
    return None


def _inner_values(model: Any) -> dict[str, "ir.Value"]:
    """Return the float values that nodes outside of branches compute, in order."""
    import onnx_ir as ir

    kinds = {ir.DataType.FLOAT, ir.DataType.FLOAT16, None}
    found = {}
    for node in model.graph:
        for value in node.outputs:
            if value.name and value.dtype in kinds:
                found[str(value.name)] = value
    return found


def _run(
    model: Any,
    path: Path,
    runtime: Runtime,
    optimization: str,
    feeds: Mapping[str, Array],
    names: Sequence[str],
) -> dict[str, Array]:
    """Return the values of these names, put out by a copy of the graph at ``path``."""
    import onnx_ir as ir

    outputs, values = model.graph.outputs, _inner_values(model)
    before = list(outputs)
    try:
        outputs[:] = [values[name] for name in names]
        ir.save(model, path)
    finally:
        outputs[:] = before
    return runtime.open(path, optimization).run(names, feeds)


def _weights(node: "ir.Node", good: set[str]) -> tuple[str, ...]:
    """Return the initializers between a node and the values known to be right."""
    found: dict[str, None] = {}
    left, seen = [node], {node}
    while left:
        for value in left.pop().inputs:
            if value is None or value.name in good:
                continue
            if value.is_initializer():
                found[str(value.name)] = None
            producer = value.producer()
            if producer is not None and producer not in seen:
                seen.add(producer)
                left.append(producer)
    return tuple(found)


def relative(expected: Array, got: Array) -> float:
    """Return the size of the difference of two arrays over that of the expected one.

    Elements that are no numbers in the expected one do not count; one that is none only in the
    other is infinitely far.
    """
    expected, got = np.asarray(expected, np.float64), np.asarray(got, np.float64)
    counted = np.isfinite(expected) & (np.abs(expected) < _LARGEST)
    expected, got = expected[counted], got[counted]
    if not np.isfinite(got).all():
        return float("inf")
    size = float(np.linalg.norm(expected))  # what is counted is flat
    if size <= 1e-6 * np.sqrt(max(len(expected), 1)):
        return 0.0
    return float(np.linalg.norm(got - expected)) / size
