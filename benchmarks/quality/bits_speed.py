"""Processor time of a product and three layers of BERT-base and ViT-B in each precision, in turns.

``python benchmarks/quality/bits_speed.py`` makes a product of 768 x 3,072, encoders of three layers
(random weights, 768 wide) and a decoder of six layers of SmolLM2's shape, has ``ffmerge share``
write each in every precision, and runs all of them in turns on one thread: one row and 1,024 of the
product, 1 x 128 and 8 x 128 tokens of the one encoder, 1 and 8 pictures (197 tokens each) of the
other, and one token of the decoder after 64. Prints the median of the processor
times in ms; which is best depends on the processor. With ``--beside FOLDER`` what an earlier
version, in FOLDER/ffmerge, makes of int8-dynamic runs in the same turns.
"""

import argparse
import os
import subprocess
import sys
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
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    ViTConfig,
    ViTModel,
)

from ffmerge.config import ExportConfig, ShareConfig
from ffmerge.exporter.package import export
from ffmerge.passes.graph.run import share_file

MODES = {  # by name of a column: precision and block
    "fp32": None, "int8": ("int8", None), "int8 in blocks": ("int8", 64), "int4": ("int4", None)
}  # fmt: skip
TURNS = 15
LAYERS, HEADS, CACHED, PAST = 6, 9, 3, 64  # of the decoder: heads of queries, of keys, and tokens
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


def exported(model: PreTrainedModel, folder: Path, task: str = "feature-extraction") -> Path:
    """Write the graph of a model."""
    package = export(model.eval(), folder, ExportConfig(task=task))
    return package.path / package.manifest.graphs[0].path


def bert(folder: Path) -> Path:
    """Write three layers of BERT-base."""
    torch.manual_seed(0)
    config = BertConfig(num_hidden_layers=3, vocab_size=2048)
    return exported(BertModel(config, add_pooling_layer=False), folder)


def vit(folder: Path) -> Path:
    """Write three layers of ViT-B."""
    torch.manual_seed(0)
    model = ViTModel(ViTConfig(num_hidden_layers=3), add_pooling_layer=False)
    return exported(model, folder)


def llama(folder: Path) -> Path:
    """Write six layers as SmolLM2-135M has thirty, with a cache."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=LAYERS, vocab_size=2048,
        num_attention_heads=HEADS, num_key_value_heads=CACHED, tie_word_embeddings=True,
    )  # fmt: skip
    return exported(LlamaForCausalLM(config), folder, "text-generation-with-past")


def session(path: Path) -> onnxruntime.InferenceSession:
    """Open a graph for one thread."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def pictures(rows: int) -> Feeds:
    """Return inputs of the ViT."""
    draw = np.random.default_rng(0)
    return {"pixel_values": draw.standard_normal((rows, 3, 224, 224)).astype(np.float32)}


def tokens(rows: int) -> Feeds:
    """Return inputs of the BERT."""
    ids = np.random.default_rng(0).integers(0, 2048, (rows, 128))
    return {
        "input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)
    }  # fmt: skip


def step() -> Feeds:
    """Return one token of the decoder, and a cache of those before it."""
    draw = np.random.default_rng(0)
    feeds = {
        "input_ids": np.array([[7]]), "attention_mask": np.ones((1, PAST + 1), np.int64),
        "position_ids": np.array([[PAST]]),
    }  # fmt: skip
    for layer in range(LAYERS):
        for kind in ("key", "value"):
            cached = draw.standard_normal((1, CACHED, PAST, 64)).astype(np.float32)
            feeds[f"past_key_values.{layer}.{kind}"] = cached
    return feeds


def written(graph: Path, beside: Path | None) -> list[Path]:
    """Return the file of a graph in each precision, and in that of an earlier version."""
    paths = []
    for number, mode in enumerate(MODES.values()):
        path = graph
        if mode is not None:
            path = graph.with_name(f"{number}.onnx")
            share_file(graph, path, ShareConfig(dtype=mode[0], block=mode[1]))
        paths.append(path)
    if beside:
        paths.append(graph.with_name("earlier.onnx"))
        command = [sys.executable, "-m", "ffmerge", "share", str(graph), str(paths[-1])]
        environment = {**os.environ, "PYTHONPATH": str(beside)}
        subprocess.run(
            [*command, "--dtype", "int8-dynamic"], check=True, env=environment, cwd=beside,
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
    return paths


def timed(paths: list[Path], feeds: list[Feeds]) -> list[list[float]]:
    """Return the processor time in ms of each input in each file, all of them in turns."""
    sessions = [session(path) for path in paths]
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--beside", type=Path)
    beside = parser.parse_args().beside
    columns, draw = (
        [*MODES, *(["earlier int8-dynamic"] if beside else [])],
        np.random.default_rng(1),
    )
    print(f"| {os.uname().machine} | {' | '.join(columns)} |\n{'|---' * (len(columns) + 1)}|")
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        (folder / "product").mkdir()
        given = [{"x": draw.standard_normal((n, 768)).astype(np.float32)} for n in (1, 1024)]
        graph = product(folder / "product" / "product.onnx")
        show("product, {} rows", (1, 1024), timed(written(graph, beside), given))
        given = [tokens(count) for count in (1, 8)]
        show("BERT, {} x 128", (1, 8), timed(written(bert(folder / "bert"), beside), given))
        given = [pictures(count) for count in (1, 8)]
        show("ViT, {} x 197", (1, 8), timed(written(vit(folder / "vit"), beside), given))
        steps = timed(written(llama(folder / "llama"), beside), [step()])
        show("decoder, {} token", (1,), steps)


def show(name: str, counts: tuple[int, ...], found: list[list[float]]) -> None:
    """Print a row for each count."""
    for count, taken in zip(counts, found, strict=True):
        cells = " | ".join(f"{value:.2f}" for value in taken)
        print(f"| {name.format(count)} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
