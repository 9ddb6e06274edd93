"""The task metric of a package on one runtime, and of texts that it writes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from ffmerge.models.manifest import GraphRecord, Manifest, MetricResult
from ffmerge.models.metrics import for_task, labels_of
from ffmerge.models.probe import Array
from ffmerge.models.tasks import base
from ffmerge.runtime_tests.runtimes.base import Session
from ffmerge.runtime_tests.runtimes.registry import find_runtime
from ffmerge.runtime_tests.translation import measure_chrf, why_not

BATCH = 8  # examples per run
OWN, GIVEN = "real rows of the package", "--data"  # what a metric was measured on


class Examples(Protocol):
    """Data to measure the task metric on."""

    def batches(self, size: int) -> Iterator[dict[str, Array]]:
        """Yield the graph's inputs, and ``labels`` where there are any."""
        ...


@dataclass(frozen=True)
class MetricRow:
    """The task metric of one ``stage`` of a model, computed by ``by``, on ``data``."""

    stage: str
    by: str
    data: str
    name: str
    value: float
    examples: int


def measure_metric(
    folder: Path, manifest: Manifest, provider: str, examples: Examples
) -> MetricResult | None:
    """Return the task metric of a package on examples; None if they lack what it needs."""
    task, metric = base(manifest.task), for_task(manifest.task)
    served = _served(folder, manifest, provider)
    total, count, seen = 0.0, 0, 0
    for batch in examples.batches(BATCH):
        targets = set() if len(served) == 1 else {"labels", "decoder_input_ids"}
        known = "labels" in batch or task == "text-generation"
        if metric is None or not known or targets - batch.keys():
            return None
        logits = _logits(served, batch)
        part, labels = metric.add(logits, labels_of(task, batch))
        total, count, seen = total + part, count + labels, seen + len(logits)
    return MetricResult(metric.name, metric.value(total, count), seen) if metric else None


def _served(folder: Path, manifest: Manifest, provider: str) -> list[tuple[GraphRecord, Session]]:
    runtime = find_runtime(provider)
    return [(graph, runtime.open(folder / path)) for path, graph in manifest.served().items()]


def _logits(served: Sequence[tuple[GraphRecord, Session]], batch: dict[str, Array]) -> Array:
    """Run the whole model on a batch: its one graph, or encoder and decoder."""
    feeds = batch
    for graph, session in served:
        outputs = session.run(graph.outputs, graph.probe.complete(feeds))
        if "last_hidden_state" in outputs and graph is not served[-1][0]:
            states = outputs["last_hidden_state"]
            mask = batch.get("attention_mask", np.ones(states.shape[:2]))
            ids = batch["decoder_input_ids"]
            feeds = {
                "input_ids": ids,
                "encoder_hidden_states": states,
                "encoder_attention_mask": mask,
            }
    return outputs["logits"] if "logits" in outputs else next(iter(outputs.values()))


def writes(manifest: Manifest) -> bool:
    """Tell whether a package writes a text to another one."""
    return base(manifest.task) == "text2text-generation" and len(manifest.served()) > 1


def measure_texts(
    folder: Path, manifest: Manifest, name: str, data: Mapping[str, Examples | None]
) -> Iterator[MetricRow]:
    """Yield chrF of what the package writes from each of the data, if it can be measured."""
    if not writes(manifest) or why_not(folder):
        return
    served = _served(folder, manifest, name)
    for which, examples in data.items():
        batches = examples.batches(BATCH) if examples else ()
        known = [b for b in batches if {"labels", "decoder_input_ids"} <= b.keys()]
        if known:
            found = measure_chrf(folder, served, known)
            yield MetricRow(manifest.dtype, name, which, *vars(found).values())
