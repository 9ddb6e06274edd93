"""Does a browser hold a shared weight once? A small ViT, 8 of 12 sublayers tied, in Chromium.

    FFMERGE_NODE_MODULES=examples/web/node_modules python benchmarks/web_memory.py

Prints the bytes of model and data, and by how much loading it makes the wasm heap and the buffers
on the GPU grow. Sizes of ViT-S/16 with pictures of 64 x 64; random weights; about two minutes.
"""

import tempfile
from pathlib import Path

import torch
from transformers import ViTConfig, ViTForImageClassification

import ffmerge
from ffmerge.runtime_tests.footprint import measure_footprint
from ffmerge.runtime_tests.results import model_bytes

RUNTIMES = ("wasm", "web-webgpu")


def main() -> None:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=384, intermediate_size=1536, num_attention_heads=6, image_size=64,
        num_labels=1000,
    )  # fmt: skip
    model = ViTForImageClassification(config).eval()
    found: dict[str, dict[str, int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for label in ("untied", "tied"):
            if label == "tied":
                merge = ffmerge.MergeConfig(window=(2, 9), method="average")
                ffmerge.merge_(model, None, merge)
            package = ffmerge.export(model, Path(folder) / label)
            found[label] = {"disk": model_bytes(package.manifest)}
            for runtime in RUNTIMES:
                cost = measure_footprint(package.path, runtime)
                assert cost.rss_bytes is not None
                found[label][runtime] = cost.rss_bytes
    print(f"{'MB':12}{'untied':>10}{'tied':>10}{'saved / removed':>18}")
    removed = found["untied"]["disk"] - found["tied"]["disk"]
    for name in ("disk", *RUNTIMES):
        before, after = found["untied"][name], found["tied"][name]
        print(f"{name:12}{before / 1e6:10.1f}{after / 1e6:10.1f}{(before - after) / removed:18.2f}")


if __name__ == "__main__":
    main()
