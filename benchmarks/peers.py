"""ffmerge beside other tools, on the same models in one run: bytes, memory, time, error, sharing.

    pip install onnxslim onnxsim
    python benchmarks/peers.py [--model albert vit gpt2] [--json out.json]

Random weights at true size: ALBERT-base (one feed-forward sublayer for 12 layers), ViT-B/16 with
five of twelve tied, GPT-2 small with its tied head. Every tool gets the file that PyTorch's
exporter writes; latency is one thread, batch 1, in a process of its own. "Error" is the largest
difference of a logit from PyTorch; a tool that fails has its error as its row.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
    ViTConfig,
    ViTForImageClassification,
)

import ffmerge
from ffmerge.exporter.package import ExportConfig, Package
from ffmerge.exporter.torch_onnx import _Outputs
from ffmerge.files import size_text
from ffmerge.models.inputs import probe, to_tensors
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


def torch_export(model: Any, task: str, path: Path, dynamo: bool) -> None:
    """Write what PyTorch's exporter gives by default."""
    wrapper, recipe = _Outputs(model, task).eval(), probe(model)
    example = to_tensors(recipe.draw(len(recipe.cases) - 1), model)
    axes = {
        s.name: {i: d for i, d in enumerate(s.shape) if isinstance(d, str)} for s in recipe.inputs
    }
    if dynamo:
        torch.onnx.export(
            wrapper, kwargs={"inputs": example}, f=path, dynamo=True, verbose=False,
            dynamic_shapes={"inputs": axes}, input_names=list(example),
            output_names=list(wrapper.names), external_data=True,
        )  # fmt: skip
    else:
        torch.onnx.export(
            wrapper, (example, {}), path, dynamo=False, opset_version=18, dynamic_axes=axes,
            input_names=list(example), output_names=list(wrapper.names),
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
    ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def ort_int8(source: Path, target: Path) -> None:
    quantize_dynamic(source, target, weight_type=QuantType.QInt8)


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
        share_file(source, target, dtype) if dtype else share_file(source, target)

    return share


# (row, the file it starts from, the tool); "dynamo" and "torchscript" are PyTorch's exporters
TOOLS: tuple[tuple[str, str, Callable[[Path, Path], None]], ...] = (
    ("OnnxSlim", "torchscript", onnxslim),
    ("onnxsim", "dynamo", onnxsim),
    ("ONNX Runtime optimizer", "dynamo", ort_optimizer),
    ("onnx_ir deduplication", "dynamo", ir_dedup),
    ("ffmerge share", "dynamo", ffmerge_share(None)),
    ("ffmerge share (TorchScript)", "torchscript", ffmerge_share(None)),
    ("ffmerge share fp16", "dynamo", ffmerge_share("fp16")),
    ("ONNX Runtime int8", "dynamo", ort_int8),
    ("ffmerge share int8", "dynamo", ffmerge_share("int8")),
    ("ONNX Runtime int4", "dynamo", ort_int4),
    ("ffmerge share int4", "dynamo", ffmerge_share("int4")),
)


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
        package = ffmerge.export(model, work / "package", ExportConfig())
        export_seconds = time.perf_counter() - start
        sources = {}
        for exporter in ("dynamo", "torchscript"):
            sources[exporter] = work / exporter / "model.onnx"
            sources[exporter].parent.mkdir()
            start = time.perf_counter()
            torch_export(model, package.manifest.task, sources[exporter], exporter == "dynamo")
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
                rows.append({"tool": tool, "error": str(error).strip().splitlines()[0][:100]})
            shutil.rmtree(folder)
    return rows


def table(name: str, rows: list[dict[str, Any]]) -> Table:
    out = Table(title=name)
    for column in ("tool", "file", "RSS", "anonymous", "median", "took", "error", "duplicates"):
        out.add_column(column, justify="left" if column == "tool" else "right")
    for row in rows:
        if "error" in row:
            out.add_row(row["tool"], row["error"])
            continue
        out.add_row(
            row["tool"], size_text(row["bytes"]), size_text(row["rss_bytes"]),
            size_text(row["anonymous_bytes"]), f"{row['median_ms']:.1f} ms",
            f"{row['seconds']:.1f} s", f"{row['max_abs']:.2g}", size_text(row["duplicate_bytes"]),
        )  # fmt: skip
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results = {}
    for name in arguments.model:
        results[name] = run(name)
        Console(width=140).print(table(name, results[name]))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
