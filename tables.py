"""Results as tables for a terminal; the numbers are those of the results' JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from ffmerge.escapes import printable
from ffmerge.files import size_text
from ffmerge.heatmap import MAPS
from ffmerge.runtime_tests.words import ABSENT, layers_text

if TYPE_CHECKING:
    from ffmerge.runtime_tests.results import Validation
    from ffmerge.runtime_tests.rows import Row


def _table(title: str, columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> Table:
    """Return a table of plain text: names may have brackets, which are markup to rich."""
    table = Table(title=_text(title), title_justify="left", header_style="bold")
    for column in columns:
        table.add_column(_text(column), justify="right", overflow="fold")
    table.columns[0].justify = "left"
    for row in rows:
        table.add_row(*(_text(cell) for cell in row))
    return table


def _text(value: Any) -> Text:
    """Return what a terminal shows as it is."""
    return Text(printable(str(value)))


def inspection_table(found: Any) -> Group:
    """Show the stacks of an Inspection and what tying removes."""
    return Group(*(_table(*each) for each in found.tables()))


def merge_table(merge: Any, out: Path) -> Group:
    """Show before and after of a Merge, and of a budget every step."""
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
    title = f"{out}: {record.method}, {_done(record)}"
    before = "before"
    if record.stages[0] == "merged":
        before = "merged"
    shown: list[Any] = [_table(title, ("", before, record.stages[1]), rows)]
    if merge.frontier:
        columns = ["layers", "bytes", metric["name"]]
        steps = []
        for point in merge.frontier:
            steps.append([_done(point, ""), size_text(point.bytes), f"{point.value:.4f}"])
        if merge.frontier[0].dtype:
            columns.append("dtype")
            for step, point in zip(steps, merge.frontier, strict=True):
                step.append(point.dtype)
        shown.append(_table("Frontier", columns, steps))
    return Group(*shown)


def compress_table(found: Any) -> Group:
    """Show the ways that were measured, what to ship, and what it keeps."""
    rows = [(_GIVEN[found.given], size_text(found.before), f"{found.original:.4f}")]
    for way in found.ways:
        rows.append((way.text, size_text(way.bytes), f"{way.value:.4f}"))
    metric = f"{found.measured} ({found.examples} examples)"
    ship = found.folder / "package"
    said = f"Ship {', '.join(found.files)} of {ship}: {size_text(found.shipped)}, weights were "
    said += f"{size_text(found.before)}. {ship / 'report.html'} shows what was checked."
    if found.shipped > found.size:
        said += f" That is more than {size_text(found.size)}: ask for a smaller --size."
    for reason in found.failed:
        first = reason.partition(";")[0]
        said += f" It does not hold against PyTorch, a larger --size may: {first}."
    return Group(
        _table(f"{found.folder}: {found.ways[0].text}", ("", "weights", metric), rows), said
    )


_GIVEN = {
    "original": "original",
    "merged": "as given, merged before",
    "narrowed": "as given, narrowed before",
}


def outline_table(found: Any) -> Group:
    """Show the steps that a compress would do, with what they take."""
    rows = []
    for step in found.steps:
        took = _time(step.seconds)
        if step.done:
            took = "done already"
        rows.append((step.what, step.size, took))
    said = f"About {_time(found.seconds)} on this machine, by one batch that was timed."
    title = f"{found.folder}: {size_text(found.size)} of {size_text(found.before)} of weights"
    return Group(_table(title, ("step", "to ship", "about"), rows), said)


def _time(seconds: float) -> str:
    """Return about how long, in words."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} minutes"


def comparison_table(found: Any) -> Group:
    """Show every rival of a Comparison, and the verdict."""
    rows = [(r.name, r.what, size_text(r.bytes), f"{r.value:.4f}") for r in found.rows]
    metric = f"{found.metric} ({found.examples} examples)"
    return Group(_table("At equal size", ("", "layers", "bytes", metric), rows), found.verdict)


def _done(found: Any, share: str = " share") -> str:
    """Return in words what a record or a candidate merged or narrowed."""
    words = [f"{each.stack} {each.text}" for each in found.narrowed]
    if found.groups or not words:
        words.insert(0, f"{_layers(found.groups)}{share}")
    return "; ".join(words)


def _layers(groups: Any) -> str:
    """Return groups in words: runs of layers as first-last, others one by one."""
    words = [f"{group.stack} {layers_text(group)}" for group in groups]
    return "; ".join(words) or "no layers"


def package_table(package: Any, blind: bool = False) -> Table:
    """Show the files of a Package; ``blind``: 4 bits are not by data."""
    manifest = package.manifest
    rows = [(file.path, size_text(file.bytes)) for file in manifest.files]
    rows.append(("all files", size_text(manifest.bytes_total)))
    rows.append(("distinct weights", size_text(manifest.bytes_unique)))
    if package.defaults:
        rows.append(("no inputs, at their default", ", ".join(package.defaults)))
    for skip in manifest.skipped:
        if skip.name in SLOWER:
            rows.append((SLOWER[skip.name], skip.reason))
    for path, cost in package.costs.items():
        text = f"{_size(cost['bytes'])} on disk, {_size(cost['rss_bytes'])} resident"
        text += f", {_size(cost['anonymous_bytes'])} anonymous, {cost['load_s']:.2f} s load"
        rows.append((path, f"{text}, {cost['median_ms']:.3g} ms run"))
    rows += _bits_rows(manifest.bits)
    for path, products in manifest.int8.items():
        rows.append((f"{path}, products of int8", INT8[products]))
    if blind:
        rows.append(("4 bits without data", WITHOUT_DATA))
    return _table(f"{package.path}: {manifest.task}", ("file", "size"), rows)


def _size(count: int | None) -> str:
    if count is None:
        return "not known"
    return size_text(count)


# of --for cpu: what is slower for its reason
SLOWER = {"attention": "attention", "genai": "onnxruntime-genai"}
WITHOUT_DATA = (
    "with --data it loses about a quarter: 1 - cosine 0.008 for 0.031 of a sentence encoder"
)


INT8 = {
    "rows": "a range for each row: fastest for many tokens at once (--block 64: nearer)",
    "blocks": "a scale for each block of a row: nearest, and fastest for one token at a time",
}


def _bits_rows(forms: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Show how many weights have which bits, and which have most."""
    names: dict[tuple[int, int, bool], list[str]] = {}
    for name, form in forms.items():
        names.setdefault((form.bits, form.block, form.zeros), []).append(name)
    rows = []
    for bits, block, zeros in sorted(names, reverse=True):
        some = names[bits, block, zeros]
        text = ", ".join(some[:3])
        if len(some) > 3:
            text += f" and {len(some) - 3} more"
        kind = f"{bits} bits in blocks of {block}"
        if zeros:
            kind += " with zero points"
        rows.append((f"{kind}: {len(some)} weights", text))
    return rows


def share_table(result: Any, target: Path, blind: bool = False) -> Table:
    """Show what sharing saved and what was left alone; ``blind``: 4 bits are not by data."""
    rows = [
        ("weights before", size_text(result.bytes_before)),
        ("weights after", size_text(result.bytes_after)),
    ]
    for skip in result.skipped:
        rows.append((f"left alone: {skip.name}", skip.reason))
    rows += _bits_rows(result.forms)
    if result.int8:
        rows.append(("products of int8", INT8[result.int8]))
    if blind:
        rows.append(("4 bits without data", WITHOUT_DATA))
    return _table(str(target), ("", ""), rows)


def audit_table(found: Any) -> Group:
    """Show an Audit: the sums, then every finding with its names."""
    sums = [
        ("total", size_text(found.bytes_total)),
        ("unique", size_text(found.bytes_unique)),
        ("duplicate", size_text(found.bytes_duplicate)),
    ]
    findings = []
    for copies in found.duplicates:
        findings.append((f"{copies.kind}: {', '.join(copies.names)}", size_text(copies.bytes)))
    for weight in found.unshared_at_load:
        findings.append((f"{weight.name}: {weight.reason}", size_text(weight.bytes)))
    for tie in found.ties:
        findings.append((f"tie {tie.group}", tie.reason or "ok"))
    if found.basis == "graph":
        findings.append(("at load: read from the graph", found.basis_reason))
    for name, grown in found.memory.items():
        if grown["rss_bytes"] is not None:
            findings.append((f"{name}: memory added by loading", size_text(grown["rss_bytes"])))
    return Group(
        _table(_verdict(found.ok), ("weights", "bytes"), sums),
        _table("Findings", ("what", "cost or state"), findings),
    )


def points_table(points: Iterable[Any], metric: str, examples: int) -> Table:
    """Show other ways to a smaller model; those that no smaller one beats are marked."""
    rows = []
    for point in points:
        mark = "*" * point.best
        rows.append((point.what, size_text(point.bytes), f"{point.value:.2%}", mark))
    columns = ("weights", "bytes", f"{metric} ({examples:,} examples)", "best for its size")
    return _table("What else makes it smaller", columns, rows)


def pushed_table(found: Any) -> Table:
    """Show where a package was pushed, and its files there."""
    return _table(found.url, ("file",), [(name,) for name in found.files])


def _verdict(ok: bool) -> str:
    if ok:
        return "ok"
    return "NOT ok"


def similarity_table(stacks: Iterable[Any]) -> Group:
    """Show Similarities as heat maps, in percent; lines wider than the terminal are cut."""
    maps = []
    for stack in stacks:
        for matrix, what in MAPS.items():
            text = Text(no_wrap=True)
            text.append(printable(f"{stack.name}, {stack.positions:,} positions: {what}, %\n"))
            text.append("".join(f"{layer:4}" for layer in ("", *stack.layers)), "bold")
            for layer, row in zip(stack.layers, getattr(stack, matrix), strict=True):
                text.append(f"\n{layer:4}", "bold")
                for value in row:
                    text.append(*_cell(value))
            maps.append(text.append("\n"))
    return Group(*maps)


def _cell(value: float) -> tuple[str, str]:
    """Return the text of a cell of a heat map, and its style."""
    if value != value:  # NaN
        return "   -", ""
    shade = round(255 * min(max(value, 0), 1))
    ink = "white"
    if shade > 99:
        ink = "black"
    return f"{100 * value:4.0f}", f"{ink} on rgb({shade},{shade},96)"


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
        name, value = _text(row.name), _text(row.after)
        if compared:
            change = Text(row.change, _COLOURS.get(row.verdict, ""))
            table.add_row(name, _text(row.before or ABSENT), value, change)
        else:
            table.add_row(name, value)
    return table


def validation_table(result: Validation) -> Group:
    """Show a Validation: what each runtime computed, what it cost, and what is wrong."""
    from ffmerge.runtime_tests.rows import tables

    return Group(Text(_verdict(result.ok), "bold"), *(_table(*each) for each in tables(result)))


_COLOURS = {"better": "green", "worse": "red"}
