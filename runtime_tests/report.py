"""What a merge cost and what it saved: a page, a text and a table made of the same rows."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from rich.table import Table
from rich.text import Text

from ffmerge.files import read_json, size_text, write_whole
from ffmerge.models.manifest import Manifest
from ffmerge.models.metrics import ACCURACY, PERPLEXITY
from ffmerge.models.record import Group
from ffmerge.runtime_tests.footprint import Footprint
from ffmerge.runtime_tests.sharing import model_bytes, sharing
from ffmerge.runtime_tests.validate import NAME as VALIDATION
from ffmerge.runtime_tests.validate import Validation

REPORT, TEXT = "report.html", "report.md"
TIMES = ("load_s", "median_ms", "p95_ms", "tokens_per_s")
ABSENT = "\N{EN DASH}"


@dataclass(frozen=True)
class Summary:
    """What one package costs and is worth; None is what was not measured."""

    label: str
    bytes_on_disk: int
    parameters: int
    rss_bytes: int | None
    anonymous_bytes: int | None
    load_s: float | None
    median_ms: float | None
    p95_ms: float | None
    tokens_per_s: float | None
    metric_name: str | None
    metric: float | None
    examples: int | None
    max_abs: float | None
    file_bytes: int | None = None


@dataclass(frozen=True)
class Losses:
    """One metric along the way: original and merged in PyTorch, then exported and served.

    The method loss is from ``original`` to ``merged``, the export loss from ``merged`` to
    ``exported``, with ``max_abs`` the largest difference in any output. They are never added.
    """

    name: str
    original: float | None
    merged: float | None
    exported: float | None
    max_abs: float | None


@dataclass(frozen=True)
class Row:
    """One line of the table, in words; ``verdict`` is better, worse, same or empty."""

    name: str
    before: str | None
    after: str
    change: str
    verdict: str
    note: str


def summarize(label: str, manifest: Manifest, validation: Validation) -> Summary:
    """Return the summary of a package, measured on the first provider that ran."""
    metric = validation.metric
    outputs = [o for p in validation.providers for o in p.outputs]
    cost = next((p.footprint for p in validation.providers if p.footprint), None)
    return replace(
        costs(label, manifest, cost),
        metric_name=getattr(metric, "name", None),
        metric=getattr(metric, "value", None),
        examples=getattr(metric, "examples", None),
        max_abs=max((o.max_abs for o in outputs if o.max_abs is not None), default=None),
    )


def costs(label: str, manifest: Manifest, cost: Footprint | None) -> Summary:
    """Return the summary of a package of which only the footprint was measured."""
    measured = ("rss_bytes", "anonymous_bytes", "file_bytes", *TIMES)
    return Summary(
        label=label,
        bytes_on_disk=model_bytes(manifest),
        parameters=manifest.parameters,
        **{name: getattr(cost, name, None) for name in measured},
        **dict.fromkeys(("metric_name", "metric", "examples", "max_abs")),
    )


def collect_losses(manifest: Manifest, after: Summary) -> Losses | None:
    """Return the losses of a merged package, or None when its merge recorded no metric.

    The merge's metric and the served one may be of different examples, so only the largest
    difference of an output tells the export loss here.
    """
    along = dict(manifest.merge.metric) if manifest.merge else {}
    if along.get("name") is None:
        return None
    recovered = along.get("recovered")
    return Losses(
        name=along["name"],
        original=along.get("before"),
        merged=along.get("merged") if recovered is None else recovered,
        exported=None,
        max_abs=after.max_abs,
    )


def made_by(manifest: Manifest, folder: str) -> list[str]:
    """Return the commands that make such a package of MODEL, with the layers that were chosen."""
    model, lines, merge = "MODEL", [], manifest.merge
    if merge and merge.groups:
        spans = {g.stack: _window(g) for g in merge.groups}
        chosen = f"--budget {merge.bytes_after}B"
        if any("," in _window(g) for g in merge.groups):
            chosen += " --any-layers"
        elif len(spans) == len(merge.groups):  # the command takes one window for each stack
            named = spans if len(spans) > 1 else {"": spans[merge.groups[0].stack]}
            chosen = " ".join(f"--window {s}{':' * bool(s)}{w}" for s, w in named.items())
        recover = " --recover STEPS" * (merge.metric.get("recovered") is not None)
        lines = [
            f"ffmerge merge MODEL merged {chosen} --method {merge.method} --data DATA{recover}"
        ]
        model = "merged"
    task = f"--task {manifest.task} --opset {manifest.opset} --dtype {manifest.dtype}"
    rows = " --data DATA" * any(graph.probe.real for graph in manifest.graphs)
    return [*lines, f"ffmerge export {model} {folder} {task}{rows}"]


def rows(before: Summary | None, after: Summary, losses: Losses | None = None) -> list[Row]:
    """Return the before/after table: costs, task metric, losses; nothing that was not measured."""

    def cost(name: str, field: str, form: Callable[[Any], str], note: str) -> list[Row]:
        old = getattr(before, field) if before else None
        new = getattr(after, field)
        if new is None:
            return []
        noise = _spread(before, after) if field in TIMES else 0.01
        change, verdict = _cost_change(old, new, noise)
        if field == "tokens_per_s":  # the only one of which more is better
            verdict = {"better": "worse", "worse": "better"}.get(verdict, verdict)
        return [Row(name, None if old is None else form(old), form(new), change, verdict, note)]

    batch = "batch 1, after the first run"
    return [
        *cost("Size on disk", "bytes_on_disk", size_text, "graph and weights"),
        *cost("Parameters", "parameters", "{:,}".format, "each shared one counted once"),
        *cost("Memory", "rss_bytes", size_text, "resident, added by loading"),
        *cost("Memory, anonymous", "anonymous_bytes", size_text, "the part no file backs"),
        *cost("Memory, of files", "file_bytes", size_text, "the part that can be read again"),
        *_kept_rows(before, after),
        *cost("Load time", "load_s", lambda s: time_text(1e3 * s), "opening the session"),
        *cost("Latency, median", "median_ms", time_text, batch),
        *cost("Latency, p95", "p95_ms", time_text, batch),
        *cost("Tokens per second", "tokens_per_s", "{:,.1f}".format, "one sequence, with a cache"),
        *_metric_rows(before, after),
        *_loss_rows(losses),
    ]


def _kept_rows(before: Summary | None, after: Summary) -> list[Row]:
    """Return how much of what the file no longer holds is gone from memory as well."""
    if not before:
        return []
    sizes = (before.bytes_on_disk, after.bytes_on_disk, before.rss_bytes, after.rss_bytes)
    kept = sharing(before.label, *sizes)
    if not kept or kept.fraction is None:
        return []
    note = "memory saved, of the bytes removed"
    return [Row("Sharing kept", None, kept.text(), "", "", note)]


def _metric_rows(before: Summary | None, after: Summary) -> list[Row]:
    name = after.metric_name
    if name is None or after.metric is None:
        return []
    old = before.metric if before and before.metric_name == name else None
    note = f"served, on {after.examples:,} examples"
    return [_metric_row(name.capitalize(), name, old, after.metric, note)]


def _loss_rows(losses: Losses | None) -> list[Row]:
    if losses is None:
        return []
    found = []
    if losses.original is not None and losses.merged is not None:
        note = f"{losses.name}, original against merged, both in PyTorch"
        found.append(_metric_row("Method loss", losses.name, losses.original, losses.merged, note))
    largest = "" if losses.max_abs is None else f"outputs within {losses.max_abs:.2g}"
    if losses.merged is not None and losses.exported is not None:
        note = f"{losses.name}, merged in PyTorch against ONNX Runtime; {largest}"
        found.append(_metric_row("Export loss", losses.name, losses.merged, losses.exported, note))
    elif largest:
        found.append(Row("Export loss", "PyTorch", "ONNX Runtime", largest, "", "every output"))
    return found


def _metric_row(name: str, metric: str, old: float | None, new: float, note: str) -> Row:
    after = metric_text(metric, new)
    if old is None:
        return Row(name, None, after, "", "", note)
    gain = (old - new) if metric == PERPLEXITY.name else (new - old)
    points = f"{100 * (new - old):+.2f} points" if metric == ACCURACY.name else f"{new - old:+.4f}"
    change = _signed(points) if gain else "no change"
    verdict = "better" if gain > 0 else "worse" if gain < 0 else "same"
    return Row(name, metric_text(metric, old), after, change, verdict, note)


def terminal_table(rows: Sequence[Row]) -> Table:
    """Return the rows as a table for the terminal."""
    compared = any(row.before is not None for row in rows)
    colours = {"better": "green", "worse": "red"}
    table = Table()
    for heading in ("", "Before", "After", "Change") if compared else ("", "Value"):
        table.add_column(heading, justify="right" if heading else "left")
    for row in rows:
        if compared:
            change = Text(row.change, style=colours.get(row.verdict, ""))
            table.add_row(Text(row.name), Text(row.before or ABSENT), Text(row.after), change)
        else:
            table.add_row(Text(row.name), Text(row.after))
    return table


def write_report(
    folder: Path,
    before: Summary | None,
    after: Summary,
    losses: Losses | None,
    commands: Sequence[str],
    package: Path | None = None,
    similarity: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """Write ``report.html``, one file that loads nothing else, and ``report.md`` into ``folder``.

    Returns the path of the page. The manifest and ``validation.json`` are read from ``package``,
    by default ``folder``; the same of them gives the same bytes. ``similarity`` holds the stacks
    that ``ffmerge similarity`` wrote, whose heat maps are drawn.

    Raises:
        InputError: one of the two is missing or unreadable.
    """
    manifest = Manifest.read(package or folder)
    validation = read_json((package or folder) / VALIDATION)
    table = {row.name: row for row in rows(before, after)}
    metric = (after.metric_name or "").capitalize()
    pictured = ("Size on disk", "Memory", "Latency, median", metric)
    fields = ("bytes_on_disk", "rss_bytes", "median_ms", "metric")
    shown = dict(
        manifest=manifest,
        validation=validation,
        before=before,
        after=after,
        rows=table,
        metric=table.get(metric),
        losses=_loss_rows(losses),
        pictured=dict(zip(pictured, fields, strict=True)),
        groups=[(g, _window(g)) for g in manifest.merge.groups] if manifest.merge else [],
        number=lambda value, form: ABSENT if value is None else format(value, form),
        quantity=lambda value, text: ABSENT if value is None else text(value),
        metric_text=metric_text,
        size_text=size_text,
        time_text=time_text,
        seconds_text=lambda seconds: time_text(1e3 * seconds),
        commands="\n".join(commands),
        similarity=similarity,
    )
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    for name in (TEXT, REPORT):
        template = files("ffmerge.runtime_tests").joinpath(f"{name}.j2").read_text("utf-8")
        page = environment.from_string(template).render(shown)
        written = write_whole(folder / name, page.encode())
    return written


def time_text(milliseconds: float) -> str:
    """Return a duration in milliseconds or seconds."""
    if milliseconds >= 999.5:
        return f"{_three_figures(milliseconds / 1000)} s"
    return f"{_three_figures(milliseconds)} ms"


def _three_figures(value: float) -> str:
    return f"{value:#.3g}".rstrip(".")


def metric_text(name: str, value: float) -> str:
    """Return a metric's value: accuracy in percent, others as numbers."""
    return f"{100 * value:.2f} %" if name == ACCURACY.name else f"{value:.4g}"


def _signed(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}")


def _spread(*summaries: Summary | None) -> float:
    """Return how far runs of one package lie apart, the 95th percentile over the median, less 1."""
    spreads = (s.p95_ms / s.median_ms - 1 for s in summaries if s and s.p95_ms and s.median_ms)
    return max(0.01, *spreads, 0.01)


def _cost_change(old: float | None, new: float, noise: float) -> tuple[str, str]:
    """Return a cost's change in percent and its verdict; less than ``noise`` says nothing."""
    if not old:
        return "", ""
    change = (new - old) / old
    text = _signed(f"{100 * change:+.1f} %")
    if abs(change) < noise:
        return (f"{text}, noise" if noise > 0.01 else text), "same"
    return text, "better" if change < 0 else "worse"


def _window(group: Group) -> str:
    """Return ``3-7`` for consecutive layers, and a list for others."""
    first, last = group.layers[0], group.layers[-1]
    if group.layers == tuple(range(first, last + 1)):
        return f"{first}-{last}"
    return ", ".join(str(layer) for layer in group.layers)
