"""int4 of merged models: rounded, by the first product that reads a shared weight, by all of them.

``python benchmarks/quality/rounding.py CHECKPOINT CALIBRATION HELD_OUT`` with a folder of
``benchmarks/trained.py`` and the data of ``bits.py``, whose measure this is. The middle half of
the layers shares by k (``calibrated``), and the package in int4 is held against the merged model in
float32. Prints a row of docs/quality.md for each k. ``--rounding`` names other data to round by.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from bits import prepared, read

import ffmerge
from ffmerge.config import ExportConfig, MergeConfig, ShareConfig
from ffmerge.exporter.package import export
from ffmerge.models import ties
from ffmerge.models.examples import from_arrays
from ffmerge.models.find import find
from ffmerge.passes.graph import gptq
from ffmerge.passes.graph.audit import audit
from ffmerge.passes.graph.run import share_file
from ffmerge.passes.weights.evidence import Statistics
from ffmerge.passes.weights.methods import METHODS
from ffmerge.passes.weights.search import Trials
from ffmerge.progress import silent

METHOD = "calibrated"
all_inputs = gptq.inputs_of


def first_input(matrix: gptq.Matrix) -> gptq.Inputs:
    """Return what the first product of a weight multiplies it by."""
    return all_inputs(matrix)[:1]


def share_(model: Any, rows: dict[str, np.ndarray], k: int) -> int:
    """Make the middle half of the layers share by k; return how many groups there are."""
    members = find(model)
    start, many = len(members) // 4, len(members) // 2
    groups = [tuple(members[at : at + k]) for at in range(start, start + many - k + 1, k)]
    config = MergeConfig(window=(0, k - 1), method=METHOD)
    stacks = {members[0].stack: members}
    statistics = Statistics(model, from_arrays(rows), stacks, config, silent)
    trials = Trials(model, METHODS[METHOD], statistics, None, silent)
    trials.learn([groups])
    _, merged = trials.attempt(groups, {})
    for group, weights in merged.items():
        ties.tie_(model, [group], [weights])
    return len(groups)


def main() -> None:
    """Print a row for each number of layers that share."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("checkpoint", "calibration", "held_out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--rounding", type=Path)
    parser.add_argument("--k", type=int, nargs="+", default=[2, 3])
    given = parser.parse_args()
    texts = given.rounding or given.calibration, given.held_out
    print("| layers that share | fp32 | bytes of int4 | rounded | by the first | by all products |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        for k in given.k:
            model = ffmerge.load(given.checkpoint)
            data = read(given.checkpoint, given.calibration, model.can_generate())
            groups = share_(model, data, k)
            package = export(model, folder / f"p{k}", ExportConfig(), given.checkpoint)
            graph, rows = package.path / package.manifest.graphs[0].path, folder / f"{k}.npz"
            measure = prepared(graph, package.path, texts, rows)
            cells, size = [f"{measure(graph):.4f}"], 0
            for name, data, inputs in (
                ("rounded", None, all_inputs),
                ("first", rows, first_input),
                ("all", rows, all_inputs),
            ):
                target = folder / f"{name}{k}.onnx"
                with mock.patch.object(gptq, "inputs_of", inputs):
                    result = share_file(graph, target, ShareConfig(dtype="int4", data=data))
                size = sum(path.stat().st_size for path in result.files)
                assert audit(target).ok
                cells.append(f"{measure(target):.4f}")
            cells.insert(1, f"{size:,}")
            print(f"| {groups} x {k} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
