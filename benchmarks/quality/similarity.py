"""Does the similarity of feed-forward sublayers predict which windows merge well?

For every window of k layers: the mean linear CKA and the mean aligned correlation of the pairs in
it, and the metric of the model merged there and not tuned. Printed are Spearman's rank
correlations of both with the metric (+1: the more alike, the better the merge), and the metric
of the windows that each would choose, beside the best and the mean of all. docs/merging.md holds
the result.

    python benchmarks/quality/similarity.py [MODEL DATA.npz ...] [--llama SEEDS] [--method permute]

Without a model it takes the digits ViT and its data. ``--llama`` trains the language models of
benchmarks/gated.py. Data at even rows gives the statistics, data at odd rows the metric.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from ffmerge.models import checkpoint, data, digits, tasks
from ffmerge.models.data import Examples
from ffmerge.passes.weights.evaluate import score_for
from ffmerge.passes.weights.merge import MergeConfig, merge_
from ffmerge.passes.weights.similarity import Similarity, similarities

ROOT = Path(__file__).parents[2]
Case = tuple[str, Callable[[], Any], Examples, Examples]  # name, fresh model, statistics, metric


def cases(settings: argparse.Namespace) -> Iterator[Case]:
    """Yield the models to look at with their data."""
    given = settings.models
    for folder, source in zip(given[::2], given[1::2], strict=True):
        task = tasks.infer(checkpoint.load(folder))
        halves = data.read(source, Path(folder), task).halves()
        yield Path(folder).name, lambda folder=folder: checkpoint.load(folder), *halves
    if not given and not settings.llama:
        splits = (data.from_arrays(digits.load(name)) for name in ("calibration", "validation"))
        yield "digits_vit", lambda: checkpoint.load(ROOT / "models" / "digits_vit"), *splits
    if settings.llama:
        sys.path.insert(0, str(ROOT / "benchmarks"))
        import copy

        import gated

        training, *rest = gated.corpus()
        rows = [data.from_arrays({"input_ids": part.numpy()}) for part in rest]
        for seed in range(settings.llama):
            model = gated.train(training, 600, seed)
            yield f"llama {seed}", lambda model=model: copy.deepcopy(model), *rows


def unlabelled(examples: Examples) -> Examples:
    """Return examples without labels: merges are then judged by fidelity."""

    def take(rows: Any) -> dict[str, Any]:
        return {k: v for k, v in examples.take(rows).items() if k != "labels"}

    return Examples(examples.rows, take)


def inside(found: Similarity, layers: tuple[int, ...]) -> tuple[float, float]:
    """Return mean CKA and mean correlation of the pairs of ``layers``."""
    pairs = list(combinations([found.layers.index(layer) for layer in layers], 2))
    cka, correlation = (
        [matrix[pair] for pair in pairs] for matrix in (found.cka, found.correlation)
    )
    return float(np.mean(cka)), float(np.mean(correlation))


def report(name: str, make: Any, calibration: Examples, held_out: Examples, method: str) -> None:
    """Print one row for each stack, metric and k, and one for all k pooled."""
    model = make()
    task = tasks.infer(model)
    first = next(iter(held_out.batches(1)))
    judged = [held_out]
    if "labels" in first and "classification" in task:
        judged.append(unlabelled(held_out))
    for found in similarities(model, calibration):
        for examples in judged:
            score = score_for(model, task, examples, 32)
            pooled: list[tuple[float, float, float]] = []
            for k in (2, 3, 4):
                if k >= len(found.layers):
                    continue
                config = MergeConfig(k=k, stacks=(found.name,), method=method)
                merged = merge_(make(), calibration, config, examples)
                values = [candidate.value for candidate in merged.candidates]
                alike = [inside(found, c.groups[0].layers) for c in merged.candidates]
                points = [(*a, score.rank(v)) for a, v in zip(alike, values, strict=True)]
                columns = list(zip(*points, strict=True))
                chosen = [values[int(np.argmax(column))] for column in columns]
                cells = [f"{v:.3f}" for v in (chosen[2], chosen[0], chosen[1], np.mean(values))]
                row(name, found.name, score.name, k, points, cells)
                # ranks within one k, so that pooling does not just find that larger k is worse
                pooled += zip(*(ranked(column) for column in columns), strict=True)
            row(name, found.name, score.name, "all", pooled, ["", "", "", ""])


def ranked(values: Any) -> list[float]:
    """Return the ranks of values, scaled to 0 to 1, equals sharing theirs."""
    from scipy.stats import rankdata

    return [(rank - 0.5) / len(values) for rank in rankdata(values)]


def row(name: str, stack: str, metric: str, k: Any, points: Any, cells: list[str]) -> None:
    """Print a row of the table."""
    cka, correlation, quality = zip(*points, strict=True)
    rhos = [spearmanr(predictor, quality).statistic for predictor in (cka, correlation)]
    shown = ["-" if math.isnan(rho) else f"{rho:+.2f}" for rho in rhos]
    print("| " + " | ".join([name, stack, metric, str(k), str(len(points)), *shown, *cells]) + " |")


def main() -> None:
    """Compare, merge every window, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="MODEL DATA.npz")
    parser.add_argument("--llama", type=int, default=0, metavar="SEEDS")
    parser.add_argument("--method", default="permute")
    settings = parser.parse_args()
    if len(settings.models) % 2:
        parser.error("give a data file after each model")
    columns = (
        "model", "stack", "metric", "k", "windows", "rho CKA", "rho correlation", "best",
        "by CKA", "by correlation", "mean of all",
    )  # fmt: skip
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for case in cases(settings):
        report(*case, settings.method)


if __name__ == "__main__":
    main()
