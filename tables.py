"""Results as tables for a terminal; the numbers are those of the results' JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from ffmerge.files import size_text
from ffmerge.runtime_tests.words import ABSENT, layers_text

if TYPE_CHECKING:
    from ffmerge.runtime_tests.report import Row
    from ffmerge.runtime_tests.results import Validation


def _table(title: str, columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    return table


def inspection_table(found: Any) -> Group:
    """Show the stacks of an Inspection and what tying removes."""
    return Group(*(_table(*each) for each in found.tables()))


def merge_table(merge: Any, out: Path) -> Group:
    """Show before and after of a Merge, of a budget every step, and what to run next."""
    record, metric = merge.record, merge.record.metric
    rows = [
        ("parameters", f"{record.parameters_before:,}", f"{record.parameters_after:,}"),
        ("bytes", size_text(record.bytes_before), size_text(record.bytes_after)),
    ]
    if metric["name"]:
        name = f"{metric['name']} ({metric['examples']} examples)"
        rows.append((name, f"{metric['before']:.4f}", f"{metric['merged']:.4f}"))
        if metric["recovered"] is not None:
            rows.append(("after recovery", "", f"{metric['recovered']:.4f}"))
    title = f"{out}: {record.method}, {_layers(record.groups)} share"
    shown: list[Any] = [_table(title, ("", "before", "merged"), rows)]
    if merge.frontier:
        steps = (
            (_layers(p.groups), *[p.dtype] * bool(p.dtype), size_text(p.bytes), f"{p.value:.4f}")
            for p in merge.frontier
        )
        auto = ["dtype"] * bool(merge.frontier[0].dtype)
        shown.append(_table("Frontier", ("layers", *auto, "bytes", metric["name"]), steps))
    if metric.get("dtype"):
        command = f"ffmerge export {out} PACKAGE --dtype {metric['dtype']}"
        shown.append(f"Next: {command}")
    return Group(*shown)


def comparison_table(found: Any) -> Group:
    """Show every rival of a Comparison, and the verdict."""
    rows = [(r.name, r.what, size_text(r.bytes), f"{r.value:.4f}") for r in found.rows]
    metric = f"{found.metric} ({found.examples} examples)"
    return Group(_table("At equal size", ("", "layers", "bytes", metric), rows), found.verdict)


def _layers(groups: Any) -> str:
    """Return groups in words: runs of layers as first-last, others one by one."""
    words = [f"{group.stack} {layers_text(group)}" for group in groups]
    return "; ".join(words) or "no layers"


def package_table(package: Any) -> Table:
    """Show the files of a Package."""
    manifest = package.manifest
    rows = [(file.path, size_text(file.bytes)) for file in manifest.files]
    rows.append(("all files", size_text(manifest.bytes_total)))
    rows.append(("distinct parameters", size_text(manifest.parameter_bytes)))
    for path, cost in package.costs.items():
        sizes = [cost[key] for key in ("bytes", "rss_bytes", "anonymous_bytes")]
        shown = ["not known" if size is None else size_text(size) for size in sizes]
        text = "{} on disk, {} resident, {} anonymous".format(*shown)
        rows.append((path, f"{text}, {cost['load_s']:.2f} s load, {cost['median_ms']:.3g} ms run"))
    return _table(f"{package.path}: {manifest.task}", ("file", "size"), rows)


def share_table(result: Any, target: Path) -> Table:
    """Show what sharing saved and what was left alone."""
    rows = [
        ("weights before", size_text(result.bytes_before)),
        ("weights after", size_text(result.bytes_after)),
        *((f"left alone: {skip.name}", skip.reason) for skip in result.skipped),
    ]
    return _table(str(target), ("", ""), rows)


def audit_table(found: Any) -> Group:
    """Show an Audit: the sums, then every finding with its names."""
    sums = _table(
        "ok" if found.ok else "NOT ok",
        ("weights", "bytes"),
        (
            (name, size_text(getattr(found, f"bytes_{name}")))
            for name in ("total", "unique", "duplicate")
        ),
    )
    findings = [
        *((f"{d.kind}: {', '.join(d.names)}", size_text(d.bytes)) for d in found.duplicates),
        *((f"{u.name}: {u.reason}", size_text(u.bytes)) for u in found.unshared_at_load),
        *((f"tie {t.group}", "ok" if t.ok else t.reason) for t in found.ties),
    ]
    if found.basis == "graph":
        findings.append(("at load: read from the graph", found.basis_reason))
    findings += [
        (f"{name}: memory added by loading", size_text(grown["rss_bytes"]))
        for name, grown in found.memory.items()
        if grown["rss_bytes"] is not None
    ]
    return Group(sums, _table("Findings", ("what", "cost or state"), findings))


def similarity_table(stacks: Iterable[Any]) -> Group:
    """Show Similarities as heat maps, in percent; lines wider than the terminal are cut."""
    maps = []
    for stack in stacks:
        for what, matrix in _MAPS.items():
            text = Text(f"{stack.name}, {stack.positions:,} positions: {what}, %\n", no_wrap=True)
            text.append("".join(f"{layer:4}" for layer in ("", *stack.layers)), "bold")
            for layer, row in zip(stack.layers, getattr(stack, matrix), strict=True):
                text.append(f"\n{layer:4}", "bold")
                for value in row:
                    known = value == value  # not NaN
                    shade = round(255 * min(max(value, 0), 1)) if known else 0
                    style = f"{'black' if shade > 99 else 'white'} on rgb({shade},{shade},96)"
                    text.append(f"{100 * value:4.0f}" if known else "   -", style if known else "")
            maps.append(text.append("\n"))
    return Group(*maps)


_MAPS = {"linear CKA of outputs": "cka", "correlation of aligned neurons": "correlation"}


def cost_table(rows: Sequence[Row], title: str | None = None) -> Table:
    """Show the rows of a report."""
    compared = any(row.before is not None for row in rows)
    headings = ["", "Value"]
    if compared:
        headings = ["", "Before", "After", "Change"]
    table = Table(title=title, title_justify="left")
    table.add_column(headings[0])
    for heading in headings[1:]:
        table.add_column(heading, justify="right")
    for row in rows:
        name, value = Text(row.name), Text(row.after)
        if compared:
            change = Text(row.change, _COLOURS.get(row.verdict, ""))
            table.add_row(name, Text(row.before or ABSENT), value, change)
        else:
            table.add_row(name, value)
    return table


def validation_table(result: Validation) -> Group:
    """Show a Validation: what each runtime computed, what it cost, and what is wrong."""
    from ffmerge.runtime_tests.report import tables

    verdict = "NOT ok"
    if result.ok:
        verdict = "ok"
    return Group(Text(verdict, "bold"), *(_table(*each) for each in tables(result)))


_COLOURS = {"better": "green", "worse": "red"}
