"""Whole decoders, one token at a time with a cache: tied feed-forward sublayers against untied.

    python benchmarks/decode.py [--model "GPT-2 small" ...] [--json benchmarks/results/decode.json]

Random weights at true size. The packages are made once, under ``--build`` (about 8 GB; a run
that finds them there only measures). Tied and untied decode in turns in one process, so that what
else the machine does falls on both, in several fresh processes. ``--json`` keeps the rows of other
models that the file has; the table of all of them is printed as Markdown.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

DTYPES = ("fp32", "int8", "int4")
PAST, TOKENS = 32, 16  # tokens in the cache before a turn, and tokens of a turn
WARM = 3  # tokens that bring a decoder's weights back into the caches, not counted
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")  # of the first core


def gpt2(layers: int, width: int, inner: int, heads: int, vocabulary: int) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=layers, n_embd=width, n_inner=inner, n_head=heads, vocab_size=vocabulary,
        n_positions=256, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def llama(layers: int, width: int, inner: int, heads: int, vocabulary: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        num_hidden_layers=layers, hidden_size=width, intermediate_size=inner, vocab_size=vocabulary,
        num_attention_heads=heads, tie_word_embeddings=True,
        max_position_embeddings=256, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@dataclass(frozen=True)
class Decoder:
    """A model by its maker, and the windows of layers that are tied, first and last inclusive.

    None is the control: nothing tied, so the untied model against itself.
    """

    make: Callable[[], Any]
    layers: int
    windows: tuple[tuple[int, int] | None, ...]


MODELS = {
    "GPT-2 small": Decoder(lambda: gpt2(12, 768, 3072, 12, 50257), 12, (None, (3, 7), (0, 11))),
    "stories-42M": Decoder(lambda: llama(8, 512, 1376, 8, 32000), 8, ((0, 7),)),
    "stories-15M": Decoder(lambda: llama(6, 288, 768, 6, 32000), 6, ((0, 5),)),
    "12 x 384": Decoder(lambda: gpt2(12, 384, 1536, 6, 8192), 12, ((3, 7), (0, 11))),
    "4 x 1600": Decoder(lambda: gpt2(4, 1600, 6400, 25, 8192), 4, (None, (0, 3))),
    "24 x 256": Decoder(lambda: gpt2(24, 256, 1024, 4, 8192), 24, ((8, 15), (0, 23))),
}


def build(name: str, folder: Path) -> None:
    """Export a decoder untied and tied by each window, and bring each graph to all ``DTYPES``."""
    import torch

    import ffmerge
    from ffmerge.config import ShareConfig
    from ffmerge.passes.graph.run import share_file

    for window in dict.fromkeys((None, *MODELS[name].windows)):
        path = package(folder, name, window)
        if not path.exists():
            torch.manual_seed(0)
            model = MODELS[name].make().eval()
            with torch.no_grad():  # fresh biases and norms are all equal, which would share
                for parameter in model.parameters():
                    if parameter.ndim == 1:
                        parameter += torch.randn(parameter.shape) * 0.02
            if window:
                ffmerge.merge_(model, None, ffmerge.MergeConfig(window=window, method="average"))
            start = time.perf_counter()
            ffmerge.export(model, path)
            print(f"{path.name}: exported in {time.perf_counter() - start:.0f} s", file=sys.stderr)
        for dtype in DTYPES[1:]:
            target = graph(path, dtype)
            if not target.exists():
                share_file(graph(path, "fp32"), target, ShareConfig(dtype=dtype))


def package(folder: Path, name: str, window: tuple[int, int] | None) -> Path:
    return folder / f"{name} {f'tied {window[0]}-{window[1]}' if window else 'untied'}"


def graph(path: Path, dtype: str) -> Path:
    return path / ("model.onnx" if dtype == "fp32" else f"{dtype}.onnx")


def bytes_touched(path: Path) -> int:
    """Return the bytes of distinct weights that one token reads: of a table looked up, a row."""
    model = onnx.load(path, load_external_data=False)
    readers: dict[str, list[tuple[str, int]]] = {}
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            readers.setdefault(name, []).append((node.op_type, index))
    total = 0
    for tensor in model.graph.initializer:
        sizes = list(tensor.dims)
        lookups = (("Gather", 0), ("GatherBlockQuantized", 0), ("GatherBlockQuantized", 2))
        if sizes and all(reader in lookups for reader in readers.get(tensor.name, ())):
            sizes[0] = 1
        item = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        total += math.prod(sizes) * item
    return total


def open_decoder(path: Path, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    # The one that waits must not take the processor from the one that is measured.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def turn(session: ort.InferenceSession, clock: Callable[[], float]) -> float:
    """Return the median ms of one greedily chosen token, after ``PAST`` and ``WARM`` others."""
    inputs = {i.name: i for i in session.get_inputs()}
    outputs = [o.name for o in session.get_outputs()]
    feeds = {
        name: ort.OrtValue.ortvalue_from_numpy(np.zeros((1, i.shape[1], 0, i.shape[3]), "f"))
        for name, i in inputs.items()
        if name.startswith("past_key_values")
    }
    ids, length, times = np.arange(1, PAST + 1)[None], 0, []
    for _ in range(1 + WARM + TOKENS):
        start, end = clock(), length + ids.shape[1]
        own = {
            "input_ids": ids,
            "attention_mask": np.ones((1, end), np.int64),
            "position_ids": np.arange(length, end)[None],
        }
        for name in own.keys() & inputs.keys():
            feeds[name] = ort.OrtValue.ortvalue_from_numpy(own[name])
        logits, *present = session.run_with_ort_values(outputs, feeds)
        for name, value in zip(outputs[1:], present, strict=True):
            feeds[name.replace("present", "past_key_values")] = value
        ids, length = logits.numpy()[:, -1:].argmax(-1), end
        times.append(1e3 * (clock() - start))
    return statistics.median(times[1 + WARM :])


def pairs(paths: Sequence[Path], threads: int, count: int) -> list[list[float]]:
    """Return the ms of one token of each decoder, for each pair of turns, in this process.

    One thread is measured in processor time, to which other processes add less; more in wall time.
    """
    clock = time.process_time if threads == 1 else time.perf_counter
    sessions = [open_decoder(path, threads) for path in paths]
    for session in sessions:
        turn(session, clock)
    found = []
    for number in range(count):
        pair = [0.0, 0.0]
        for at in (0, 1) if number % 2 else (1, 0):
            pair[at] = turn(sessions[at], clock)
        found.append(pair)
    return found


def measure(paths: Sequence[Path], threads: int, processes: int, count: int) -> dict[str, Any]:
    """Return the medians and the ratio tied / untied, over fresh processes.

    The decoder that is loaded later may be faster by some percent, whichever it is: every other
    process loads them the other way round, and the ratio is the geometric mean over processes of
    the median of the pairs. The quartiles are of all pairs.
    """
    found: list[list[float]] = []
    ratios: list[list[float]] = []
    for number in range(processes):
        step = -1 if number % 2 else 1
        given = [*map(str, paths[::step]), str(threads), str(count)]
        command = [sys.executable, __file__, "--pair", *given]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
        turns = [pair[::step] for pair in json.loads(done.stdout)]
        found += turns
        ratios.append([tied / untied for untied, tied in turns])
    low, high = np.percentile(np.concatenate(ratios), (25, 75))
    untied_ms, tied_ms = (statistics.median(ms) for ms in zip(*found, strict=True))
    return {
        "threads": threads,
        "untied_ms": untied_ms,
        "tied_ms": tied_ms,
        "ratio": statistics.geometric_mean(map(statistics.median, ratios)),
        "quartiles": [float(low), float(high)],
        "pairs": len(found),
        "load": os.getloadavg()[0],
    }


def rows(name: str, folder: Path, threads: Sequence[int], *counts: int) -> Iterator[dict[str, Any]]:
    """Yield one row for each window, precision and number of threads."""
    for window in MODELS[name].windows:
        count = window[1] - window[0] + 1 if window else 0
        for dtype in DTYPES:
            paths = [graph(package(folder, name, of), dtype) for of in (None, window)]
            touched = [bytes_touched(path) for path in paths]
            for number in threads:
                yield {
                    "model": name,
                    "layers": MODELS[name].layers,
                    "dtype": dtype,
                    "untied_bytes": touched[0],
                    "tied_bytes": touched[1],
                    "tied_layers": count,
                    "sublayer_bytes": (touched[0] - touched[1]) // max(count - 1, 1),
                    **measure(paths, number, *counts),
                }


def caches() -> dict[str, int]:
    """Return the bytes of the first core's caches by level, as the system tells them."""
    found = {}
    for index in sorted(CACHES.glob("index*")):
        kind, level, size = ((index / f).read_text().strip() for f in ("type", "level", "size"))
        if kind != "Instruction":
            found[f"L{level}"] = int(size.removesuffix("K")) << 10
    return found


def held_by(size: int, levels: dict[str, int]) -> str:
    return next((level for level, room in levels.items() if size <= room), "none")


def markdown(results: dict[str, Any]) -> str:
    """Return all rows as a Markdown table, a column of ratios for each number of threads."""
    merged: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = {}
    for row in results["rows"]:
        key = (row["model"], row["tied_layers"], row["dtype"])
        merged.setdefault(key, {})[row["threads"]] = row
    threads = sorted({row["threads"] for row in results["rows"]})
    heads = ["model", "tied", "dtype", "untied MB", "tied MB", "bytes", "sublayer", "untied in"]
    heads += [f"{n} thread{'s' * (n > 1)}: ms, ratio (quartiles)" for n in threads]
    lines = [heads, ["---"] * len(heads)]
    for by_threads in merged.values():
        row = next(iter(by_threads.values()))
        sublayer, untied = row["sublayer_bytes"], row["untied_bytes"]
        line = [
            row["model"],
            f"{row['tied_layers'] or 'none'} of {row['layers']}",
            row["dtype"],
            f"{untied / 1e6:.1f}",
            f"{row['tied_bytes'] / 1e6:.1f}",
            f"{row['tied_bytes'] / untied:.2f}",
            f"{sublayer / 1e6:.2f} MB, {held_by(sublayer, results['caches'])}" if sublayer else "",
            held_by(untied, results["caches"]),
        ]
        for number in threads:
            at = by_threads.get(number)
            line.append(
                f"{at['untied_ms']:.2f} to {at['tied_ms']:.2f}, **{at['ratio']:.2f}** "
                f"({at['quartiles'][0]:.2f} to {at['quartiles'][1]:.2f})"
                if at
                else ""
            )
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--processes", type=int, default=4, help="an even number")
    parser.add_argument("--pairs", type=int, default=6, help="pairs of turns in each process")
    parser.add_argument("--build", type=Path, default=Path("build/decode"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--pair", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.pair:
        *paths, threads, count = arguments.pair
        print(json.dumps(pairs([Path(path) for path in paths], int(threads), int(count))))
        return
    for name in arguments.model:
        build(name, arguments.build)
    results: dict[str, Any] = {"caches": caches(), "onnxruntime": ort.__version__, "rows": []}
    if arguments.json and arguments.json.exists():
        results["rows"] = json.loads(arguments.json.read_text())["rows"]
    for name in arguments.model:
        results["rows"] = [
            row
            for row in results["rows"]
            if row["model"] != name or row["threads"] not in arguments.threads
        ]
        counts = (arguments.processes, arguments.pairs)
        for row in rows(name, arguments.build, arguments.threads, *counts):
            results["rows"].append(row)
            if arguments.json:
                arguments.json.parent.mkdir(parents=True, exist_ok=True)
                arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    print(markdown(results))


if __name__ == "__main__":
    main()
