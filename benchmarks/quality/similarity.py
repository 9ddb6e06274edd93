"""Does the similarity of feed-forward sublayers predict which windows merge well?

For every window of k layers of the three reference models: the mean linear CKA and the mean
aligned correlation of the pairs in it, and the metric of the model merged there and not tuned.
Printed are Spearman's rank correlations of both with the metric (+1: the more alike, the better
the merge), and the metric of the window that each would choose, beside the best and the mean of
all. docs/merging.md holds the result.

    python benchmarks/quality/similarity.py [--method permute]
"""

import argparse
import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
from run import REFERENCES, splits
from scipy.stats import rankdata, spearmanr

from ffmerge.config import MergeConfig
from ffmerge.models import checkpoint
from ffmerge.passes.weights.merge import merge_
from ffmerge.passes.weights.similarity import Similarity, similarity

COLUMNS = (
    "model", "stack", "k", "windows", "rho CKA", "rho correlation", "best", "by CKA",
    "by correlation", "mean of all",
)  # fmt: skip
Point = tuple[float, float, float]  # of a window: CKA, correlation, quality


def report(name: str, method: str) -> None:
    """Print a row for each stack and k of a reference model, and one for all k of a stack."""
    calibration, validation, _ = splits(name, 0)
    lower = REFERENCES[name].task.startswith("text")  # perplexity
    for found in similarity(checkpoint.load(REFERENCES[name].folder), calibration):
        pooled: list[Point] = []
        for k in range(2, len(found.layers)):
            config = MergeConfig(k=k, stacks=(found.name,), method=method, batch_size=64)
            model = checkpoint.load(REFERENCES[name].folder)
            tried = merge_(model, calibration, config, validation).candidates
            values = [candidate.value for candidate in tried]
            quality = [-value if lower else value for value in values]
            alike = [inside(found, candidate.groups[0].layers) for candidate in tried]
            points = [(*pair, q) for pair, q in zip(alike, quality, strict=True)]
            columns = np.array(points).T
            chosen = [values[int(np.argmax(column))] for column in columns]
            cells = [f"{v:.3f}" for v in (chosen[2], chosen[0], chosen[1], np.mean(values))]
            row(name, found.name, k, points, cells)
            # ranks within one k, so that pooling does not just find that larger k is worse
            pooled += [(a, b, c) for a, b, c in rankdata(columns, axis=1).T / len(points)]
        row(name, found.name, "all", pooled, [""] * 4)


def inside(found: Similarity, layers: tuple[int, ...]) -> tuple[float, float]:
    """Return mean CKA and mean correlation of the pairs of ``layers``."""
    pairs = list(combinations([found.layers.index(layer) for layer in layers], 2))
    of = [np.mean([matrix[p] for p in pairs]) for matrix in (found.cka, found.correlation)]
    return float(of[0]), float(of[1])


def row(name: str, stack: str, k: Any, points: Sequence[Point], cells: list[str]) -> None:
    """Print a row of the table."""
    cka, correlation, quality = zip(*points, strict=True)
    rhos = [spearmanr(predictor, quality).statistic for predictor in (cka, correlation)]
    shown = ["-" if math.isnan(rho) else f"{rho:+.2f}" for rho in rhos]
    print("| " + " | ".join([name, stack, str(k), str(len(points)), *shown, *cells]) + " |")


def main() -> None:
    """Compare, merge every window, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", default="calibrated")
    method = parser.parse_args().method
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
    for name in REFERENCES:
        report(name, method)


if __name__ == "__main__":
    main()
