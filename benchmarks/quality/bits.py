"""Fewer bits of a trained model: bytes, what is lost on held-out text, and time, for each mode.

``python benchmarks/quality/bits.py PACKAGE CALIBRATION HELD_OUT [MODE ...]`` with a package of
``ffmerge export`` in fp32, of a folder of ``benchmarks/trained.py``, and two text files, or folders
of pictures (``benchmarks/real/pictures.py`` writes them), which are compared by the class token. A
model that gives logits is measured by its perplexity, in windows of 256 tokens; another by the mean
cosine of sentence embeddings to those of fp32: with ``--original`` to those of another package, for
one that was narrowed or merged. A mode is a precision, with ``data``, a block or a budget after it:
``int4``, ``int4,data``, ``int4,data,128``, ``int4,data,12.2MB``. Each is made by ``ffmerge share``
in a process of its own, whose processor time and largest memory are told. Prints a table.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer

SENTENCES, LENGTH = (640, 256), 128  # to calibrate and to measure with, and most tokens of each
TOKENS, WINDOW = (16384, 2048), 256
# Runs a command and tells its cost. A small process between: on Linux the largest memory of a child
# is at least what its parent has when it starts it.
LAUNCH = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(used.ru_utime + used.ru_stime, used.ru_maxrss)
"""
MODES = ("fp32", "int8", "int8-dynamic", "int4", "int4,data", "int4,data,128")

Feeds = dict[str, np.ndarray]


def session(path: Path) -> onnxruntime.InferenceSession:
    """Open a graph; threads that wait take no processor time."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def sentences(path: Path, tokenizer: Any, count: int) -> Feeds:
    """Return sentences that are neither short nor long, as inputs of an encoder."""
    parts = re.split(r"(?<=[.!?])\s+|\n\n+", path.read_text())
    texts = [part.strip() for part in parts if 30 < len(part.strip()) < 400][:count]
    made = tokenizer(texts, padding=True, truncation=True, max_length=LENGTH, return_tensors="np")
    return {name: array.astype(np.int64) for name, array in made.items()}


def squares(path: Path, processor: Any, count: int) -> Feeds:
    """Return the pictures of a folder as inputs of an encoder."""
    pictures = [Image.open(file) for file in sorted(path.iterdir())[:count]]
    return {"pixel_values": processor(pictures, return_tensors="np")["pixel_values"]}


def windows(path: Path, tokenizer: Any, count: int) -> Feeds:
    """Return the first tokens of a text in windows."""
    ids = np.array(tokenizer(path.read_text())["input_ids"][:count]).reshape(-1, WINDOW)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def whole(batch: Feeds, opened: onnxruntime.InferenceSession) -> Feeds:
    """Return all inputs of a graph: positions, and a cache that is empty, beside what is given."""
    rows, length = batch["input_ids"].shape
    feeds = {}
    for each in opened.get_inputs():
        if each.name == "position_ids":
            feeds[each.name] = np.tile(np.arange(length), (rows, 1))
        elif each.name.startswith("past"):
            feeds[each.name] = np.zeros((rows, each.shape[1], 0, each.shape[3]), np.float32)
        else:
            feeds[each.name] = batch[each.name]
    return feeds


def embeddings(path: Path, batch: Feeds) -> np.ndarray:
    """Return the mean of the hidden states of each sentence, or the class token, of length 1."""
    opened, found = session(path), []
    for start in range(0, len(next(iter(batch.values()))), 16):
        some = {i.name: batch[i.name][start : start + 16] for i in opened.get_inputs()}
        states = opened.run(None, some)[0]
        vectors = states[:, 0]
        if "attention_mask" in some:
            mask = some["attention_mask"][..., None]
            vectors = (states * mask).sum(1) / mask.sum(1)
        found.append(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    return np.concatenate(found)


def perplexity(path: Path, batch: Feeds) -> float:
    """Return the perplexity of all tokens but the first of each window."""
    opened, lost = session(path), []
    for ids in batch["input_ids"]:
        row = {"input_ids": ids[None], "attention_mask": np.ones_like(ids)[None]}
        logits = opened.run(["logits"], whole(row, opened))[0][0, :-1].astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        told = logits[np.arange(len(ids) - 1), ids[1:]] - np.log(np.exp(logits).sum(-1))
        lost.append(-told)
    return float(np.exp(np.concatenate(lost).mean()))


def flags_of(mode: str, rows: Path) -> list[str]:
    """Return what a mode says, as flags of ``ffmerge share``."""
    dtype, *more = mode.split(",")
    flags = ["--dtype", dtype]
    for each in more:
        if each == "data":
            flags += ["--data", str(rows)]
        elif each.isdigit():
            flags += ["--block", each]
        else:
            flags += ["--budget", each]
    return flags


def share(graph: Path, path: Path, flags: list[str]) -> tuple[float, int]:
    """Write a graph in fewer bits; return the processor time and the largest memory it took."""
    command = [sys.executable, "-m", "ffmerge", "share", str(graph), str(path), *flags]
    launched = [sys.executable, "-c", LAUNCH, *command]
    seconds, kilobytes = subprocess.run(launched, check=True, stdout=subprocess.PIPE).stdout.split()
    return float(seconds), int(kilobytes) * 1024


def read(folder: Path, path: Path, generates: bool, part: int = 0) -> Feeds:
    """Return the rows of a text or of a folder of pictures: to calibrate with, or of part 1."""
    if path.is_dir():
        return squares(path, AutoImageProcessor.from_pretrained(folder), SENTENCES[part])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if generates:
        return windows(path, tokenizer, TOKENS[part])
    return sentences(path, tokenizer, SENTENCES[part])


def prepared(
    graph: Path, package: Path, data: tuple[Path, Path], rows: Path
) -> Callable[[Path], float]:
    """Write the inputs to calibrate with, and return what holds a graph against ``graph``."""
    opened = session(graph)
    generates = "logits" in [output.name for output in opened.get_outputs()]
    calibration, held_out = (
        read(package, path, generates, number) for number, path in enumerate(data)
    )
    if generates:
        np.savez(rows, **whole(calibration, opened))
        return lambda path: perplexity(path, held_out)
    np.savez(rows, **calibration)
    expected = embeddings(graph, held_out)
    return lambda path: float((embeddings(path, held_out) * expected).sum(1).mean())


def main() -> None:
    """Print a row for each mode."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("package", "calibration", "held_out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--original", type=Path, help="package that cosines are held against")
    parser.add_argument("modes", nargs="*", default=MODES)
    given = parser.parse_args()
    graph = given.package / "model.onnx"
    print("| mode | bytes | perplexity or cosine | processor time of rounding | peak |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        data = given.calibration, given.held_out
        original = (given.original or given.package) / "model.onnx"
        measure = prepared(original, given.package, data, folder / "rows.npz")
        for number, mode in enumerate(given.modes):
            path, taken, peak = graph, 0.0, 0
            if mode != "fp32":
                path = folder / f"{number}.onnx"
                taken, peak = share(graph, path, flags_of(mode, folder / "rows.npz"))
            files = [file for file in (path, Path(f"{path}_data")) if file.exists()]
            size = sum(file.stat().st_size for file in files)
            cells = f"{size:,} | {measure(path):.4f} | {taken:.0f} s | {peak / 1e6:,.0f} MB"
            print(f"| {mode} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
