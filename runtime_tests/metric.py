"""The task metric of a package, and of the texts that it writes, by the sessions it runs in."""

from pathlib import Path

from ffmerge.models.examples import Examples
from ffmerge.models.manifest import Manifest, MetricResult
from ffmerge.models.metrics import for_task, labels_of
from ffmerge.models.probe import Array
from ffmerge.models.tasks import base
from ffmerge.runtime_tests.decode import Served, decoder
from ffmerge.runtime_tests.fixed import run_rows, without_padding
from ffmerge.runtime_tests.translation import measure_chrf

BATCH = 8  # examples per run
_TARGETS = {"labels", "decoder_input_ids"}  # what an encoder-decoder is measured on


def measure_metric(served: Served, manifest: Manifest, examples: Examples) -> MetricResult | None:
    """Return the task metric of a package on examples; None if they lack what it needs."""
    task, metric = base(manifest.task), for_task(manifest.task)
    needed = {"labels"}
    if len(served) > 1:
        needed = _TARGETS
    elif task == "text-generation":
        needed = set()
    total, count, seen = 0.0, 0, 0
    for batch in examples.batches(BATCH):
        if metric is None or needed - batch.keys():
            return None
        scores = _scores(served, batch)
        part, labels = metric.add(scores, labels_of(task, batch))
        total, count, seen = total + part, count + labels, seen + len(scores)
    if metric is None:
        return None
    return MetricResult(metric.name, metric.value(total, count), seen)


def _scores(served: Served, batch: dict[str, Array]) -> Array:
    """Run the whole model on a batch: its one graph, or encoder and decoder."""
    if len(served) > 1:
        return decoder(served, batch)(batch["decoder_input_ids"])
    graph, session = served[0]
    outputs = run_rows(graph, session, graph.probe.complete(batch))
    outputs = without_padding(graph, outputs, batch)
    return outputs.get("logits", next(iter(outputs.values())))


def writes(manifest: Manifest) -> bool:
    """Tell whether a package writes a text to another one."""
    return base(manifest.task) == "text2text-generation" and len(manifest.served()) > 1


def measure_texts(folder: Path, served: Served, examples: Examples) -> MetricResult | None:
    """Return chrF of what the package writes; None if the examples have no texts to compare."""
    batches = [batch for batch in examples.batches(BATCH) if batch.keys() >= _TARGETS]
    if not batches:
        return None
    return measure_chrf(folder, served, batches)
