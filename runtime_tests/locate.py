"""Where a package leaves PyTorch: the first node of a graph whose output is out of tolerance."""

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ffmerge.models.manifest import GraphRecord
from ffmerge.models.probe import Array
from ffmerge.models.trace import sampled, traced_feeds
from ffmerge.runtime_tests.reference import Reference
from ffmerge.runtime_tests.runtimes.base import Runtime
from ffmerge.runtime_tests.runtimes.registry import find_runtime

if TYPE_CHECKING:  # a device needs onnx only where something is off
    import onnx_ir as ir

STEP = 48  # values that are looked at in one run: what bounds the memory
# Rounding flips where a sum is a bit off, and flips more behind it: a quantized graph may be off by
# this much more than it was before, and by no more than the second number.
GROWTH, MOST = 4, 0.3
_LARGEST = 1e30  # a mask's minus infinity is no number to compare


@dataclass(frozen=True)
class Divergence:
    """The first value that is off, in the order of the nodes, on one runtime.

    ``node`` computes ``value`` in ``layer``, the PyTorch module. ``difference`` is the size of
    the difference over the size of the value, ``bound`` what it may be; ``before`` is the last
    value that was right, and ``tensors`` the weights that are read between the two. ``judge``
    gave the right values: "PyTorch", as the package stores them, or a runtime on the same graph.
    """

    graph: str
    optimization: str
    node: str
    op: str
    value: str
    layer: str
    tensors: tuple[str, ...]
    before: str | None
    difference: float
    bound: float
    judge: str

    def __str__(self) -> str:
        """Return it as one sentence."""
        tensors = f", which reads {', '.join(self.tensors)}" * bool(self.tensors)
        where = f" in {self.layer}" * bool(self.layer)
        return (
            f"{self.graph} ({self.optimization}) leaves {self.judge} at {self.op} node "
            f"{self.node}{where}{tensors}: difference {self.difference:.2g} of the value's size, "
            f"{self.bound:.2g} allowed"
        )


def locate(
    folder: Path,
    graph: GraphRecord,
    reference: Reference,
    runtime: Runtime,
    optimization: str,
    bound: float,
    rounded: bool = False,
    case: int | None = None,
) -> Divergence | None:
    """Return the first node whose output is off, or None if none is.

    The judge is what PyTorch gave at the nodes, stored with the package, by weights that were
    ``rounded`` to the package's precision. Where that finds
    nothing on another runtime than the CPU, it is ONNX Runtime on the CPU without optimization,
    on the inputs of ``case``. Values are put out ``STEP`` at a time, so nodes that a runtime
    would fuse are not; a graph of two branches is looked at in its parts.

    Raises:
        RuntimeCheckError: the runtime does not run the graph with more outputs.
    """
    trace = reference.trace(graph)
    known = {value.name: value for value in trace.values} if trace else {}
    with _opened(folder, graph) as opened:
        layers = {name: value.layer for name, value in known.items()}
        search = _Search(opened, optimization, bound, rounded, layers)
        found = None
        if trace:
            right = dict(zip(known, trace.samples, strict=True))
            feeds = traced_feeds(graph.probe, reference.real(graph))

            def samples(names: Sequence[str]) -> dict[str, Array]:
                got = opened.run(runtime, optimization, names, feeds)
                same = {n: x for n, x in got.items() if x.shape == known[n].shape}
                return {n: sampled(x) for n, x in same.items()}

            names = [name for name in opened.values if name in right]
            found = search.first(names, lambda step: right, samples, "PyTorch")
        if found is None and runtime.name != "cpu" and case is not None:
            cpu, inputs = find_runtime("cpu"), reference.feeds(graph, case)
            found = search.first(
                list(opened.values),
                lambda step: opened.run(cpu, cpu.levels[0], step, inputs),
                lambda step: opened.run(runtime, optimization, step, inputs),
                f"{cpu.requested} ({cpu.levels[0]})",
            )
        return found


@contextmanager
def _opened(folder: Path, graph: GraphRecord) -> Iterator["_Graph"]:
    """Yield a graph whose inner values can be put out, beside a copy of its data.

    A link would not do: onnx and this package refuse data under a second name.
    """
    import onnx_ir as ir

    path = folder / graph.path
    with tempfile.TemporaryDirectory(prefix="ffmerge-") as temporary:
        for data in path.parent.glob("*.onnx_data"):
            shutil.copyfile(data, Path(temporary) / data.name)
        yield _Graph(graph.path, ir.load(path), Path(temporary) / path.name)


@dataclass(frozen=True)
class _Graph:
    name: str
    model: Any
    path: Path

    @property
    def values(self) -> dict[str, "ir.Value"]:
        """The float values that nodes outside of branches compute, in order."""
        import onnx_ir as ir

        kinds = {ir.DataType.FLOAT, ir.DataType.FLOAT16, None}
        return {
            str(v.name): v
            for node in self.model.graph
            for v in node.outputs
            if v.name and v.dtype in kinds
        }

    def run(
        self, runtime: Runtime, optimization: str, names: Sequence[str], feeds: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Return the values of these names, put out by a copy of the graph."""
        import onnx_ir as ir

        outputs, values = self.model.graph.outputs, self.values
        own = list(outputs)
        try:
            outputs[:] = [values[name] for name in names]
            ir.save(self.model, self.path)
        finally:
            outputs[:] = own
        return runtime.open(self.path, optimization).run(names, feeds)


@dataclass(frozen=True)
class _Search:
    graph: _Graph
    optimization: str
    bound: float
    rounded: bool
    layers: Mapping[str, str]

    def first(
        self,
        names: Sequence[str],
        right: Callable[[Sequence[str]], Mapping[str, Array]],
        got: Callable[[Sequence[str]], Mapping[str, Array]],
        judge: str,
    ) -> Divergence | None:
        """Return the first of the values that is not ``right``."""
        good: dict[str, None] = {}
        bound = self.bound
        for start in range(0, len(names), STEP):
            step = names[start : start + STEP]
            wanted = right(step)
            for name, value in got(step).items():
                off = relative(wanted[name], value)
                if off > bound:
                    return self._told(name, list(good), off, bound, judge)
                good[name] = None
                if self.rounded:
                    bound = max(bound, min(GROWTH * off, MOST))
        return None

    def _told(
        self, name: str, good: Sequence[str], off: float, bound: float, judge: str
    ) -> Divergence:
        node = self.graph.values[name].producer()
        assert node is not None
        return Divergence(
            self.graph.name, self.optimization, str(node.name), node.op_type, name,
            self.layers.get(name, ""), _weights(node, set(good)), good[-1] if good else None,
            off, bound, judge,
        )  # fmt: skip


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
    off = float(np.linalg.norm(got - expected))
    return off / size if size > 1e-6 * np.sqrt(max(len(expected), 1)) else 0.0
