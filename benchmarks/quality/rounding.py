"""int4 of a merged sentence encoder: rounded, by the first product's inputs, by those of all.

``python benchmarks/quality/rounding.py ENCODER CALIBRATION HELD_OUT`` with a folder of
``benchmarks/trained.py minilm`` and two text files. Layers are merged (``calibrated``, the first
window of k), and the embeddings of held-out sentences in int4 are held against those of the merged
model in float32. Prints the table of docs/quality.md.
"""

import argparse
import re
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnxruntime
from transformers import AutoModel, AutoTokenizer

from ffmerge.config import ExportConfig, MergeConfig, ShareConfig
from ffmerge.exporter.package import export
from ffmerge.passes.graph import gptq
from ffmerge.passes.graph.audit import audit
from ffmerge.passes.graph.run import share_file
from ffmerge.passes.weights.merge import merge_

CALIBRATION, HELD_OUT, LENGTH = 512, 256, 128
all_inputs = gptq.inputs_of


def sentences(path: Path, count: int) -> list[str]:
    """Return the first sentences of a text that are neither short nor long."""
    parts = re.split(r"(?<=[.!?])\s+|\n\n+", path.read_text())
    return [part.strip() for part in parts if 30 < len(part.strip()) < 400][:count]


def tokens(tokenizer: Any, texts: list[str]) -> dict[str, np.ndarray]:
    """Return the inputs of an encoder."""
    made = tokenizer(texts, padding=True, truncation=True, max_length=LENGTH, return_tensors="np")
    return {name: array.astype(np.int64) for name, array in made.items()}


def embeddings(path: Path, batch: dict[str, np.ndarray]) -> np.ndarray:
    """Return the mean of the last hidden states of each sentence, of length 1."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = []
    for start in range(0, len(batch["input_ids"]), 16):
        some = {i.name: batch[i.name][start : start + 16] for i in session.get_inputs()}
        mask = some["attention_mask"][..., None]
        mean = (session.run(None, some)[0] * mask).sum(1) / mask.sum(1)
        found.append(mean / np.linalg.norm(mean, axis=1, keepdims=True))
    return np.concatenate(found)


def first_input(matrix: gptq.Matrix) -> gptq.Inputs:
    """Return what the first product of a weight multiplies it by."""
    return all_inputs(matrix)[:1]


def main() -> None:
    """Print a row for each number of layers that share."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("encoder", "calibration", "held_out"):
        parser.add_argument(name, type=Path)
    paths = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(paths.encoder)
    rows = tokens(tokenizer, sentences(paths.calibration, CALIBRATION))
    held_out = tokens(tokenizer, sentences(paths.held_out, HELD_OUT))
    print("| k | bytes of int4 | rounded | by the first product | by all products |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        np.savez(folder / "rows.npz", **rows)
        for k in (2, 3):
            model = AutoModel.from_pretrained(paths.encoder).eval()
            merge_(model, rows, MergeConfig(window=(1, k), method="calibrated"))
            package = export(model, folder / f"p{k}", ExportConfig(task="feature-extraction"))
            graph = package.path / package.manifest.graphs[0].path
            expected, cells, size = embeddings(graph, held_out), [], 0
            for name, data, inputs in (
                ("rounded", None, all_inputs),
                ("first", folder / "rows.npz", first_input),
                ("all", folder / "rows.npz", all_inputs),
            ):
                target = folder / f"{name}{k}.onnx"
                with mock.patch.object(gptq, "inputs_of", inputs):
                    result = share_file(graph, target, ShareConfig(dtype="int4", data=data))
                size = sum(path.stat().st_size for path in result.files)
                assert audit(target).ok
                cosine = (embeddings(target, held_out) * expected).sum(1).mean()
                cells.append(f"{cosine:.4f}")
            print(f"| {k} | {size:,} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
