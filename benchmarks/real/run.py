"""What is kept of a trained model at 10 to 25 % of its parameters removed, by each method.

``python benchmarks/real/run.py NAME FOLDER`` measures the checkpoint of FOLDER, which
``benchmarks/trained.py`` fetches, and adds rows to ``benchmarks/results/real.json``; ``--methods``
and ``--parts`` choose. ``python benchmarks/real/run.py --picture docs/frontier.svg`` prints the
table and draws it. Language models are measured by the perplexity of windows of 256 tokens,
encoders of text by the cosine of the mean of their hidden states with the original's, encoders of
pictures by that of the class token; untuned. Text is what every Python brings (``texts.py``),
pictures what scikit-image does (``pictures.py``): one part calibrates, one chooses windows and
widths, one measures.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import finercut
import numpy as np
import pictures
import texts
import torch
from torch.nn.functional import cross_entropy, normalize
from transformers import AutoImageProcessor, AutoTokenizer

import ffmerge
from ffmerge.config import MergeConfig
from ffmerge.models import checkpoint
from ffmerge.models.examples import Examples, from_arrays
from ffmerge.models.find import find
from ffmerge.passes.weights import merge as merging
from ffmerge.passes.weights import narrow, widths
from ffmerge.passes.weights.methods import in_place, size_of
from ffmerge.passes.weights.widths import parameters_of

RESULTS = Path(__file__).parent.parent / "results" / "real.json"
METHODS = (
    "narrow", "narrow, even", "narrow, tuned", "both", "calibrated", "permute", "low-rank",
    "drop-ffn", "drop-layer", "finercut",
)  # fmt: skip
BOTH = "both"  # half of it by groups of calibrated, which are then narrowed with all others
TUNED = "narrow, tuned"  # each narrowed sublayer trained alone for as many steps
STEPS = {True: 80, False: 300}  # of a language model, of an encoder
PARTS = (10, 15, 20, 25)  # percent of all parameters removed
ROWS = {"calibrate": 1024, "validate": 64, "test": 256}  # sentences of an encoder
BATCH = 32  # sentences
NEIGHBOURS = 10  # of an embedding, that should stay its nearest
WINDOWS = {"calibrate": 48, "validate": 8, "test": 16}  # of a language model
LENGTH = 256  # tokens of a window


def windows(tokenizer: Any, part: str) -> Examples:
    """Return windows of whole documents, drawn from all of them."""
    rows = []
    for text in texts.part(part):
        ids = tokenizer(text)["input_ids"]
        rows += [ids[at : at + LENGTH] for at in range(0, len(ids) - LENGTH + 1, LENGTH)]
    np.random.default_rng(0).shuffle(rows)
    return from_arrays({"input_ids": np.array(rows[: WINDOWS[part]])})


def sentences(tokenizer: Any, part: str) -> Examples:
    """Return sentences, those of like length side by side, for they are padded to the longest."""
    lines = texts.sentences(part)
    generator = np.random.default_rng(0)
    generator.shuffle(lines)
    lines = sorted(lines[: ROWS[part]], key=len)
    batches = [lines[start : start + BATCH] for start in range(0, len(lines), BATCH)]
    generator.shuffle(batches)
    lines = [line for batch in batches for line in batch]

    def take(rows: Any) -> dict[str, Any]:
        some = [lines[row] for row in rows]
        found = tokenizer(some, padding=True, truncation=True, max_length=128)
        return {name: np.asarray(ids) for name, ids in found.items()}

    return Examples(range(len(lines)), take)


def squares(processor: Any, part: str) -> Examples:
    """Return parts of photographs."""
    found = processor(pictures.part(part), return_tensors="np")
    return from_arrays({"pixel_values": found["pixel_values"]})


def perplexity(rows: Examples) -> Callable[[Any], dict[str, float]]:
    """Return what measures a language model: lower is better."""

    def measure(model: Any) -> dict[str, float]:
        losses = []
        for batch in rows.batches(2):
            ids = torch.as_tensor(batch["input_ids"])
            with torch.no_grad():
                logits = model(ids, use_cache=False).logits
            losses.append(float(cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())))
        return {"after": float(np.exp(np.mean(losses)))}

    return measure


def nearest(vectors: torch.Tensor) -> torch.Tensor:
    """Return of each of some vectors of length 1 which others are nearest, as a matrix of bools."""
    alike = vectors @ vectors.T
    alike.fill_diagonal_(-1)
    found = torch.zeros_like(alike, dtype=torch.bool)
    return found.scatter_(1, alike.topk(NEIGHBOURS).indices, True)


def cosine(rows: Examples, original: Any) -> Callable[[Any], dict[str, float]]:
    """Return what measures an encoder by the original's embeddings: higher is better.

    Beside the cosine stands which part of each one's nearest neighbours are the original's.
    """

    def embedded(model: Any) -> torch.Tensor:
        found = []
        for batch in rows.batches(BATCH):
            inputs = {name: torch.as_tensor(array) for name, array in batch.items()}
            with torch.no_grad():
                states = model(**inputs)[0]
            vectors = states[:, 0]  # the class token of a picture
            if "attention_mask" in inputs:
                mask = inputs["attention_mask"][..., None]
                vectors = (states * mask).sum(1) / mask.sum(1)
            found.append(normalize(vectors, dim=-1))
        return torch.cat(found)

    expected = embedded(original)

    def measure(model: Any) -> dict[str, float]:
        got = embedded(model)
        same = (nearest(got) & nearest(expected)).sum() / (NEIGHBOURS * len(got))
        return {"after": float((got * expected).sum(-1).mean()), "neighbours": float(same)}

    return measure


def evenly(model: Any, calibration: Examples, part: int) -> Any:
    """Return what rids every sublayer of the same part of its neurons: no widths are searched."""
    members, costs = find(model), {}
    for member in members:  # least where all lose the same part
        gone = np.arange(member.d_ff) / member.d_ff
        costs[member,] = gone**2 * member.d_ff * widths.per_neuron(model, (member,))
    even = widths.cheapest(model, costs, part * size_of(model)[0] // 100)
    return {members: narrow.fit(model, members, even, calibration.batches(8))}


def rows_of(folder: str, methods: list[str], parts: list[int], save: Path | None) -> Any:
    """Yield a row for each method and part; ``save`` becomes the first checkpoint, narrowed."""
    model = ffmerge.load(folder)
    is_language = type(model).__name__.endswith("ForCausalLM")
    read, processors = sentences, AutoTokenizer
    if is_language:
        read = windows
    elif model.main_input_name == "pixel_values":
        read, processors = squares, AutoImageProcessor
    processor = processors.from_pretrained(folder)
    data = [read(processor, part) for part in ROWS]
    test = data.pop()
    measure = perplexity(test) if is_language else cosine(test, model)
    before, count = measure(model)["after"], size_of(model)[0]
    for part, method in product(parts, methods):
        start = time.process_time()
        with reduced(model, method, part, data, save) as left:
            seconds = time.process_time() - start
            values = measure(model)
        yield {
            "method": method, "part": part, "removed": 1 - left / count, "before": before,
            **values, "processor_s": round(seconds), "lower_is_better": is_language,
        }  # fmt: skip


@contextmanager
def reduced(
    model: Any, method: str, part: int, data: list[Examples], save: Path | None
) -> Iterator[int]:
    """Have a model smaller by a method, for the length of the block; give its parameters."""
    calibration, held_out = data
    is_language = type(model).__name__.endswith("ForCausalLM")
    count = size_of(model)[0]
    if method == "finercut":
        rows = held_out.of(held_out.rows[: 1 if is_language else BATCH])
        paths, gone = finercut.chosen(model, [*rows.batches(BATCH)], part * count // 100)
        with finercut.without(model, paths):
            yield count - gone
        return
    if method == BOTH:
        with shared(model, part / 2, data):
            size = size_of(model)[0]
            rest = 100 * (1 - (1 - part / 100) * count / size)
            asked = {"method": "narrow", "budget": f"-{rest:.4f}%"}
            config = MergeConfig(batch_size=8 if is_language else BATCH, **asked)
            _, merged = merging.choose(model, calibration, held_out, config)
            with in_place(model, merged):
                yield size_of(model, merged)[0]
        return
    if method == "narrow, even":
        merged = evenly(model, calibration, part)
    else:
        asked: dict[str, Any] = {"budget": f"-{part}%"}
        if method == TUNED:
            method, asked["tune"] = "narrow", STEPS[is_language]
        elif method != "narrow":
            asked = {"k": 1 + round(part / 100 * count / parameters_of(model, find(model)[0]))}
        config = MergeConfig(method=method, batch_size=8 if is_language else BATCH, **asked)
        merge, merged = merging.choose(model, calibration, held_out, config)
        if save and not save.exists():
            smaller = copy.deepcopy(model)
            merging.apply_(smaller, merge, merged)
            checkpoint.save(smaller, save, Path(model.name_or_path))
    with in_place(model, merged):
        yield size_of(model, merged)[0]


@contextmanager
def shared(model: Any, part: float, data: list[Examples]) -> Iterator[None]:
    """Have groups share by the method calibrated, for the length of the block."""
    is_language = type(model).__name__.endswith("ForCausalLM")
    config = MergeConfig(
        method="calibrated", budget=f"-{part}%", batch_size=8 if is_language else BATCH
    )
    merge, merged = merging.choose(model, *data, config)
    with in_place(model, merged):
        model.config.ffmerge = merge.record.to_json()
        try:
            yield
        finally:
            del model.config.ffmerge


def kept(row: dict[str, Any]) -> float:
    """Return the percent of the original's score that is left; of a perplexity its inverse."""
    share = row["after"] / row["before"]
    if row["lower_is_better"]:
        share = 1 / share
    return float(100 * share)


def cell(row: dict[str, Any]) -> str:
    """Return what the table says: percent of the original's score, and what was removed."""
    return f"{kept(row):.1f} % ({row['after']:.4g} at -{100 * row['removed']:.1f} %)"


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Return the Markdown of all models."""
    lines = ["| model | method | " + " | ".join(f"-{part} %" for part in PARTS) + " |"]
    lines.append("|---" * (len(PARTS) + 2) + "|")
    for name, rows in results.items():
        for method in METHODS:
            cells = {row["part"]: cell(row) for row in rows if row["method"] == method}
            if cells:
                texts_ = " | ".join(cells.get(part, "") for part in PARTS)
                lines.append(f"| {name} | {method} | {texts_} |")
    return "\n".join(lines)


def draw(results: dict[str, list[dict[str, Any]]], file: str) -> None:
    """Draw what is left of the score over what was removed."""
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    for plot, (name, rows) in zip(figure.subplots(1, len(results)), results.items(), strict=True):
        for number, method in enumerate(METHODS):
            points = sorted((r["removed"], kept(r)) for r in rows if r["method"] == method)
            if points:
                x = [0.0, *(100 * removed for removed, _ in points)]
                y = [100.0, *(share for _, share in points)]
                plot.plot(x, y, ".-", color=f"C{number}", label=method)
        plot.set(title=name, xlabel="% of parameters removed", ylim=(0, 102))
        plot.legend(fontsize="small")
    figure.axes[0].set_ylabel("% of the original's score")
    with matplotlib.rc_context({"svg.hashsalt": "ffmerge"}):
        figure.savefig(file, metadata={"Date": None})


def main() -> None:
    """Measure a checkpoint, or print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", nargs="?")
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    parser.add_argument("--parts", nargs="+", type=int, default=[*PARTS])
    parser.add_argument("--save", type=Path, help="also write the first checkpoint that is made")
    parser.add_argument("--picture", help="also draw an .svg")
    arguments = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    if arguments.folder:
        asked = arguments.methods, arguments.parts, arguments.save
        for row in rows_of(arguments.folder, *asked):
            print(row, flush=True)
            rows = results.setdefault(arguments.name, [])
            rows[:] = [r for r in rows if (r["method"], r["part"]) != (row["method"], row["part"])]
            rows.append(row)
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))
    if arguments.picture:
        draw(results, arguments.picture)


if __name__ == "__main__":
    main()
