"""chrF of the texts that a package writes, greedily, by its own tokenizer."""

from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from ffmerge.files import read_json
from ffmerge.models.manifest import MetricResult
from ffmerge.models.metrics import IGNORED
from ffmerge.models.probe import Array
from ffmerge.runtime_tests.decode import Served, decoder, greedy

TOKENIZER = "tokenizer.json"


def why_not(folder: Path) -> str | None:
    """Return why texts of the package in ``folder`` cannot be measured, None if they can."""
    if not (folder / TOKENIZER).exists():
        return f"chrF is of texts, and the package has no {TOKENIZER}."
    if not find_spec("sacrebleu"):
        return "chrF was not measured: install sacrebleu (pip install 'ffmerge[translation]')."
    return None


def measure_chrf(
    folder: Path, served: Served, batches: Iterable[Mapping[str, Array]]
) -> MetricResult:
    """Return chrF (0 to 100) of what encoder and decoder write, against the texts of the labels.

    A text begins as ``decoder_input_ids`` does, has at most as many ids as the longest label of
    its batch, and ends before the model's end token.
    """
    from sacrebleu import corpus_chrf
    from tokenizers import Tokenizer

    tokenizer, ends = Tokenizer.from_file(str(folder / TOKENIZER)), _ends(folder)

    def texts(rows: Array) -> list[str]:
        written = []
        ended = np.cumsum(np.isin(rows, [*ends, IGNORED]), axis=1) > 0
        for row, over in zip(rows, ended, strict=True):
            written.append(str(tokenizer.decode(row[~over].tolist())))
        return written

    guesses, answers = list[str](), list[str]()
    for batch in batches:
        start, longest = batch["decoder_input_ids"][:, :1], batch["labels"].shape[1]
        guesses += texts(greedy(decoder(served, batch), start, longest))
        answers += texts(batch["labels"])
    return MetricResult("chrF", float(corpus_chrf(guesses, [answers]).score), len(guesses))


def _ends(folder: Path) -> list[int]:
    """Return the end tokens that the package's generation settings or configuration name."""
    for name in ("generation_config.json", "config.json"):
        if not (folder / name).exists():
            continue
        end = read_json(folder / name).get("eos_token_id")
        if isinstance(end, list):
            return end
        if end is not None:  # Marian's is 0
            return [end]
    return []
