"""What PyTorch gave at the nodes of a graph on one small case, as a package keeps it.

The exporter records it, and where a package differs from PyTorch ``runtime_tests/locate.py`` looks
in it for the first node that does.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ffmerge.models.probe import Array, Probe

SAMPLED = 64  # elements of each value
TRACED = 2  # rows of the case
TRACES = "traces"  # the key of what is said of all traces of a package
GREEDY = "greedy/"  # what names begin with that belong to greedy decoding


@dataclass(frozen=True)
class TracedValue:
    """A value of the graph by name, its shape, and the PyTorch module that made it."""

    name: str
    shape: tuple[int, ...]
    layer: str


@dataclass(frozen=True)
class Trace:
    """The values in the order in which PyTorch made them, and a sample of each."""

    values: tuple[TracedValue, ...]
    samples: tuple[Array, ...]


def sampled(value: Array) -> Array:
    """Return at most ``SAMPLED`` elements from all over a value, flat, in float32."""
    flat = value.reshape(-1)
    at = np.linspace(0, flat.size - 1, min(flat.size, SAMPLED)).astype(np.int64)
    return flat[at].astype(np.float32)


def split(values: Sequence[TracedValue], flat: Array) -> Trace:
    """Return the trace of values whose samples lie in one array."""
    sizes = [min(int(np.prod(value.shape)), SAMPLED) for value in values]
    return Trace(tuple(values), tuple(np.split(flat, np.cumsum(sizes)[:-1])))


def traced_feeds(probe: Probe, stored: Mapping[str, Array]) -> dict[str, Array]:
    """Return the inputs of the traced case: rows of the real one, else of the last drawn one."""
    feeds = probe.feeds(len(probe.cases) - (not probe.real), stored)
    cut = {spec.name for spec in probe.inputs if spec.shape[:1] == ("batch_size",)}
    return {name: array[:TRACED] if name in cut else array for name, array in feeds.items()}


def trace_key(graph: str) -> str:
    """Return the name under which the trace of a graph is kept, with its values' names beside."""
    return f"{graph}/trace"
