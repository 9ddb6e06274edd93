"""What PyTorch gave at the nodes of a graph on one small case, as a package keeps it.

The exporter records it, and where a package differs from PyTorch ``runtime_tests/locate.py`` looks
in it for the first node that does.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ffmerge.models.probe import Array, Probe

SAMPLED = 64  # elements of each value
TRACED = 2  # rows of the case
TRACES = "traces"  # the key of what is said of all traces of a package
GREEDY = "greedy/"  # what names begin with that belong to greedy decoding
Description = tuple[str, Sequence[int], str]  # of a value: name, shape, layer


@dataclass(frozen=True)
class TracedValue:
    """A value of the graph by name, its shape, the PyTorch module that made it, and a sample."""

    name: str
    shape: tuple[int, ...]
    layer: str
    sample: Array


Trace = Sequence[TracedValue]  # in the order in which PyTorch made them


def sampled(value: Array) -> Array:
    """Return at most ``SAMPLED`` elements from all over a value, flat, in float32."""
    flat = value.reshape(-1)
    at = np.linspace(0, flat.size - 1, min(flat.size, SAMPLED)).astype(np.int64)
    return flat[at].astype(np.float32)


def described(trace: Trace) -> list[Description]:
    """Return what is told of each value of a trace beside its sample."""
    return [(value.name, value.shape, value.layer) for value in trace]


def joined(trace: Trace) -> Array:
    """Return the samples of a trace in one array."""
    return np.concatenate([*(value.sample for value in trace), np.empty(0, np.float32)])


def split(values: Sequence[Description], flat: Array) -> Trace:
    """Return the trace that :func:`described` and :func:`joined` were made of."""
    trace, start = [], 0
    for name, shape, layer in values:
        end = start + min(math.prod(shape), SAMPLED)
        trace.append(TracedValue(name, tuple(shape), layer, flat[start:end]))
        start = end
    return trace


def traced_feeds(probe: Probe, stored: Mapping[str, Array]) -> dict[str, Array]:
    """Return the inputs of the traced case: rows of the real one, else of the last drawn one."""
    feeds = probe.feeds(len(probe.cases) - (not probe.real), stored)
    cut = {spec.name for spec in probe.inputs if spec.shape[:1] == ("batch_size",)}
    feeds = {name: array[:TRACED] if name in cut else array for name, array in feeds.items()}
    return probe.runs(feeds)[0]


def trace_key(graph: str) -> str:
    """Return the name under which the trace of a graph is kept, with its values' names beside."""
    return f"{graph}/trace"
