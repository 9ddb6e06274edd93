"""The results of run.py as Markdown: means over the seeds, with their standard deviation.

python benchmarks/quality/tables.py
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

Results = Sequence[dict[str, Any]]
RESULTS = Path(__file__).parents[1] / "results" / "quality.json"
METRIC = {"digits": "accuracy", "village": "perplexity", "numerals": "chrF"}
RECOVERED = "calibrated, recovered"
SELECTIONS = ("budget", "budget, fidelity")


def render(results: Results) -> str:
    """Return a table for each task, one for the precisions."""
    parts = [_of_task(results, n) for n in METRIC if _pick(results, task=n, label="none")]
    return "\n\n".join([*parts, _precisions(results)])


def _of_task(results: Results, name: str) -> str:
    base = _pick(results, task=name, label="none")[0]
    lines = [
        f"### {name}: {METRIC[name]} {_shown(name, base['test'])} with "
        f"{base['parameters']:,} parameters",
        "",
        "| | k = 3: parameters | " + METRIC[name] + " | loss, of permute's | "
        "k = 4: parameters | " + METRIC[name] + " | loss, of permute's |",
        "|---" * 7 + "|",
    ]
    labels = {r["label"]: r["part"] for r in results if r["part"] in ("methods", "rival")}
    rows = [(label, part, label) for label, part in labels.items() if label != "none"]
    rows += [(label, "selection", label) for label in SELECTIONS]
    for shown, part, label in (*rows, (RECOVERED, "recovery", "calibrated")):
        cells = []
        for k in (3, 4):
            found = _pick(results, part=part, task=name, k=k, label=label)
            usual = _pick(results, part="methods", task=name, k=k, label="permute")
            cells += ["", "", ""] if not found else [
                f"{mean(r['parameters'] for r in found):,.0f}", _spread(name, found),
                f"{_loss(found, base) / _loss(usual, base):.2f}",
            ]  # fmt: skip
        if any(cells):
            lines.append(f"| {shown} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _precisions(results: Results) -> str:
    lines = [
        "| task | model | bytes of the graphs | metric on ONNX Runtime | validate | audit |",
        "|---" * 6 + "|",
    ]
    for r in _pick(results, part="precision"):
        ((metric, value),) = r["test"].items()
        parity, audit = ("ok" if r[what] else "FAILS" for what in ("parity", "audit"))
        cells = [r["task"], r["label"], f"{r['bytes']:,}", f"{metric} {value:.4f}", parity, audit]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _pick(results: Results, **wanted: Any) -> list[dict[str, Any]]:
    return [r for r in results if all(r[key] == value for key, value in wanted.items())]


def _loss(found: Results, base: dict[str, Any]) -> float:
    metric = METRIC[base["task"]]
    apart = mean(r["test"][metric] for r in found) - base["test"][metric]
    return apart if metric == "perplexity" else -apart


def _spread(name: str, found: Results) -> str:
    values = [r["test"][METRIC[name]] for r in found]
    text = _shown(name, {METRIC[name]: mean(values)})
    scale = 100 if METRIC[name] == "accuracy" else 1
    return text + (f" ± {scale * stdev(values):.2f}" if len(values) > 1 else "")


def _shown(name: str, test: dict[str, float]) -> str:
    value = test[METRIC[name]]
    return f"{100 * value:.2f} %" if METRIC[name] == "accuracy" else f"{value:.2f}"


def draw(results: Results, file: str) -> None:
    """Draw what each way of making the models smaller loses, against its size."""
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.2), layout="constrained")
    shown = ("permute", "calibrated", "drop-ffn", "drop-layer", "low-rank")
    for plot, name in zip(figure.subplots(1, len(METRIC)), METRIC, strict=True):
        base = _pick(results, task=name, label="none")[0]
        for label, marker in zip(shown, "osv^D", strict=True):
            points = []
            for k in (3, 4):
                found = [r for r in _pick(results, task=name, k=k, label=label)
                         if r["part"] in ("methods", "rival")]  # fmt: skip
                if found:
                    size = mean(r["parameters"] for r in found) / base["parameters"]
                    points.append((100 * size, max(_loss(found, base), 0)))
            plot.plot(*zip(*points, strict=True), marker=marker, label=label)
        plot.set(title=f"{name}: {METRIC[name]}", xlabel="% of the parameters", ylabel="loss")
        plot.set_yscale("symlog", linthresh=0.02)
    figure.axes[-1].legend(fontsize="small")
    with matplotlib.rc_context({"svg.hashsalt": "ffmerge"}):
        figure.savefig(file, metadata={"Date": None})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--picture", help="also draw an .svg")
    chosen = parser.parse_args()
    known = json.loads(RESULTS.read_text())["results"]
    print(render(known))
    if chosen.picture:
        draw(known, chosen.picture)
