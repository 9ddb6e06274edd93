"""The report of a validation: one page that loads nothing else, and the same as text.

``validate``, ``demo`` and ``compress`` write it. In go a validation, the one before it, the metrics
along the way and what else is to be told; out come ``report.html`` and ``report.md``, of the
templates ``report.html.j2`` and ``report.md.j2`` here and of the rows of ``rows.py``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from ffmerge.escapes import code_span, markdown, printable
from ffmerge.files import size_text, write_whole
from ffmerge.heatmap import heat_map
from ffmerge.models.manifest import Manifest
from ffmerge.models.record import MergeRecord
from ffmerge.runtime_tests.results import MetricRow, Validation
from ffmerge.runtime_tests.rows import (
    cost_rows,
    loss_rows,
    output_rows,
    runtime_rows,
    summary,
)
from ffmerge.runtime_tests.words import layers_text, metric_text, number

REPORT, TEXT = "report.html", "report.md"


@dataclass(frozen=True)
class Point:
    """A model of some size: the bytes of its weights, and its metric.

    ``best``: it was chosen, or no other one is smaller and at least as good.
    """

    what: str
    bytes: int
    value: float
    best: bool = False


@dataclass(frozen=True)
class Extras:
    """What a report tells beside what was validated.

    ``commands`` give the package again, ``similarity`` holds the stacks that ``ffmerge similarity``
    wrote, whose heat maps are drawn, ``points`` what else was measured by the ``metric``.
    """

    commands: Sequence[str] = ()
    similarity: Sequence[Mapping[str, Any]] = ()
    points: Sequence[Point] = ()
    metric: str = ""


def made_by(manifest: Manifest, folder: str) -> list[str]:
    """Return the commands that make such a package of MODEL, with the layers that were chosen."""
    model, lines, merge = "MODEL", [], manifest.merge
    if merge and (merge.groups or merge.narrowed):
        method, size = merge.method, merge.bytes_after
        if merge.groups and merge.narrowed:
            shared, _, method = method.partition(", ")
            chosen = _chosen(merge, merge.bytes_before)
            lines = [f"ffmerge merge MODEL shared {chosen} --method {shared} --data DATA"]
            model, chosen = "shared", f"--budget {size}B"
        else:
            chosen = _chosen(merge, size)
        recover = " --recover STEPS" * (merge.metric.get("recovered") is not None)
        lines.append(
            f"ffmerge merge {model} merged {chosen} --method {method} --data DATA{recover}"
        )
        model = "merged"
    task = f"--task {manifest.task}"
    if len(manifest.profiles) == 1:
        task += f" --opset {manifest.opset}"
    task += f" --dtype {','.join(manifest.dtypes)}"
    if manifest.profiles != ("portable",):
        task += f" --for {','.join(manifest.profiles)}"
    data = " --data DATA" * any(graph.probe.real for graph in manifest.graphs)
    return [*lines, f"ffmerge export {model} {folder} {task}{data}"]


def _chosen(merge: MergeRecord, size: int) -> str:
    """Return the options that merge these groups; a size, if no window says it."""
    spans = {group.stack: layers_text(group) for group in merge.groups}
    if len(merge.groups) == 1:
        return f"--window {layers_text(merge.groups[0])}"
    if merge.groups and len(spans) == len(merge.groups):  # one window for each stack
        return " ".join(f"--window {stack}:{span}" for stack, span in spans.items())
    return f"--budget {size}B"


def write_report(
    folder: Path,
    after: Validation,
    before: Validation | None = None,
    stages: Sequence[MetricRow] | None = None,
    also: Extras = Extras(),
    failed: bool = False,
) -> Path:
    """Write ``report.html``, one file that loads nothing else, and ``report.md`` into ``folder``.

    Returns the path of the page; the same validations give the same bytes. ``stages`` is as for
    ``rows.rows``. With ``failed`` they are :func:`beside` the reports of a run that held.
    """
    manifest = after.manifest
    table = {row.name: row for row in cost_rows(before, after)}
    metric = (summary(after)["metric_name"] or "").capitalize()
    groups, narrowed = [], []
    if manifest.merge:
        narrowed = [(each.stack, each.text) for each in manifest.merge.narrowed]
        groups = [(group, layers_text(group)) for group in manifest.merge.groups]
    lines = list(table.values())
    parts = [table.pop(name) for name in list(table) if name.startswith("Memory, ")]
    shown = dict(
        lines=lines,
        memory=parts,
        first=_first(after, metric, stages),
        metrics=_along(after, stages),
        manifest=manifest,
        validation=after,
        before=before,
        rows=table,
        metric=table.get(metric),
        losses=loss_rows(after, stages),
        pictured=("Size on disk", "Memory", "Latency, median", metric),
        groups=groups,
        narrowed=narrowed,
        runtimes=runtime_rows(after),
        output_rows=partial(output_rows, manifest=manifest),
        number=number,
        metric_text=metric_text,
        commands=printable("\n".join(also.commands)).replace("```", "'''"),
        code=lambda text: Markup(code_span(text)),
        points=_placed(also),
        point_metric=also.metric,
        similarity=also.similarity,
        heat=partial(heat_map, "CKA of the feed-forward outputs"),
    )
    pages = {
        TEXT: Environment(finalize=_markdown, undefined=StrictUndefined, trim_blocks=True),
        REPORT: Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True),
    }
    for name, environment in pages.items():
        template = files("ffmerge.runtime_tests").joinpath(f"{name}.j2").read_text("utf-8")
        page = environment.from_string(template).render(shown)
        if failed:
            name = beside(name)
        written = write_whole(folder / name, page.encode())
    return written


def _first(
    validation: Validation, metric: str, stages: Sequence[MetricRow] | None
) -> dict[str, str]:
    """Return what the original had, by the name of the row: the manifest tells its size and score.

    Its weights count in float32.
    """
    manifest, found = validation.manifest, {}
    if manifest.merge and manifest.merge.stages[0] == "original":
        found["Size on disk"] = f"{size_text(manifest.merge.bytes_before)} of weights"
    elif not manifest.merge and manifest.dtype != "fp32":
        found["Size on disk"] = f"{size_text(4 * manifest.parameters)} of weights in float32"
    known = validation.metrics if stages is None else stages
    for row in known:
        if row.stage == "original" and row.name.capitalize() == metric:
            found[metric] = metric_text(row.name, row.value)
    return found


def _along(after: Validation, stages: Sequence[MetricRow] | None) -> list[MetricRow]:
    """Return the metrics stage by stage, the original's too where only ``stages`` have it."""
    found = after.metrics
    if any(row.stage == "original" for row in found):
        return found
    return [row for row in stages or () if row.stage == "original"] + found


def _placed(also: Extras) -> list[tuple[Point, str, str, float, float]]:
    """Return of each point its size and value in words, and its place in a picture, from 0 to 1."""
    values = [point.value for point in also.points]
    found = []
    for point in also.points:
        right = point.bytes / max(each.bytes for each in also.points)
        up = 0.5
        if max(values) > min(values):
            up = (point.value - min(values)) / (max(values) - min(values))
        size, value = size_text(point.bytes), metric_text(also.metric, point.value)
        found.append((point, size, value, right, up))
    return found


def beside(name: str) -> str:
    """Return what a file is called that a failed run writes where that of a good one stays."""
    stem, _, suffix = name.rpartition(".")
    return f"{stem}.failed.{suffix}"


def _markdown(value: Any) -> Any:
    """Return what the text report shows of a value; what is marked safe is its own."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return markdown(value)
    return value
