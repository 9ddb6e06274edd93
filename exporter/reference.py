"""``reference.safetensors``: what PyTorch gives, for whoever checks a package without PyTorch.

It holds the outputs of every graph on every case, the inputs of the real case with their labels,
samples of the values inside each graph, and ids of greedy decoding. ``runtime_tests/reference.py``
reads it; the keys are in ``models/manifest.py`` and ``models/trace.py``.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from ffmerge.exporter.graphs import Graph
from ffmerge.exporter.plan import Plan
from ffmerge.exporter.settle import has_large_pictures
from ffmerge.models import tasks
from ffmerge.models.examples import from_arrays
from ffmerge.models.float64 import rounded_off
from ffmerge.models.manifest import (
    LABELS,
    RTOL,
    MetricResult,
    best_keys,
    input_key,
    reference_key,
)
from ffmerge.models.metrics import for_task
from ffmerge.models.probe import (
    Array,
    best_classes,
    best_scores,
    keeps_best,
    stored_elements,
)
from ffmerge.models.read_once import read_once
from ffmerge.models.trace import GREEDY, TRACES, Description, Trace, described, joined, trace_key
from ffmerge.passes.weights.evaluate import score_for


def write_reference(
    path: Path, plan: Plan, files: Sequence[str], traces: Mapping[str, Trace]
) -> list[dict[str, float]]:
    """Store what the plan's graphs give in PyTorch; ``files`` are their paths.

    ``traces`` are by path, and may be of other precisions, too. Returns what float32 rounds off of
    each graph's outputs, by name; of a package without it nothing, as its own rounding is larger.
    """
    tensors = {f"{GREEDY}{name}": array for name, array in plan.greedy.items()}
    if has_labels(plan) and "labels" in plan.rows:
        tensors[LABELS] = plan.rows["labels"]
    traced: dict[str, list[Description]] = {}
    rounding: list[dict[str, float]] = []
    for graph, file in zip(plan.graphs, files, strict=True):
        real = plan.real.get(graph.name, {})
        if not graph.parts:  # one made of parts is given what its first part is
            tensors |= {input_key(file, name): array for name, array in real.items()}
        with read_once(plan.model):
            kept, most = _outputs(graph, file, real, "fp32" in plan.config.dtypes)
        tensors |= kept
        rounding.append(most)
    for file, trace in traces.items():
        traced[trace_key(file)] = described(trace)
        tensors[trace_key(file)] = joined(trace)
    _save(path, tensors, traced)
    return rounding


def _save(
    path: Path, tensors: Mapping[str, Array], traced: Mapping[str, Sequence[Description]]
) -> None:
    """Write the file, the same bytes for the same content: of several keys the order would vary."""
    about = {TRACES: json.dumps(traced)}
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, path, about)


def _outputs(
    graph: Graph, file: str, real: Mapping[str, Array], exactly: bool
) -> tuple[dict[str, Array], dict[str, float]]:
    """Return what is kept of the outputs of a graph on its drawn cases and on the real one.

    Where they are computed ``exactly`` too, also by how much each is off in float32, at most.
    """
    kept: dict[str, Array] = {}
    most = dict.fromkeys(graph.outputs if exactly else (), 0.0)
    drawn = len(graph.probe.cases)
    for case in range(drawn + graph.probe.real):
        feeds = graph.probe.feeds(case, real)
        outputs = graph.answer(feeds)
        for name, array in outputs.items():
            real_case = case >= drawn
            sample = stored_elements(array, len(outputs), name, real_case)
            kept[reference_key(file, case, name)] = sample
            if keeps_best(array.shape, len(outputs), name, real_case):
                classes = best_classes(array)
                scores = best_scores(array, classes).astype(np.float32)
                kept |= zip(best_keys(file, case, name), (classes, scores), strict=True)
        if most and (case == 0 or not has_large_pictures(feeds)):
            most = _rounded_off(graph, feeds, outputs, most)
    return kept, most


def _rounded_off(
    graph: Graph, feeds: Mapping[str, Array], outputs: Mapping[str, Array], most: dict[str, float]
) -> dict[str, float]:
    """Return by how much each output is off in float32, or ``most`` where that is more."""
    try:
        exact = graph.answer(feeds, exact=True)
    except RuntimeError:  # an operator has no float64 kernel: the usual bounds hold
        return {}
    found = {}
    for name, array in outputs.items():
        found[name] = max(most[name], rounded_off(array, exact[name], RTOL))
    return found


def has_labels(plan: Plan) -> bool:
    """Say whether the task has a metric, and the plan's rows what it takes."""
    kind, rows = tasks.base(plan.task), plan.rows
    if not rows or for_task(plan.task) is None:
        return False
    if kind == "text2text-generation" and "decoder_input_ids" not in rows:
        return False
    return "labels" in rows or kind == "text-generation"


def real_metric(plan: Plan) -> MetricResult | None:
    """Return PyTorch's task metric on the plan's rows; None if there is none."""
    metric = for_task(plan.task)
    if metric is None or not has_labels(plan):
        return None
    examples = from_arrays(plan.rows)
    value = score_for(plan.model, plan.task, examples, len(examples)).measure(plan.model)
    return MetricResult(metric.name, value, len(examples))
