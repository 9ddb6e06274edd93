"""Merged models on a GPU: ViT-B/16, GPT-2 small and ALBERT-base in ONNX Runtime's CUDA provider.

    pip install 'onnxruntime-gpu[cuda,cudnn]'   # in place of onnxruntime
    python benchmarks/gpu.py [--json benchmarks/results/gpu.json]

Random weights. "Tied" is five of twelve feed-forward sublayers merged, and for ALBERT its one layer
that runs twelve times, against twelve of their own. Errors are against PyTorch in float32 on the
CPU, the largest over all inputs of the package. "Kept" is the device memory that tying saves, over
the bytes that it removes from the weights, each measured in a fresh process. Latency is tied over
untied at batch 1, in turns in one process: the median of the ratios of all pairs, and quartiles.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

import ffmerge
from ffmerge.config import ExportConfig, ValidateConfig
from ffmerge.files import write_json
from ffmerge.models.manifest import Manifest
from ffmerge.runtime_tests.footprint import TRIVIAL
from ffmerge.runtime_tests.runtimes.registry import find_runtime
from ffmerge.runtime_tests.validate import validate

DTYPES = ("fp32", "fp16", "int4")
PARTS = ("memory", "latency", "parity")
PAIRS = 100
WINDOW = (3, 7)


def vit(tied: bool) -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    return _tied(ViTForImageClassification(ViTConfig(num_labels=1000)), tied)


def gpt2(tied: bool) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return _tied(GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0)), tied)


def albert(tied: bool) -> Any:
    from transformers import AlbertConfig, AlbertForMaskedLM

    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    return AlbertForMaskedLM(AlbertConfig(**sizes, num_hidden_groups=1 if tied else 12)).eval()


def _tied(model: Any, tied: bool) -> Any:
    if tied:
        ffmerge.merge_(model, None, ffmerge.MergeConfig(window=WINDOW, method="average"))
    return model.eval()


MODELS: dict[str, tuple[Callable[[bool], Any], str | None]] = {
    "ViT-B/16": (vit, None),
    "GPT-2 small": (gpt2, "text-generation-with-past"),
    "ALBERT-base": (albert, None),
}


def build(name: str, tied: bool, folder: Path) -> None:
    """Export one model in every precision."""
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(2)
    make, task = MODELS[name]
    for dtype in DTYPES:
        model = make(tied)
        with torch.no_grad():  # fresh biases and norms are all equal, which would share by chance
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter += torch.randn(parameter.shape) * 0.02
        ffmerge.export(
            model, place(folder, name, tied, dtype), ExportConfig(task=task, dtype=dtype)
        )


def place(folder: Path, name: str, tied: bool, dtype: str) -> Path:
    """Return where a package lies."""
    return folder / f"{name.split('/')[0]}-{'tied' if tied else 'untied'}-{dtype}".replace(" ", "-")


def pair(provider: str, untied: Path, tied: Path) -> dict[str, Any]:
    """Load both; return how long one run of each takes."""
    runtime, loaded = find_runtime(provider), []
    for folder in (untied, tied):
        graphs = Manifest.read(folder).served("onnx")
        loaded.append([
            (runtime.open(folder / path), graph.outputs, graph.probe.draw(0, batch=1))
            for path, graph in graphs.items()
        ])  # fmt: skip
    found = []
    for number in range(PAIRS + 10):
        times = [0.0, 0.0]
        for at in (0, 1) if number % 2 else (1, 0):
            start = time.perf_counter()
            for session, outputs, feeds in loaded[at]:
                session.run(outputs, feeds)
            times[at] = 1e3 * (time.perf_counter() - start)
        found.append(times)
    del found[:10]  # the first runs of a session allocate and choose kernels
    ratios = np.percentile([tied / untied for untied, tied in found], (25, 50, 75))
    return {
        "ms": [statistics.median(ms) for ms in zip(*found, strict=True)],
        "ratio": float(ratios[1]),
        "quartiles": [float(ratios[0]), float(ratios[2])],
    }


def held(provider: str, folder: Path) -> int:
    """Return the bytes of the device that loading a package takes, of nothing else."""
    import torch

    def used() -> int:
        free, total = torch.cuda.mem_get_info() if torch.cuda.is_available() else (0, 0)
        return total - free

    runtime = find_runtime(provider)
    runtime.open(TRIVIAL)  # pays for the context and the libraries
    before = used()
    sessions = [runtime.open(folder / path) for path in Manifest.read(folder).served("onnx")]
    return used() - before if sessions else 0


def parity(folder: Path, provider: str) -> dict[str, Any]:
    """Return how far the outputs are from PyTorch's, and what validation says."""
    found = validate(folder, ValidateConfig(providers=(provider,)))
    (result,) = found.providers
    placement = result.footprint.placement if result.footprint else None
    return {
        "ok": result.ok,
        "reason": result.reason,
        "used": result.used,
        "max_abs": max((o.max_abs or 0.0 for o in result.outputs), default=None),
        "cosine": min((o.cosine for o in result.outputs if o.cosine is not None), default=None),
        "tokens": min((g.agreement for g in result.generation), default=None),
        "placed": placement.counts() if placement else None,
        "device_bytes_peak": placement.device_bytes if placement else None,
    }


def main() -> None:
    """Build, measure and print the rows as JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", nargs="*", choices=MODELS, default=[*MODELS])
    parser.add_argument("--provider", default="cuda", help="cpu, to try this without a GPU")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=[*PARTS])
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        work, *folders = args.child
        found = {"memory": held, "latency": pair}[work](args.provider, *map(Path, folders))
        print(json.dumps(found))
        return
    kinds = ("cuda", "cuda-tf32") if args.provider == "cuda" else (args.provider,)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with ProcessPoolExecutor() as pool:
            jobs = [pool.submit(build, m, t, folder) for m in args.model for t in (False, True)]
            [job.result() for job in jobs]
        for model in args.model:
            for dtype in DTYPES:
                untied, tied = (place(folder, model, which, dtype) for which in (False, True))
                weights = [Manifest.read(each).bytes_unique for each in (untied, tied)]
                row: dict[str, Any] = {"model": model, "dtype": dtype, "weights": weights}
                if "memory" in args.parts:
                    took = [_fresh(args.provider, "memory", each) for each in (untied, tied)]
                    removed, saved = (a - b for a, b in (weights, took))
                    row |= {"device_bytes": took, "kept": saved / removed}
                if "latency" in args.parts:
                    row |= _fresh(args.provider, "latency", untied, tied)
                if "parity" in args.parts:
                    row["parity"] = {kind: parity(tied, kind) for kind in kinds}
                rows.append(row)
                print(json.dumps(row), flush=True)
    if args.json:
        write_json(args.json, {"device": _device(), "rows": rows})


def _fresh(provider: str, work: str, *folders: Path) -> Any:
    child = [sys.executable, __file__, "--provider", provider, "--child", work, *folders]
    return json.loads(subprocess.check_output(child))


def _device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    main()
