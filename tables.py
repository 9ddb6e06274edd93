"""Results as tables for a terminal, and as pictures; the numbers are those of the results' JSON."""

from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from ffmerge.files import size_text


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
    words = []
    for group in groups:
        first, *_, last = group.layers
        run = group.layers == tuple(range(first, last + 1))
        layers = f"{first}-{last}" if run else ", ".join(map(str, group.layers))
        words.append(f"{group.stack} {layers}")
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


def similarity_picture(stacks: Iterable[Any], kind: str) -> bytes:
    """Return Similarities as one picture of the ``kind`` png or svg, a row for each stack.

    The same numbers give the same bytes.
    """
    import matplotlib
    from matplotlib.figure import Figure

    rows = list(stacks)
    figure = Figure(figsize=(11, 5 * len(rows)), layout="constrained")
    axes = iter(figure.subplots(len(rows), len(_MAPS)).flat)
    for stack in rows:
        for what, matrix in _MAPS.items():
            plot, values = next(axes), getattr(stack, matrix)
            image = plot.imshow(values, vmin=0, vmax=1)
            ticks = range(0, len(values), -(-len(values) // 16))
            plot.set_xticks(ticks, [stack.layers[i] for i in ticks])
            plot.set_yticks(ticks, [stack.layers[i] for i in ticks])
            plot.set(title=f"{stack.name}: {what}", xlabel="layer", ylabel="layer")
            figure.colorbar(image, ax=plot, shrink=0.8)
    file = BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "ffmerge"}):
        figure.savefig(file, format=kind, metadata={"Date": None} if kind == "svg" else None)
    return file.getvalue()


_MAPS = {"linear CKA of outputs": "cka", "correlation of aligned neurons": "correlation"}
_COSTS = {
    "rss_bytes": ("memory added by loading", size_text),
    "anonymous_bytes": ("of it anonymous", size_text),
    "file_bytes": ("of it backed by a file", size_text),
    "median_ms": ("latency, median", "{:.3g} ms".format),
    "p95_ms": ("latency, p95", "{:.3g} ms".format),
}


def validation_table(result: Any) -> Group:
    """Show a Validation: what each provider computed, then what it cost."""
    outputs = [
        (
            f"{p.name}, {o.optimization}: {o.graph}, {o.name}",
            "-" if o.max_abs is None else f"{o.max_abs:.2g}",
            f"{o.atol:.2g} + {o.rtol:.2g} |x|",
            f"{o.quality.agreement:.1%}, {o.quality.kl:.2g}" if o.quality else "-",
            "ok" if o.ok else "NOT ok",
        )
        for p in result.providers
        for o in p.worst()
    ]
    reasons: list[tuple[str, Any]] = [(p.name, p.reason) for p in result.providers if p.reason]
    reasons += [(p.name, f"not tested: {p.reason}") for p in result.not_tested]
    reasons += [("metric", result.not_measured)] if result.not_measured else []
    costs = [
        (f"{p.name}: compute nodes on {part}", f"{count} of {sum(compute.values())}")
        for p in result.providers
        if p.footprint and p.footprint.placement
        for compute in (p.footprint.placement.counts(),)
        for part, count in compute.items()
    ]
    costs += [
        (f"{p.name}: {what}", show(getattr(p.footprint, field)))
        for p in result.providers
        for field, (what, show) in _COSTS.items()
        if getattr(p.footprint, field, None) is not None
    ]
    columns = (
        "worst output of each graph", "largest difference", "tolerance", "same first class, KL",
        "verdict",
    )  # fmt: skip
    shown = _table("ok" if result.ok else "NOT ok", columns, outputs)
    tables = [shown]
    if reasons:
        tables.append(_table("Failed or not tested", ("runtime", "why"), reasons))
    decoded = [
        (
            f"{p.name}, {g.optimization}",
            f"{g.agreement:.1%} of {g.compared}",
            g.ties,
            g.reason or "ok",
        )
        for p in result.providers
        for g in p.generation
    ]
    if decoded:
        heads = ("greedy decoding", "ids that are PyTorch's", "ties", "verdict")
        tables.append(_table("Generation", heads, decoded))
    off = [(p.name, str(d)) for p in result.providers for d in p.divergences]
    if off:
        tables.append(_table("Divergence", ("runtime", "the first node that is off"), off))
    if result.metrics:
        measured = [
            (m.stage, m.by, m.name, f"{m.value:.4f}", f"{m.examples} of {m.data}")
            for m in result.metrics
        ]
        named = ("stage", "computed by", "metric", "value", "examples")
        tables.append(_table("Metric", named, measured))
    if kept := result.sharing:
        costs += [
            (f"bytes removed since {kept.against}", size_text(kept.bytes_removed)),
            ("sharing kept: of them gone from memory", kept.text()),
        ]
    if costs:
        tables.append(_table("Cost", ("", ""), costs))
    return Group(*tables)
