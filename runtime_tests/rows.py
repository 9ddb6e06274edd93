"""What a merge cost and what it saved, as rows of words: for reports, the terminal and notebooks.

:func:`rows` is the table of before and after, :func:`output_rows` and :func:`runtime_rows` are
those of one validation. ``report.py`` makes pages of them, :func:`tables` what the terminal and
notebooks show. A cell is one line of text; behind a line break stands small print.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ffmerge.files import size_text
from ffmerge.models.manifest import Manifest
from ffmerge.models.metrics import ACCURACY, PERPLEXITY
from ffmerge.models.notebook import Table
from ffmerge.runtime_tests.results import (
    NOISE,
    MetricRow,
    OutputParity,
    ProviderResult,
    Validation,
    model_bytes,
    sharing,
)
from ffmerge.runtime_tests.words import (
    ABSENT,
    fraction_text,
    metric_text,
    number,
    signed,
    time_text,
    yes_or_no,
)

_RUNTIMES = ("runtime", "memory", "load", "first run", "median", "holds")
MOST_TIMES = 100  # of its own rounding that a model in float32 is off, at most
Cost = tuple[str, str, Callable[[Any], str], str]  # name, key of the summary, how to show it, note

_MEASURED = (
    "rss_bytes", "anonymous_bytes", "running_bytes", "load_s", "median_ms", "p95_ms",
    "tokens_per_s", "given", "threads",
)  # fmt: skip
_SIZES: tuple[Cost, ...] = (
    ("Size on disk", "bytes_on_disk", size_text, "graph and weights"),
    ("Parameters", "parameters", "{:,}".format, "each shared one counted once"),
    ("Memory", "rss_bytes", size_text, "resident, added by loading"),
    ("Memory, anonymous", "anonymous_bytes", size_text, "the part no file backs"),
    ("Memory, of files", "file_bytes", size_text, "the part that can be read again"),
    ("Memory, running", "running_bytes", size_text, "resident after the runs, {run}"),
)
_TIMES: tuple[Cost, ...] = (
    ("Load time", "load_s", lambda s: time_text(1e3 * s), "opening the session"),
    ("Latency, median", "median_ms", time_text, "after the first run, {run}"),
    ("Latency, p95", "p95_ms", time_text, "after the first run, {run}"),
    ("Tokens per second", "tokens_per_s", "{:,.1f}".format, "one sequence, with a cache"),
)


@dataclass(frozen=True)
class Row:
    """One line of the table, in words; ``verdict`` is better, worse, same or empty.

    ``values`` are the numbers before and after, for a picture.
    """

    name: str
    before: str | None
    after: str
    change: str
    verdict: str
    note: str
    values: tuple[float | None, float | None] = (None, None)


def summary(validation: Validation) -> dict[str, Any]:
    """Return what one package costs and is worth, on the first runtime that was measured.

    None is what was not measured.
    """
    cost, metric = validation.footprint, validation.metric
    return {
        "label": validation.label,
        "bytes_on_disk": model_bytes(validation.manifest),
        "parameters": validation.manifest.parameters,
        **{name: getattr(cost, name, None) for name in _MEASURED},
        "metric_name": getattr(metric, "name", None),
        "metric": getattr(metric, "value", None),
        "examples": getattr(metric, "examples", None),
        "max_abs": validation.max_abs,
        "file_bytes": getattr(cost, "file_bytes", None),
    }


def losses(stages: Sequence[MetricRow], max_abs: float | None) -> dict[str, Any] | None:
    """Return one metric along the way, or None where the original's and the merged one's lack.

    The method loss is from ``original`` to ``merged``, both in PyTorch (of what was merged already
    from the merged to the narrowed model), the export loss from
    ``merged`` to ``exported``, with ``max_abs`` the largest difference in any output. They are
    never added. ``exported`` is what was ``served`` on the same data, and None if nothing was:
    then only the largest difference tells the export loss.
    """
    known = {row.stage: row for row in stages}
    original, served = known.get("original"), known.get("served")
    merged = known.get("recovered", known.get("merged"))
    if "narrowed" in known:  # what was merged already is no original
        original, merged = known.get("merged"), known.get("recovered", known["narrowed"])
    name = getattr(merged or original, "name", None)
    if name is None:
        return None
    return {
        "name": name,
        "original": getattr(original, "value", None),
        "merged": getattr(merged, "value", None),
        "exported": getattr(served, "value", None),
        "max_abs": max_abs,
    }


def rows(
    before: Validation | None, after: Validation, stages: Sequence[MetricRow] | None = None
) -> list[Row]:
    """Return the before/after table: costs, task metric, losses; nothing that was not measured.

    ``stages`` are the metrics of the original and the merged model, by default those that the
    merge recorded.
    """
    return cost_rows(before, after) + loss_rows(after, stages)


def cost_rows(before: Validation | None, after: Validation) -> list[Row]:
    """Return the costs and the task metric."""
    old, new = dict[str, Any](), summary(after)
    if before:
        old = summary(before)
    found = [_cost_row(cost, old, new) for cost in _SIZES]
    note = "of its own files"
    if len(after.manifest.profiles) > 1:
        note = "of its graphs, and the one data file"
    for place, kind in enumerate(after.manifest.kinds[1:], 1):
        size = size_text(model_bytes(after.manifest, kind))
        found.insert(place, Row(f"Size on disk, {kind}", None, size, "", "", note))
    found.append(_kept_row(before, after))
    found += [_cost_row(cost, old, new) for cost in _TIMES]
    found.append(_served_row(old, new))
    return [row for row in found if row]


def _cost_row(cost: Cost, old: Mapping[str, Any], new: Mapping[str, Any]) -> Row | None:
    """Return the row of one cost, None if it was not measured; less than the noise is the same."""
    name, key, show, note = cost
    value, first = new[key], old.get(key)
    if value is None:
        return None
    note = note.format(run=_run_text(new))
    if first is None:
        return Row(name, None, show(value), "", "", note, (None, value))
    change, verdict = "", ""
    if first:
        fraction = (value - first) / first
        noise = NOISE
        if cost in _TIMES:
            noise = max(NOISE, _spread(old), _spread(new))
        change, verdict = signed(f"{100 * fraction:+.1f} %"), "same"
        if abs(fraction) >= noise:
            less_is_better = key != "tokens_per_s"
            verdict = _verdict((fraction < 0) == less_is_better)
        elif noise > NOISE:
            change += ", noise"
    return Row(name, show(first), show(value), change, verdict, note, (first, value))


def _run_text(found: Mapping[str, Any]) -> str:
    """Return what one run was given, and how many threads it had."""
    threads = f"{found['threads']} threads"
    if found["threads"] == 1:
        threads = "one thread"
    return f"{found['given']}, {threads}"


def _spread(found: Mapping[str, Any]) -> float:
    """Return how far runs of one package lie apart, the 95th percentile over the median, less 1."""
    if not found.get("p95_ms") or not found.get("median_ms"):
        return 0.0
    return float(found["p95_ms"] / found["median_ms"] - 1)


def _kept_row(before: Validation | None, after: Validation) -> Row | None:
    """Return how much of what the file no longer holds is gone from memory as well."""
    kept = None
    if before:
        kept = sharing(before, after)
    if not kept or kept.fraction is None:
        return None
    note = "memory saved, of the bytes removed"
    return Row("Sharing kept", None, fraction_text(kept.fraction), "", "", note)


def _served_row(old: Mapping[str, Any], new: Mapping[str, Any]) -> Row | None:
    """Return the task metric of the package as it is served."""
    name, value, first = new["metric_name"], new["metric"], None
    if value is None:
        return None
    if old.get("metric_name") == name:
        first = old["metric"]
    note = f"served, on {new['examples']:,} examples"
    return _metric_row(name.capitalize(), name, first, value, note)


def loss_rows(after: Validation, stages: Sequence[MetricRow] | None = None) -> list[Row]:
    """Return where quality was lost: by the method, and by the export."""
    if stages is None:
        stages = after.metrics
    lost = losses(stages, after.max_abs)
    if lost is None:
        return []
    found, name = [], lost["name"]
    original, merged, exported = lost["original"], lost["merged"], lost["exported"]
    stage, between = "merged", "original against merged"
    if any(row.stage == "narrowed" for row in stages):
        stage, between = "narrowed", "merged against narrowed"
    if original is not None and merged is not None:
        note = f"{name}, {between}, both in PyTorch"
        found.append(_metric_row("Method loss", name, original, merged, note))
    if lost["max_abs"] is None:
        return found
    largest = f"outputs within {lost['max_abs']:.2g}"
    if merged is not None and exported is not None:
        note = f"{name}, {stage} in PyTorch against ONNX Runtime; {largest}"
        found.append(_metric_row("Export loss", name, merged, exported, note))
    elif original is not None and exported is not None:  # nothing but the weights was made smaller
        note = (
            f"{name}, original in PyTorch against {after.manifest.dtype} in ONNX Runtime; {largest}"
        )
        found.append(_metric_row("Export loss", name, original, exported, note))
    else:
        note = "every output, PyTorch against ONNX Runtime"
        found.append(Row("Export loss", None, largest, "", "", note))
    return found


def _metric_row(name: str, metric: str, old: float | None, new: float, note: str) -> Row:
    after = metric_text(metric, new)
    if old is None:
        return Row(name, None, after, "", "", note, (None, new))
    change, verdict = "no change", "same"
    if new != old:
        change = signed(f"{new - old:+.4f}")
        if metric == ACCURACY.name:
            change = signed(f"{100 * (new - old):+.2f} points")
        verdict = _verdict((new > old) == (metric != PERPLEXITY.name))
    return Row(name, metric_text(metric, old), after, change, verdict, note, (old, new))


def output_rows(outputs: Sequence[OutputParity], manifest: Manifest) -> list[tuple[str, str, str]]:
    """Return of each output its name, the largest difference, and whether it holds."""
    rounding: dict[str, Mapping[str, float]] = {}
    for kind in manifest.kinds:
        rounding |= {graph.path: graph.rounding for graph in manifest.of_kind(kind).graphs}
    found = []
    for output in outputs:
        about = (
            f"{output.graph}, optimization {output.optimization}; {output.compared:,} of "
            f"{output.elements:,} elements; cosine {number(output.cosine, '.7f')}"
        )
        if quality := output.quality:
            about += (
                f"; same first class in {number(quality.agreement, '.2%')} of {quality.positions} "
                f"real positions, KL divergence {number(quality.kl, '.2g')}"
            )
        own = rounding.get(output.graph, {}).get(output.name, 0.0)
        difference = f"{number(output.max_abs, '.2g')}\n{_allowed(output, own)}"
        found.append((f"{output.name}\n{about}", difference, yes_or_no(output.ok)))
    return found


def _allowed(output: OutputParity, own: float) -> str:
    """Return how far an output may be off, by how far PyTorch's float32 is itself: ``own``.

    Where that says nothing, because weights are rounded much further, in plain numbers.
    """
    share = f"{100 * output.rtol:.2g} % of each value"
    if own <= 0 or output.atol > MOST_TIMES * own:
        told = f"allowed {output.atol:.2g}, and {share}"
        if output.ok and output.out:
            told += f"; {output.out:,} elements are farther off, as single ones may be"
        return told
    told = f"allowed {output.atol / own:.2g} times"
    if output.max_abs is not None:
        told = f"{output.max_abs / own:.2g} times the model's own rounding in float32, {told}"
    return f"{told}, and {share}"


def runtime_rows(validation: Validation) -> list[tuple[str, ...]]:
    """Return of each runtime where it ran, what it cost, and whether it holds."""
    found: list[tuple[str, ...]] = []
    for result in validation.providers:
        cost = result.footprint
        memory = load = first = median = ABSENT
        if cost:
            load = time_text(1e3 * cost.load_s)
            first, median = time_text(cost.first_ms), time_text(cost.median_ms)
            if cost.rss_bytes is not None:
                memory = size_text(cost.rss_bytes)
        name = f"{result.label}\n{_ran_on(result)}"
        found.append((name, memory, load, first, median, yes_or_no(result.ok)))
    return found


def _ran_on(result: ProviderResult) -> str:
    """Return what ran, on which device, and how many nodes each part of it took."""
    told = result.used or f"{result.requested} was not used"
    if result.device:
        told += f", {result.device}"
    if result.footprint and result.footprint.placement:
        for part, count in result.footprint.placement.counts().items():
            told += f"; {count} compute nodes on {part}"
    return told


def tables(validation: Validation) -> list[Table]:
    """Return what the terminal and a notebook show."""
    found: list[Table] = []
    for result in validation.providers:
        if result.outputs:
            heads = (f"{result.label}, worst outputs", "largest difference", "holds")
            found.append(("", heads, output_rows(result.worst(), validation.manifest)))
    metrics = []
    for row in validation.metrics:
        value = metric_text(row.name, row.value)
        data = f"{row.examples:,} of {row.data}"
        metrics.append((row.stage, row.by, row.name, value, data))
    costs = []
    for cost in rows(None, validation):
        value = cost.after
        if cost.before is not None:
            value = f"{cost.before} to {cost.after}"
        costs.append((f"{cost.name}\n{cost.note}", value))
    if kept := validation.sharing:
        costs.append((f"Bytes removed since {kept.against}", size_text(kept.bytes_removed)))
        told = fraction_text(kept.fraction)
        if kept.fraction is None and kept.resident_saved is not None:
            told = "not told: one of the two has fewer bits"
        costs.append(("Sharing kept: of them gone from memory", told))
    columns = ("greedy decoding", "ids that are PyTorch's", "ties", "verdict")
    found.append(("Generation", columns, _decoding_rows(validation)))
    found.append(("Metric", ("stage", "computed by", "metric", "value", "examples"), metrics))
    found.append(("Cost", ("", ""), costs))
    found.append(("Where it was run", _RUNTIMES, runtime_rows(validation)))
    found.append(("Failed or not tested", ("runtime", "why"), _failures(validation)))
    return [table for table in found if table[2]]


def _decoding_rows(validation: Validation) -> list[tuple[Any, ...]]:
    """Return of each greedy decoding how many ids are PyTorch's, and the verdict."""
    found = []
    for result in validation.providers:
        for each in result.generation:
            agreed = f"{each.agreement:.1%} of {each.compared}"
            name = f"{result.label}, {each.optimization}"
            found.append((name, agreed, each.ties, each.reason or "ok"))
    return found


def _failures(validation: Validation) -> list[tuple[str, str]]:
    """Return of each runtime that failed or was not tested, and of the metric, why."""
    found = []
    for result in validation.providers:
        if result.reason:
            found.append((result.label, result.reason))
    for name, why in validation.not_tested.items():
        found.append((name, f"not tested: {why}"))
    if validation.not_measured:
        found.append(("metric", validation.not_measured))
    return found


def _verdict(better: bool) -> str:
    if better:
        return "better"
    return "worse"
