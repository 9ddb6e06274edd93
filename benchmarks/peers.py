"""ffmerge beside other tools, on the same models in one run: bytes, memory, time, error, sharing.

    pip install onnxslim onnxsim
    python benchmarks/peers.py [--model albert vit gpt2 marian int8] [--json out.json]

Random weights at true size: ALBERT-base (one feed-forward sublayer for 12 layers), ViT-B/16 with
five of twelve tied, GPT-2 small with its tied head. Every tool gets the file that PyTorch's
exporter writes; latency is one thread, batch 1, in a process of its own. "Error" is the largest
difference of a logit from PyTorch; a tool that fails has its error as its row. Marian (opus-mt's
size) is three graphs, encoder, decoder and decoder with past, of which only bytes are compared.
"int8" is ALBERT quantized by ONNX Runtime and by ffmerge, over batch x tokens and threads.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from rich.console import Console
from rich.table import Table
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    MarianConfig,
    MarianMTModel,
    ViTConfig,
    ViTForImageClassification,
)

import ffmerge
from ffmerge.config import ExportConfig, ShareConfig
from ffmerge.exporter.graphs import Graph, graphs
from ffmerge.exporter.package import Package
from ffmerge.files import size_text
from ffmerge.models import tasks
from ffmerge.models.inputs import to_tensors
from ffmerge.models.manifest import Manifest
from ffmerge.passes.graph.run import share_file
from ffmerge.runtime_tests.footprint import measure_footprint
from ffmerge.runtime_tests.parity import check_parity


def albert() -> Any:
    config = AlbertConfig(
        hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_hidden_layers=12
    )
    return AlbertForSequenceClassification(config)


def vit() -> Any:
    model = ViTForImageClassification(ViTConfig(num_labels=1000)).eval()
    ffmerge.merge_(model, None, ffmerge.MergeConfig(window=(3, 7), method="average"))
    return model


def gpt2() -> Any:
    return GPT2LMHeadModel(GPT2Config())


MODELS: dict[str, Callable[[], Any]] = {"albert": albert, "vit": vit, "gpt2": gpt2}


def torch_export(graph: Graph, path: Path, dynamo: bool) -> None:
    """Write what PyTorch's exporter gives by default."""
    wrapper, recipe = graph.module.eval(), graph.probe
    example = to_tensors(recipe.draw(len(recipe.cases) - 1), wrapper)
    axes = {
        s.name: {i: d for i, d in enumerate(s.shape) if isinstance(d, str)} for s in recipe.inputs
    }
    if dynamo:
        torch.onnx.export(
            wrapper, kwargs={"inputs": example}, f=path, dynamo=True, verbose=False,
            dynamic_shapes={"inputs": axes}, input_names=list(example),
            output_names=list(graph.outputs), external_data=True,
        )  # fmt: skip
    else:
        torch.onnx.export(
            wrapper, (example, {}), path, dynamo=False, opset_version=18, dynamic_axes=axes,
            input_names=list(example), output_names=list(graph.outputs),
        )  # fmt: skip


def onnxslim(source: Path, target: Path) -> None:
    command = [sys.executable, "-m", "onnxslim", str(source), str(target)]
    subprocess.run(command, check=True, capture_output=True)


def onnxsim(source: Path, target: Path) -> None:
    from onnxsim import simplify

    model, _ = simplify(str(source))
    onnx.save(model, target)


def ort_optimizer(source: Path, target: Path) -> None:
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(target)
    options.add_session_config_entry(
        "session.optimized_model_external_initializers_file_name", f"{target.name}_data"
    )
    ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def ort_int8(source: Path, target: Path) -> None:
    quantize_dynamic(source, target, weight_type=QuantType.QInt8)


def ort_int8_without_shapes(source: Path, target: Path) -> None:
    """Drop the recorded shapes first, which make the quantizer stop."""
    model = onnx.load(source)
    del model.graph.value_info[:]
    quantize_dynamic(model, target, weight_type=QuantType.QInt8)


def slim_then_share(source: Path, target: Path) -> None:
    """Repair what OnnxSlim wrote."""
    with tempfile.TemporaryDirectory() as folder:
        onnxslim(source, Path(folder) / "slim.onnx")
        share_file(Path(folder) / "slim.onnx", target)


def ort_int4(source: Path, target: Path) -> None:
    quantizer = MatMulNBitsQuantizer(onnx.load(source), bits=4, block_size=32, is_symmetric=True)
    quantizer.process()
    quantizer.model.save_model_to_file(str(target), use_external_data_format=False)


def ir_dedup(source: Path, target: Path) -> None:
    model = ir.load(source)
    ir.passes.common.DeduplicateHashedInitializersPass(size_limit=1 << 40)(model)
    ir.save(model, target, external_data=f"{target.name}_data")


def ffmerge_share(dtype: str | None) -> Callable[[Path, Path], None]:
    def share(source: Path, target: Path) -> None:
        share_file(source, target, ShareConfig(dtype=dtype))

    return share


# (row, the file it starts from, the tool); "dynamo" and "torchscript" are PyTorch's exporters
TOOLS: tuple[tuple[str, str, Callable[[Path, Path], None]], ...] = (
    ("OnnxSlim", "torchscript", onnxslim),
    ("OnnxSlim, then ffmerge share", "torchscript", slim_then_share),
    ("onnxsim", "dynamo", onnxsim),
    ("ONNX Runtime optimizer", "dynamo", ort_optimizer),
    ("onnx_ir deduplication", "dynamo", ir_dedup),
    ("ffmerge share", "dynamo", ffmerge_share(None)),
    ("ffmerge share (TorchScript)", "torchscript", ffmerge_share(None)),
    ("ffmerge share fp16", "dynamo", ffmerge_share("fp16")),
    ("ONNX Runtime int8", "dynamo", ort_int8),
    ("ONNX Runtime int8, no shapes", "dynamo", ort_int8_without_shapes),
    ("ffmerge share int8", "dynamo", ffmerge_share("int8")),
    ("ONNX Runtime int4", "dynamo", ort_int4),
    ("ffmerge share int4", "dynamo", ffmerge_share("int4")),
)


def marian() -> list[dict[str, Any]]:
    """Return the bytes of an encoder-decoder's folder as each way of writing it leaves them."""
    config = MarianConfig(
        vocab_size=65001, decoder_vocab_size=65001, pad_token_id=65000, eos_token_id=0,
        decoder_start_token_id=65000, d_model=512, encoder_layers=6, decoder_layers=6,
        encoder_ffn_dim=2048, decoder_ffn_dim=2048, encoder_attention_heads=8,
        decoder_attention_heads=8, max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(0)
    model = MarianMTModel(config).eval()
    task = "text2text-generation-with-past"
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        (work / "torch").mkdir()
        start = time.perf_counter()
        for graph in graphs(model, task):
            if not graph.parts:
                torch_export(graph, work / "torch" / f"{graph.name}.onnx", dynamo=True)
        rows.append(_folder_row("torch dynamo, three graphs", work / "torch", start))
        start = time.perf_counter()
        ffmerge.export(model, work / "ffmerge", ExportConfig(task=task))
        rows.append(_folder_row("ffmerge, with the merged decoder", work / "ffmerge", start))
        distinct = sum(p.nbytes for p in model.parameters())
        rows.append({"tool": "distinct parameters", "bytes": distinct})
        print(f"marian: {rows[1]['bytes'] / distinct:.4f} x the distinct parameters")
    return rows


def _folder_row(tool: str, folder: Path, start: float) -> dict[str, Any]:
    size = sum(path.stat().st_size for path in folder.iterdir())
    return {"tool": tool, "bytes": size, "seconds": time.perf_counter() - start}


def measure(folder: Path, package: Package, seconds: float) -> dict[str, Any]:
    """Return the figures of ``model.onnx`` in ``folder``, against the package's reference."""
    for name in ("ffmerge.json", "reference.safetensors"):
        shutil.copyfile(package.path / name, folder / name)
    manifest = Manifest.read(package.path)
    parity = check_parity(folder, manifest)
    cost = measure_footprint(folder)
    others = ("ffmerge.json", "reference.safetensors")
    size = sum(p.stat().st_size for p in folder.iterdir() if p.name not in others)
    (folder / "ffmerge.json").unlink()  # audit what the file itself shows
    audit = ffmerge.audit(folder / "model.onnx")
    return {
        "bytes": size,
        "rss_bytes": cost.rss_bytes,
        "anonymous_bytes": cost.anonymous_bytes,
        "median_ms": cost.median_ms,
        "seconds": seconds,
        "max_abs": max(o.max_abs if o.max_abs is not None else float("nan") for o in parity),
        "duplicate_bytes": audit.bytes_duplicate,
    }


def run(name: str) -> list[dict[str, Any]]:
    """Return one row per tool for one model."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        start = time.perf_counter()
        task = tasks.base(tasks.infer(model))  # without a cache, which not every tool takes
        package = ffmerge.export(model, work / "package", ExportConfig(task=task))
        export_seconds = time.perf_counter() - start
        sources = {}
        for exporter in ("dynamo", "torchscript"):
            sources[exporter] = work / exporter / "model.onnx"
            sources[exporter].parent.mkdir()
            start = time.perf_counter()
            (graph,) = graphs(model, task)
            torch_export(graph, sources[exporter], exporter == "dynamo")
            seconds = time.perf_counter() - start
            rows.append({"tool": f"torch {exporter}", **measure(work / exporter, package, seconds)})
        (work / "ffmerge").mkdir()
        for file in ("model.onnx", "model.onnx_data"):
            shutil.copyfile(package.path / file, work / "ffmerge" / file)
        figures = measure(work / "ffmerge", package, export_seconds)
        rows.append({"tool": "ffmerge export", **figures})
        for index, (tool, source, apply) in enumerate(TOOLS):
            folder = work / str(index)
            folder.mkdir()
            start = time.perf_counter()
            try:
                apply(sources[source], folder / "model.onnx")
                seconds = time.perf_counter() - start
                rows.append({"tool": tool, **measure(folder, package, seconds)})
            except Exception as error:  # a tool's failure is its result
                rows.append({"tool": tool, "failed": str(error).strip().splitlines()[0][:100]})
            shutil.rmtree(folder)
    return rows


def int8_by_shape(seconds: float = 5.0) -> list[dict[str, Any]]:
    """Return ALBERT in int8, ONNX Runtime's beside ffmerge's two, by batch x tokens and threads.

    They run in turn, so that what else the machine does falls on all; medians of CPU time for one
    thread, of wall time for more.
    """
    torch.manual_seed(0)
    model = albert().eval()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        names = ("float", "stock", "blocks", "dynamic")
        paths = [Path(temporary) / name / "model.onnx" for name in names]
        for path in paths:
            path.parent.mkdir()
        torch_export(*graphs(model, "text-classification"), paths[0], dynamo=True)
        ort_int8_without_shapes(paths[0], paths[1])
        share_file(paths[0], paths[2], ShareConfig(dtype="int8"))
        share_file(paths[0], paths[3], ShareConfig(dtype="int8-dynamic"))
        for threads in (1, 2):
            options = ort.SessionOptions()
            options.intra_op_num_threads = threads
            sessions = [
                ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
                for path in paths
            ]
            clock = time.process_time if threads == 1 else time.perf_counter
            for batch, tokens in ((1, 7), (4, 4), (1, 16), (8, 16), (1, 64), (8, 128)):
                ids = np.random.default_rng(0).integers(0, 30000, (batch, tokens))
                drawn = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
                feeds = {i.name: drawn.get(i.name, 0 * ids) for i in sessions[0].get_inputs()}
                exact, *found = (session.run(None, feeds)[0] for session in sessions)
                off = [float(np.abs(each - exact).max()) for each in found]
                taken = _in_turn(sessions[1:], feeds, clock, seconds)
                row = {"tool": f"{batch} x {tokens} tokens, {threads} thread(s)"}
                row |= dict(zip(("stock_ms", "median_ms", "dynamic_ms"), taken, strict=True))
                row |= dict(zip(("stock_error", "max_abs", "dynamic_error"), off, strict=True))
                rows.append(row)
    return rows


def _in_turn(
    sessions: list[Any], feeds: Any, clock: Callable[[], float], seconds: float
) -> list[float]:
    """Return the median milliseconds of each session, for at least so many seconds of all."""
    times: list[list[float]] = [[] for _ in sessions]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 9:
        for session, taken in zip(sessions, times, strict=True):
            start = clock()
            session.run(None, feeds)
            taken.append(1e3 * (clock() - start))
    return [statistics.median(taken) for taken in times]


# column -> its heading and how a figure is written
COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "bytes": ("files", size_text),
    "rss_bytes": ("RSS", size_text),
    "anonymous_bytes": ("anonymous", size_text),
    "stock_ms": ("ONNX Runtime int8", "{:.1f} ms".format),
    "median_ms": ("median", "{:.1f} ms".format),
    "dynamic_ms": ("int8-dynamic", "{:.1f} ms".format),
    "stock_error": ("ONNX Runtime error", "{:.2g}".format),
    "seconds": ("took", "{:.1f} s".format),
    "max_abs": ("error", "{:.2g}".format),
    "dynamic_error": ("int8-dynamic error", "{:.2g}".format),
    "duplicate_bytes": ("duplicates", size_text),
}


def table(name: str, rows: list[dict[str, Any]]) -> Table:
    out = Table(title=name)
    out.add_column("tool")
    columns = {key: of for key, of in COLUMNS.items() if any(key in row for row in rows)}
    for heading, _ in columns.values():
        out.add_column(heading, justify="right")
    for row in rows:
        figures = [form(row[key]) if key in row else "" for key, (_, form) in columns.items()]
        out.add_row(row["tool"], *([row["failed"]] if "failed" in row else figures))
    return out


def main() -> None:
    others = {"marian": marian, "int8": int8_by_shape}
    names = [*MODELS, *others]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", nargs="+", choices=names, default=names)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results = {}
    for name in arguments.model:
        results[name] = others[name]() if name in others else run(name)
        Console(width=140).print(table(name, results[name]))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
