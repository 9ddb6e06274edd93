"""Processor time of one product and of three layers of BERT-base in each precision, in turns.

``python benchmarks/quality/bits_speed.py`` makes a product of 768 x 3,072 and an encoder of three
layers (random weights, 768 wide), has ``ffmerge share`` write each in every precision, and runs all
of them in turns on one thread: one row and 1,024 of the product, 1 x 128 and 8 x 128 tokens of the
encoder. Prints the median of the processor times in ms; which is best depends on the processor.
"""

import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
import torch
from transformers import BertConfig, BertModel

from ffmerge.config import ExportConfig, ShareConfig
from ffmerge.exporter.package import export
from ffmerge.passes.graph.run import share_file

DTYPES = ("fp32", "int8", "int8-dynamic", "int4")
TURNS = 15
PRODUCT = """<ir_version: 10, opset_import: ["" : 20]> product (float[b,768] x) => (float[b,3072] y)
    { y = MatMul(x, W) }"""

Feeds = Mapping[str, np.ndarray]


def product(path: Path) -> Path:
    """Write a graph of one product."""
    weight = np.random.default_rng(0).standard_normal((768, 3072)).astype(np.float32) / 28
    model = onnx.parser.parse_model(PRODUCT)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "W"))
    ir.save(ir.from_proto(model), path, external_data=f"{path.name}_data")
    return path


def encoder(folder: Path) -> Path:
    """Write the graph of three layers."""
    torch.manual_seed(0)
    config = BertConfig(num_hidden_layers=3, vocab_size=2048)
    model = BertModel(config, add_pooling_layer=False).eval()
    package = export(model, folder, ExportConfig(task="feature-extraction"))
    return package.path / package.manifest.graphs[0].path


def session(path: Path) -> onnxruntime.InferenceSession:
    """Open a graph for one thread."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def tokens(rows: int) -> Feeds:
    """Return inputs of the encoder."""
    ids = np.random.default_rng(0).integers(0, 2048, (rows, 128))
    return {
        "input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)
    }  # fmt: skip


def timed(graph: Path, feeds: list[Feeds]) -> list[list[float]]:
    """Return the processor time in ms of each input in each precision, all of them in turns."""
    sessions = []
    for dtype in DTYPES:
        path = graph
        if dtype != "fp32":
            path = graph.with_name(f"{dtype}.onnx")
            share_file(graph, path, ShareConfig(dtype=dtype))
        sessions.append(session(path))
    found = []
    for each in feeds:
        seconds: list[list[float]] = [[] for _ in sessions]
        for _ in range(TURNS):
            for opened, taken in zip(sessions, seconds, strict=True):
                given = {value.name: each[value.name] for value in opened.get_inputs()}
                start = time.process_time()
                opened.run(None, given)
                taken.append(1000 * (time.process_time() - start))
        found.append([float(np.median(taken[1:])) for taken in seconds])
    return found


def main() -> None:
    """Print a row for each input."""
    draw = np.random.default_rng(1)
    rows = {f"product, {count:,} rows": count for count in (1, 1024)}
    batches = {f"encoder, {count} x 128": count for count in (1, 8)}
    print(f"| {os.uname().machine} | {' | '.join(DTYPES)} |\n{'|---' * (len(DTYPES) + 1)}|")
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        (folder / "product").mkdir()
        given = [{"x": draw.standard_normal((n, 768)).astype(np.float32)} for n in rows.values()]
        found = timed(product(folder / "product" / "product.onnx"), given)
        found += timed(encoder(folder / "encoder"), [tokens(count) for count in batches.values()])
        for name, taken in zip([*rows, *batches], found, strict=True):
            print(f"| {name} | {' | '.join(f'{value:.2f}' for value in taken)} |")


if __name__ == "__main__":
    main()
