"""ViT-B/16 with five of twelve feed-forward sublayers shared: bytes, memory, parity, time.

    python benchmarks/vit_base.py

Random weights (biases and norms too, or equal ones would be shared by chance); about two minutes
and 2 GB of disk.
"""

import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from transformers import ViTConfig, ViTForImageClassification

import ffmerge
from ffmerge.runtime_tests.rows import rows
from ffmerge.tables import cost_table


def main() -> None:
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(num_labels=1000)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += torch.randn(parameter.shape) * 0.02
    validations = []
    with tempfile.TemporaryDirectory() as folder:
        for label in ("untied", "tied"):
            if label == "tied":
                config = ffmerge.MergeConfig(window=(3, 7), method="average")
                ffmerge.merge_(model, None, config)
            start = time.perf_counter()
            package = ffmerge.export(model, Path(folder) / label)
            seconds = time.perf_counter() - start
            on_disk = sum(path.stat().st_size for path in package.path.iterdir())
            ratio = on_disk / package.manifest.parameter_bytes
            print(
                f"{label}: exported in {seconds:.1f} s, package / distinct parameters {ratio:.4f}"
            )
            validations.append(replace(ffmerge.validate(package.path), label=label))
    before, after = validations
    Console().print(cost_table(rows(before, after)))
    removed = 4 * (before.manifest.parameters - after.manifest.parameters)
    saved = before.footprint.rss_bytes - after.footprint.rss_bytes
    print(f"memory saved / bytes removed: {saved / removed:.3f}")
    print(f"largest difference from PyTorch: {max(before.max_abs, after.max_abs):.2g}")


if __name__ == "__main__":
    main()
