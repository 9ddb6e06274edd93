"""The three set-ups of the paper (arXiv 2501.06126), merged by its method and by ``calibrated``.

    python examples/paper.py gpt2|vit|opus [--k 13] [--out FOLDER]

Fetches checkpoint and data from the hub: gpt2-large on Wikitext-103, ViT-B/16 on ImageNet-1k (a
gated data set: log in first), opus-mt-zh-en on Tatoeba. Statistics are of about 10,000 positions
of the validation split, the window is chosen on more of it; a third of the sublayers is removed
(``--k`` for another part; the paper has 13, 19, 36 of GPT-2's layers, 5, 7, 12 of ViT's and 3, 4, 6
of Marian's encoder and decoder). Untuned: ``ffmerge merge --recover`` goes on from there.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import datasets
import numpy as np
from transformers import AutoImageProcessor, AutoTokenizer

import ffmerge
from ffmerge.models.examples import Examples, from_arrays
from ffmerge.models.metrics import IGNORED
from ffmerge.passes.weights.merge import Merge


@dataclass(frozen=True)
class Setup:
    """A checkpoint and a data set by their hub ids, and how rows become model inputs."""

    model: str
    data: tuple[str, str | None, str]  # id, configuration, split
    k: int
    rows: tuple[int, int]  # for the statistics, and to choose the window
    read: Callable[[Any, str, int], Examples]


def text(rows: Any, model: str, count: int) -> Examples:
    """Return blocks of 1024 tokens of the whole text, as the paper tunes on."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    length = min(1024, tokenizer.model_max_length)
    ids = tokenizer("\n\n".join(rows["text"]))["input_ids"]
    blocks = np.asarray(ids[: len(ids) // length * length]).reshape(-1, length)
    return from_arrays({"input_ids": blocks[:count]})


def images(rows: Any, model: str, count: int) -> Examples:
    """Return pictures, prepared when they are asked for, with their classes."""
    processor = AutoImageProcessor.from_pretrained(model)

    def take(wanted: Any) -> dict[str, Any]:
        part = rows[list(wanted)]
        pictures = [picture.convert("RGB") for picture in part["image"]]
        pixels = processor(pictures, return_tensors="np")["pixel_values"]
        return {"pixel_values": pixels, "labels": np.asarray(part["label"])}

    return Examples(range(min(count, len(rows))), take)


def pairs(rows: Any, model: str, count: int) -> Examples:
    """Return Chinese sentences with their English translations; the data set holds eng to zho."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    part = rows[: min(count, len(rows))]
    cut = {"padding": True, "truncation": True, "max_length": 128, "return_tensors": "np"}
    inputs = dict(tokenizer(part["targetString"], **cut))
    labels = tokenizer(text_target=part["sourceString"], **cut)["input_ids"]
    labels = np.where(labels == tokenizer.pad_token_id, IGNORED, labels)
    return from_arrays({**inputs, "labels": labels})


SETUPS = {
    "gpt2": Setup(
        "openai-community/gpt2-large", ("Salesforce/wikitext", "wikitext-103-raw-v1", "validation"),
        13, (10, 60), text,
    ),
    "vit": Setup(
        "google/vit-base-patch16-224", ("ILSVRC/imagenet-1k", None, "validation"), 5, (52, 2000),
        images,
    ),
    "opus": Setup(
        "Helsinki-NLP/opus-mt-zh-en", ("Helsinki-NLP/tatoeba_mt", "eng-zho", "validation"), 3,
        (700, 2000), pairs,
    ),
}  # fmt: skip


def merge(setup: Setup, model: str, rows: Any, k: int, method: str, out: str | None) -> Merge:
    """Merge k layers of the checkpoint ``model``, judged on ``rows`` of a data set."""
    first, more = setup.rows
    examples = setup.read(rows, model, first + more)
    calibration = examples.of(examples.rows[:first])
    validation = examples.of(examples.rows[first:])
    loaded = ffmerge.load(model)
    config = ffmerge.MergeConfig(k=k, method=method, sync=True, batch_size=8)
    result = ffmerge.merge_(loaded, calibration, config, validation)
    if out:
        ffmerge.save(loaded, f"{out}-{method}")
    return result


def main() -> None:
    """Fetch, merge by both methods, print what is left of the metric."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("setup", choices=SETUPS)
    parser.add_argument("--k", type=int)
    parser.add_argument("--out", help="save the merged checkpoints as OUT-permute, OUT-calibrated")
    chosen = parser.parse_args()
    setup = SETUPS[chosen.setup]
    name, configuration, split = setup.data
    rows = datasets.load_dataset(name, configuration, split=split)
    for method in ("permute", "calibrated"):
        record = merge(setup, setup.model, rows, chosen.k or setup.k, method, chosen.out).record
        layers = sorted(set(chain(*(group.layers for group in record.groups))))
        metric, removed = record.metric, 1 - record.parameters_after / record.parameters_before
        print(
            f"{method}: layers {layers[0]}-{layers[-1]} share, {removed:.2%} of the parameters "
            f"removed; {metric['name']} {metric['before']:.4f} -> {metric['merged']:.4f}"
        )


if __name__ == "__main__":
    main()
