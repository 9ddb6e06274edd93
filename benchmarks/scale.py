"""What large models cost: the pipeline step by step, a search, and how statistics grow.

    python benchmarks/scale.py steps --model olmo-1b --window 6-8 --tokens 512
    python benchmarks/scale.py pairs --tokens 1000
    python benchmarks/scale.py pairs --model gpt2-large --k 13 --device cuda
    python benchmarks/scale.py search --width 256 --tokens 1000
    python benchmarks/scale.py fit

``steps`` writes a model with random weights, shard by shard, into a temporary folder, and runs it
from checkpoint to packages; without a window nothing is merged. An export has a process of its own,
as the command has. Beside the times stand floors measured in the same run: matrix products at the
rate of this machine, bytes at the speed of a copy on this disk. ``pairs`` collects statistics for
all windows of k at once, and those of all pairs of layers in the plain way. ``search`` tries these
windows, as ffmerge does, with whole passes, and every window alone from the input. ``fit`` measures
statistics for three numbers of layers and of tokens, and fits lines. Times that are compared are
those of the processors.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import combinations
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

from ffmerge import commands
from ffmerge.config import ExportConfig, LoadConfig, MergeConfig
from ffmerge.files import write_json
from ffmerge.models import checkpoint
from ffmerge.models.examples import from_arrays
from ffmerge.models.find import find
from ffmerge.models.inspection import inspect
from ffmerge.passes.weights import activations, cost
from ffmerge.passes.weights.evidence import pairs_of
from ffmerge.passes.weights.merge import merge_
from ffmerge.passes.weights.moments import Moments
from ffmerge.passes.weights.recover import clone_sharing_parameters
from ffmerge.runtime_tests.memory import resident

SHARD = 400 << 20  # bytes of random weights that are held at a time
LENGTH = 256  # tokens of a row
_NO_TOKENS = {"bos_token_id": 0, "eos_token_id": 0}

# name -> class of the configuration, its settings, the task of the packages
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "vit-base": ("ViT", {"architectures": ["ViTForImageClassification"]}, "image-classification"),
    "gpt2-large": (
        "GPT2",
        {"n_embd": 1280, "n_layer": 36, "n_head": 20, "architectures": ["GPT2LMHeadModel"]},
        "text-generation-with-past",
    ),
    "olmo-1b": (
        "Olmo",
        {
            "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
            "num_attention_heads": 16, "vocab_size": 50304, "tie_word_embeddings": True,
            "architectures": ["OlmoForCausalLM"], "pad_token_id": 1, **_NO_TOKENS,
        },
        "text-generation-with-past",
    ),
}  # fmt: skip


def write_random(
    name: str, folder: Path, dtype: torch.dtype = torch.float32, **changes: Any
) -> None:
    """Write the model ``name`` with random weights, never more than a shard of them in memory."""
    kind, settings, _ = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**{**settings, **changes})
    config.save_pretrained(folder)
    model = checkpoint.without_weights(folder)
    shapes = {n: p.shape for n, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    shards: list[list[str]] = [[]]
    held = 0
    for key, shape in shapes.items():
        if held + 4 * shape.numel() > SHARD and shards[-1]:
            shards.append([])
            held = 0
        shards[-1].append(key)
        held += 4 * shape.numel()
    places, size = dict[str, str](), 0
    for number, keys in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {
            key: (torch.randn(shapes[key], generator=generator) * 0.02 + (".ln_" in key)).to(dtype)
            for key in keys
        }
        save_file(tensors, folder / file, {"format": "pt"})
        places |= dict.fromkeys(keys, file)
        size += sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    write_json(folder / "model.safetensors.index.json", index)


def rows_for(model: Any, tokens: int, seed: int) -> dict[str, np.ndarray]:
    """Return random rows of at least so many positions."""
    draw = np.random.default_rng(seed)
    if model.main_input_name == "pixel_values":
        size, patch = model.config.image_size, model.config.patch_size
        count = -(-tokens // ((size // patch) ** 2 + 1))
        return {"pixel_values": draw.standard_normal((count, 3, size, size), np.float32)}
    return {"input_ids": draw.integers(2, model.config.vocab_size, (-(-tokens // LENGTH), LENGTH))}


def copy_rate(folder: Path) -> float:
    """Return the bytes a second of writing and syncing a file of 256 MiB."""
    block = np.random.default_rng(0).bytes(1 << 24)
    began = time.perf_counter()
    with open(folder / "copy", "wb", 0) as file:
        for _ in range(16):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    (folder / "copy").unlink()
    return 16 * len(block) / (time.perf_counter() - began)


def gemm_rate(device: str = "cpu", side: int = 2048) -> float:
    """Return the flops of a large float32 product for a second of the device, best of three."""
    a = torch.randn(side, side, device=device)
    return 2 * side**3 / min(_timed(lambda: a @ a, device)[0] for _ in range(4))


class Steps:
    """Times, peaks of memory, bytes read and written, by step.

    Read is what calls ask for and what the disk gives for pages of mapped files; what the system
    still holds of a file costs no reading.
    """

    def __init__(self) -> None:
        """Begin without steps."""
        self.found: list[dict[str, Any]] = []

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Measure what is done in the block."""
        resident()  # collects what is done with, and gives freed memory back
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        began, used, moved = time.perf_counter(), time.process_time(), _moved()
        yield
        self.found.append({
            "step": name,
            "seconds": round(time.perf_counter() - began, 2),
            "processor_seconds": round(time.process_time() - used, 2),
            "peak_mb": round(_status("VmHWM")),
            "anonymous_mb": round(_status("RssAnon")),
            **{f"{what}_mb": round((now - moved[what]) / 1e6) for what, now in _moved().items()},
        })  # fmt: skip
        print(json.dumps(self.found[-1]), flush=True)


def _status(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024 / 1e6


def _moved() -> dict[str, int]:
    found = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    names = {"read": "rchar", "read_from_disk": "read_bytes", "written": "wchar"}
    return {what: int(found[name]) for what, name in names.items()}


def steps(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run the pipeline on one model; return what each step took and the floors."""
    task = MODELS[args.model][2]
    source, run = folder / "model", Steps()
    with run.step("write random weights"):
        write_random(args.model, source, getattr(torch, args.dtype))
    floors = {"gemm_gflops": gemm_rate() / 1e9, "copy_mb_s": copy_rate(folder) / 1e6}
    with run.step("inspect"):
        inspect(source)
    with run.step("load"):
        model = checkpoint.load(source)
    size = sum(p.nbytes for p in model.parameters())
    merged, result = source, {}
    if args.window:
        merged, result = folder / "merged", _merge(model, args, floors, run, source)
        shutil.rmtree(source)
    del model
    for dtype in ("fp32", "int4"):
        with get_context("spawn").Pool(1) as pool:
            run.found += pool.apply(_export, (merged, folder / dtype, task, dtype))
        shutil.rmtree(folder / dtype)
    floors["gemm_gflops_after"] = gemm_rate() / 1e9
    return {
        "model": args.model, "model_mb": round(size / 1e6), **result, "floors": floors,
        "steps": run.found,
    }  # fmt: skip


def _export(source: Path, target: Path, task: str, dtype: str) -> list[dict[str, Any]]:
    """Export in a process of its own, as the command does."""
    run = Steps()
    with run.step(f"export {dtype}"):
        commands.export(str(source), target, ExportConfig(task=task, dtype=dtype), LoadConfig())
    return run.found


def _merge(
    model: Any, args: argparse.Namespace, floors: dict[str, float], run: Steps, source: Path
) -> dict[str, Any]:
    """Merge one window and save the model beside ``source``."""
    first, last = map(int, args.window.split("-"))
    data = from_arrays(rows_for(model, args.tokens, 1))
    wanted = pairs_of([(find(model)[first : last + 1],)])["layers"]
    flops, size = cost.cost_of(wanted)
    with run.step("statistics"):
        found = activations.collect(model, {"layers": wanted}, data.batches(1), args.tokens)
    count = found["layers"]["features"].count
    del found
    floors["statistics_s"] = flops * count / (floors["gemm_gflops"] * 1e9)
    held_out = from_arrays(rows_for(model, 1, 2))
    config = MergeConfig(window=(first, last), tokens=args.tokens, method=args.method)
    with run.step("merge, statistics once more"):
        merge_(model, data, config, held_out)
    with run.step("save"):
        checkpoint.save(model, source.with_name("merged"), source)
    return {
        "window": args.window, "method": args.method, "tokens": count,
        "pairs": len(wanted), "pairs_mb": round(size / 1e6),
    }  # fmt: skip


def _timed(work: Callable[[], Any], device: str = "cpu") -> tuple[float, Any]:
    """Return the seconds of the processors, which other programs hardly change, and the result.

    On a GPU, whose own they are, those of the clock.
    """
    clock = time.process_time if device == "cpu" else time.perf_counter
    wait = (lambda: None) if device == "cpu" else torch.accelerator.synchronize
    wait()
    began = clock()
    result = work()
    wait()
    return clock() - began, result


def _windows(args: argparse.Namespace, folder: Path) -> tuple[Any, list[Any]]:
    """Return the model with random weights and its windows; a ViT of any number and width."""
    sizes = {
        "num_hidden_layers": args.layers, "hidden_size": args.width,
        "intermediate_size": 4 * args.width, "num_attention_heads": args.width // 64,
    }  # fmt: skip
    write_random(args.model, folder / "model", **(sizes if args.model == "vit-base" else {}))
    model = checkpoint.load(folder / "model").to(args.device)
    layers = find(model)
    return model, [layers[i : i + args.k] for i in range(len(layers) - args.k + 1)]


def pairs(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Collect the statistics of all windows of a model, and plainly those of all its pairs."""
    model, windows = _windows(args, folder)
    layers, side = find(model), 2048 if args.device == "cpu" else 8192
    data = from_arrays(rows_for(model, args.tokens, 1))
    wanted = pairs_of([(window,) for window in windows])["layers"]
    every = [*combinations(layers, 2)]

    def collected() -> Moments:
        found = activations.collect(model, {"layers": wanted}, data.batches(8), args.tokens)
        return found["layers"]["features"]

    rates = [gemm_rate(args.device, side)]
    seconds, moments = _timed(collected, args.device)
    held = torch.cuda.max_memory_allocated() if args.device != "cpu" else None
    rates.append(gemm_rate(args.device, side))
    a, b = wanted[0]
    ours = moments.correlation(a.layer, b.layer)
    count = moments.count
    del moments
    plainly, theirs = _timed(
        lambda: plain_pairs(model, layers, data.batches(8), every, (a, b)), args.device
    )
    rates.append(gemm_rate(args.device, side))
    found = {}
    for name, these, took in (("windows", wanted, seconds), ("plain_all_pairs", every, plainly)):
        flops, size = cost.cost_of(these)
        floor = flops * count / max(rates)
        found[name] = {
            "pairs": len(set(these)), "bytes": size, "seconds": took, "floor_s": floor,
            "over_floor": took / floor,
        }  # fmt: skip
    return {
        **_about(args), "tokens": count, "device_bytes": held,
        "gemm_gflops": max(rates) / 1e9, **found, "plain_over_windows": plainly / seconds,
        "correlations_differ_by": float((ours - theirs).abs().max()),
    }  # fmt: skip


def plain_pairs(
    model: Any, layers: list[Any], batches: Any, every: list[Any], kept: Any
) -> torch.Tensor:
    """Return the correlation of the pair ``kept``; all others are computed and dropped.

    As one would write it: all features are held, standardised, and multiplied pair by pair.
    """
    seen: dict[int, list[torch.Tensor]] = {s.layer: [] for s in layers}
    hooks = [
        model.get_submodule(s.inputs[0]).register_forward_hook(
            lambda _, given, out, to=seen[s.layer]: to.append(out.flatten(0, -2))
        )
        for s in layers
    ]
    with torch.no_grad():
        for batch in batches:
            model(**{k: torch.as_tensor(v, device=model.device) for k, v in batch.items()})
    for hook in hooks:
        hook.remove()
    features = {}
    for layer in list(seen):
        x = torch.cat(seen.pop(layer))
        x -= x.mean(0)
        features[layer] = x.div_(x.norm(dim=0))
    for a, b in every:
        found = features[a.layer].T @ features[b.layer]
        if (a, b) == kept:
            wanted = found
    return wanted if kept in every else features[kept[0].layer].T @ features[kept[1].layer]


def search(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Try all windows of a ViT, as ffmerge does, and every window alone."""
    model, windows = _windows(args, folder)
    data, held_out = (from_arrays(rows_for(model, args.tokens, seed)) for seed in (1, 2))
    common = {"tokens": args.tokens, "method": args.method, "batch_size": 8}

    def tried(**which: Any) -> tuple[float, Any]:
        return _timed(
            lambda: merge_(
                clone_sharing_parameters(model), data, MergeConfig(**which, **common), held_out
            )
        )

    shared, found = tried(k=args.k)
    alone = [tried(window=(w[0].layer, w[-1].layer)) for w in windows]
    values = [one.candidates[0].value for _, one in alone]
    worst = max(abs(c.value - v) for c, v in zip(found.candidates, values, strict=True))
    return {
        **_about(args),
        "search_s": shared,
        "every_window_alone_s": sum(seconds for seconds, _ in alone),
        "values_differ_by": worst,
    }


def _about(args: argparse.Namespace) -> dict[str, Any]:
    return {
        name: getattr(args, name)
        for name in ("model", "layers", "width", "k", "tokens", "method", "device")
    }


def fit(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure statistics at three sizes each; return slope, intercept and R² of lines."""
    sizes = {"hidden_size": 192, "intermediate_size": 768, "num_attention_heads": 3}
    points: dict[str, list[tuple[int, float]]] = {"layers": [], "tokens": []}
    for what, layers, tokens in (
        *(("layers", n, 1500) for n in (6, 12, 24)),
        *(("tokens", 12, n) for n in (1500, 3000, 6000)),
    ):
        target = folder / f"{what}-{layers}-{tokens}"
        write_random("vit-base", target, num_hidden_layers=layers, **sizes)
        model = checkpoint.load(target)
        found = find(model)
        windows = [found[i : i + 3] for i in range(layers - 2)]
        wanted = pairs_of([(window,) for window in windows])["layers"]
        data = from_arrays(rows_for(model, tokens, 1))

        def once(model: Any = model, pairs: Any = wanted, data: Any = data) -> Any:
            return activations.collect(model, {"layers": pairs}, data.batches(4), 10**9)

        once()
        points[what].append(
            (layers if what == "layers" else tokens, min(_timed(once)[0] for _ in range(2)))
        )
    lines = {}
    for what, measured in points.items():
        x, y = np.array(measured).T
        slope, start = np.polyfit(x, y, 1)
        rest = ((y - slope * x - start) ** 2).sum() / ((y - y.mean()) ** 2).sum()
        lines[what] = {"points": measured, "slope": slope, "start": start, "r2": 1 - rest}
    return lines


def main() -> None:
    """Run one of the four and print what was found as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("what", choices=["steps", "pairs", "search", "fit"])
    parser.add_argument("--model", choices=MODELS, default="vit-base")
    parser.add_argument("--dtype", default="float32", help="of the checkpoint of steps")
    parser.add_argument("--window", help="layers to merge in steps, for example 4-8")
    parser.add_argument("--tokens", type=int, default=10_000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--k", type=int, default=5)
    parser.add_argument("--method", default="calibrated")
    parser.add_argument("--device", default="cpu", help="cpu or cuda, for pairs")
    parser.add_argument("--folder", type=Path, help="where large files go for a while")
    parser.add_argument("--json", type=Path, help="a file to add the result to")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        work = {"steps": steps, "pairs": pairs, "search": search, "fit": fit}[args.what]
        result = {
            "command": " ".join(["python", "benchmarks/scale.py", *sys.argv[1:]]),
            "threads": torch.get_num_threads(),
            **work(args, Path(folder)),
        }
    print(json.dumps(result, indent=1))
    if args.json:
        before = json.loads(args.json.read_text()) if args.json.exists() else []
        write_json(args.json, [*before, result])


if __name__ == "__main__":
    main()
