"""Does sharing stay in memory, and what do packed weights save? ViT-B/16, five of twelve tied.

    python benchmarks/memory.py [--json benchmarks/results/memory.json]

Random weights; 3 GB of disk while it runs. "Kept" is the resident bytes that tying saves over the
bytes that it removes from the file. "Anonymous" is what loading adds that no file backs, over the
bytes of the weights: for the package as it is, and for its graph with packed weights
(``--prepack``). "Latency" is packed over as it is, in turns in one process, one thread, in
processor time: the median of the ratios of all pairs, and their quartiles.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import ViTConfig, ViTForImageClassification

import ffmerge
from ffmerge.config import ExportConfig
from ffmerge.exporter.package import Package
from ffmerge.runtime_tests.footprint import measure_footprint
from ffmerge.runtime_tests.results import Footprint
from ffmerge.runtime_tests.runtimes.registry import find_runtime

DTYPES = ("fp32", "int8", "int4")


def vit_base() -> Any:
    """Return ViT-B/16 with random weights."""
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(num_labels=1000)).eval()
    with torch.no_grad():  # fresh biases and norms are all equal, which would share by chance
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += torch.randn(parameter.shape) * 0.02
    return model


def packages(model: Any, folder: Path) -> dict[str, dict[str, Package]]:
    """Export by precision, untied and then tied in place, each with packed weights beside it."""
    done: dict[str, dict[str, Package]] = {dtype: {} for dtype in DTYPES}
    for label in ("untied", "tied"):
        if label == "tied":
            ffmerge.merge_(model, None, ffmerge.MergeConfig(window=(3, 7), method="average"))
        for dtype in DTYPES:
            config = ExportConfig(dtype=dtype, prepack=True)
            done[dtype][label] = ffmerge.export(model, folder / f"{label}-{dtype}", config)
    return done


def packed_latency(package: Package, pairs: int) -> dict[str, Any]:
    """Return the ms of both forms of a package, and the ratio of the packed to the other."""
    runtime, made = find_runtime("cpu"), package.manifest
    forms = [
        (path, graph) for kind in ("onnx", "prepacked") for path, graph in made.served(kind).items()
    ]
    sessions = [runtime.open(package.path / path, threads=1) for path, _ in forms]
    feeds = forms[0][1].probe.draw(0, batch=1)
    found = []
    for number in range(pairs + 1):
        pair = [0.0, 0.0]
        for at in (0, 1) if number % 2 else (1, 0):
            start = time.process_time()
            sessions[at].run(forms[at][1].outputs, feeds)
            pair[at] = 1e3 * (time.process_time() - start)
        found.append(pair)
    del found[0]  # the first run of a session allocates
    low, ratio, high = np.percentile([packed / plain for plain, packed in found], (25, 50, 75))
    plain_ms, packed_ms = (statistics.median(ms) for ms in zip(*found, strict=True))
    return {
        "plain_ms": plain_ms,
        "packed_ms": packed_ms,
        "ratio": float(ratio),
        "quartiles": [float(low), float(high)],
    }


def row(dtype: str, both: dict[str, Package], pairs: int) -> dict[str, Any]:
    """Return what one precision costs."""
    costs: dict[str, dict[str, Footprint]] = {
        label: {kind: measure_footprint(p.path, kind=kind) for kind in ("onnx", "prepacked")}
        for label, p in both.items()
    }
    weights = {label: package.manifest.bytes_unique for label, package in both.items()}
    resident = {label: cost["onnx"].rss_bytes or 0 for label, cost in costs.items()}
    return {
        "dtype": dtype,
        "weights": weights,
        "resident": resident,
        "kept": (resident["untied"] - resident["tied"]) / (weights["untied"] - weights["tied"]),
        "anonymous": {
            kind: (cost.anonymous_bytes or 0) / weights["tied"]
            for kind, cost in costs["tied"].items()
        },
        "load_s": {kind: cost.load_s for kind, cost in costs["tied"].items()},
        "latency": packed_latency(both["tied"], pairs),
        "load": os.getloadavg()[0],
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    heads = [
        "dtype", "weights, untied to tied", "resident, untied to tied", "kept",
        "anonymous / weights", "the same, packed", "latency, packed / plain (quartiles)",
    ]  # fmt: skip
    lines = [heads, ["---"] * len(heads)]
    for each in rows:
        latency = each["latency"]
        low, high = latency["quartiles"]
        lines.append(
            [
                each["dtype"],
                *(
                    f"{each[key]['untied'] / 1e6:.1f} to {each[key]['tied'] / 1e6:.1f} MB"
                    for key in ("weights", "resident")
                ),
                f"{each['kept']:.3f}",
                *(f"{each['anonymous'][kind]:.3f}" for kind in ("onnx", "prepacked")),
                f"{latency['ratio']:.3f} ({low:.3f} to {high:.3f})",
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        made = packages(vit_base(), Path(folder))
        rows = [row(dtype, both, arguments.pairs) for dtype, both in made.items()]
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    print(markdown(rows))


if __name__ == "__main__":
    main()
