"""The results of run.py as Markdown: means over the seeds, with their standard deviation.

python benchmarks/quality/tables.py
"""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

Results = Sequence[dict[str, Any]]
RESULTS = Path(__file__).parents[1] / "results" / "quality.json"
METRIC = {"digits": "accuracy", "village": "perplexity", "numerals": "chrF"}
RECOVERED = "calibrated, recovered"
SELECTIONS = ("budget", "budget, any layers", "budget, fidelity")


def render(results: Results) -> str:
    """Return a table for each task, one for the ablation, one for the precisions."""
    parts = [_of_task(results, name) for name in METRIC]
    return "\n\n".join([*parts, _ablation(results), _precisions(results)])


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
        lines.append(f"| {shown} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _ablation(results: Results) -> str:
    lines = [
        "| calibrated, k = 3, but for | "
        + " | ".join(f"{n}: test | all windows" for n in METRIC)
        + " |",
        "|---" * (1 + 2 * len(METRIC)) + "|",
    ]
    for label in dict.fromkeys(r["label"] for r in results if r["part"] == "ablation"):
        cells = []
        for name in METRIC:
            found = _pick(results, part="ablation", task=name, label=label)
            windows = [mean(r["windows"]) - r["before"] for r in found]
            cells += [_spread(name, found), f"{mean(windows):+.4f}"] if found else ["", ""]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _precisions(results: Results) -> str:
    lines = [
        "| task | model | bytes of the graphs | metric on ONNX Runtime | audit |",
        "|---" * 5 + "|",
    ]
    for r in _pick(results, part="precision"):
        ((metric, value),) = r["test"].items()
        audit = "ok" if r["audit"] else "FAILS"
        lines.append(
            f"| {r['task']} | {r['label']} | {r['bytes']:,} | {metric} {value:.4f} | {audit} |"
        )
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


if __name__ == "__main__":
    print(render(json.loads(RESULTS.read_text())["results"]))
