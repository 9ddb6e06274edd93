"""The three reference tasks: their data as arrays of model inputs, and their metrics."""

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import sacrebleu
import torch
from reference import numerals, village
from transformers import AutoTokenizer

from ffmerge.models import digits
from ffmerge.models.examples import Examples
from ffmerge.passes.weights.evaluate import score_for

Arrays = dict[str, np.ndarray]
SPLITS = ("train", "calibration", "validation", "test")
ROOT = Path(__file__).parents[2]
WORDS = 64  # of a page of text, its first token included


@dataclass(frozen=True)
class Reference:
    """A task: where its model is, its data by split and seed, and what ``metric`` measures.

    ``load(split, seed=0)`` returns arrays with one row for each example; no row is in two splits.
    ``metric(model, examples)`` returns named values, the first of them the task's own metric.
    """

    folder: Path
    task: str
    load: Callable[..., Arrays]
    metric: Callable[[Any, Examples], dict[str, float]]


def load_text(split: str, seed: int = 0, count: int = 400) -> Arrays:
    """Return ``count`` pages of the village as ``input_ids`` (N, 64), nothing padded."""
    random = np.random.RandomState([SPLITS.index(split), seed])
    pages = [" ".join(village.page(random, WORDS - 1)) for _ in range(count)]
    encoded = tokenizer("village_lm")(pages, return_tensors="np")
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def load_numerals(split: str, seed: int = 0, count: int = 600) -> Arrays:
    """Return ``count`` English texts as ``input_ids`` and their German as ``labels``.

    Padded to the longest of them; ``labels`` hold -100 there, ``decoder_input_ids`` are the
    labels moved by one place as Marian does.
    """
    pairs = numeral_pairs(split, seed, count)
    encode = tokenizer("numerals_marian")
    english = encode([e for e, _ in pairs], padding=True, return_tensors="np")
    german = encode([g for _, g in pairs], padding=True, return_tensors="np")
    targets, start = german["input_ids"], np.full((count, 1), encode.pad_token_id)
    return {
        "input_ids": english["input_ids"],
        "attention_mask": english["attention_mask"],
        "decoder_input_ids": np.concatenate([start, targets[:, :-1]], 1),
        "labels": np.where(german["attention_mask"] == 1, targets, -100),
    }


def numeral_pairs(split: str, seed: int, count: int) -> list[tuple[str, str]]:
    """Return English and German texts; a checksum of the English text names its only split."""
    random = np.random.RandomState([SPLITS.index(split), seed])
    own = {"train": range(5), "calibration": (5,), "validation": (6,), "test": (7,)}[split]

    def drawn() -> Iterator[tuple[str, str]]:
        while True:
            english, german = numerals.pair(random)
            if zlib.crc32(english.encode()) % 8 in own:
                yield english, german

    pairs = drawn()
    return [next(pairs) for _ in range(count)]


def _score(task: str) -> Callable[[Any, Examples], dict[str, float]]:
    def metric(model: Any, examples: Examples) -> dict[str, float]:
        score = score_for(model, task, examples, 100)
        return {score.name: score.measure(model)}

    return metric


def _translation(model: Any, examples: Examples) -> dict[str, float]:
    """Return chrF and BLEU of greedy translations and the perplexity of the right ones."""
    decode = tokenizer("numerals_marian")
    guesses, answers = [], []
    for batch in examples.batches(100):
        with torch.no_grad():
            tokens = model.generate(
                input_ids=torch.from_numpy(batch["input_ids"]),
                attention_mask=torch.from_numpy(batch["attention_mask"]),
                num_beams=1, do_sample=False, max_new_tokens=batch["labels"].shape[1],
            )  # fmt: skip
        right = np.where(batch["labels"] == -100, decode.pad_token_id, batch["labels"])
        guesses += decode.batch_decode(tokens, skip_special_tokens=True)
        answers += decode.batch_decode(right, skip_special_tokens=True)
    return {
        "chrF": sacrebleu.corpus_chrf(guesses, [answers]).score,
        "BLEU": sacrebleu.corpus_bleu(guesses, [answers]).score,
        **_score("text2text-generation")(model, examples),
    }


@cache
def tokenizer(name: str) -> Any:
    """Return the tokenizer shipped with a reference model."""
    return AutoTokenizer.from_pretrained(ROOT / "examples" / "reference" / name)


REFERENCES = {
    "digits": Reference(
        ROOT / "models" / "digits_vit", "image-classification", digits.load,
        _score("image-classification"),
    ),
    "village": Reference(
        ROOT / "examples" / "reference" / "village_lm", "text-generation", load_text,
        _score("text-generation"),
    ),
    "numerals": Reference(
        ROOT / "examples" / "reference" / "numerals_marian", "text2text-generation",
        load_numerals, _translation,
    ),
}  # fmt: skip
