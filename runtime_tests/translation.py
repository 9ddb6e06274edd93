"""chrF of the texts that a package writes, greedily, by its own tokenizer."""

from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from ffmerge.files import read_json
from ffmerge.models.manifest import GraphRecord, MetricResult
from ffmerge.models.metrics import IGNORED
from ffmerge.models.probe import Array
from ffmerge.runtime_tests.replay import decoder
from ffmerge.runtime_tests.runtimes.base import Session

TOKENIZER = "tokenizer.json"


def why_not(folder: Path) -> str | None:
    """Return why texts of the package in ``folder`` cannot be measured, None if they can."""
    if not (folder / TOKENIZER).exists():
        return f"chrF is of texts, and the package has no {TOKENIZER}."
    if not find_spec("sacrebleu"):
        return "chrF was not measured: install sacrebleu (pip install 'ffmerge[translation]')."
    return None


def measure_chrf(
    folder: Path,
    served: Sequence[tuple[GraphRecord, Session]],
    batches: Iterable[Mapping[str, Array]],
) -> MetricResult:
    """Return chrF (0 to 100) of what encoder and decoder write, against the texts of the labels.

    A text begins as ``decoder_input_ids`` does, has at most as many ids as the longest label of
    its batch, and ends before the model's end token.
    """
    from sacrebleu import corpus_chrf
    from tokenizers import Tokenizer

    tokenizer, ends = Tokenizer.from_file(str(folder / TOKENIZER)), _ends(folder)

    def texts(rows: Array) -> list[str]:
        kept = np.cumsum(np.isin(rows, [*ends, IGNORED]), axis=1) == 0
        return [
            str(tokenizer.decode(row[own].tolist())) for row, own in zip(rows, kept, strict=True)
        ]

    guesses, answers = list[str](), list[str]()
    for batch in batches:
        step = decoder(served, batch)
        ids, got = batch["decoder_input_ids"][:, :1], []
        for _ in range(batch["labels"].shape[1]):
            ids = step(ids)[:, -1].argmax(-1)[:, None]
            got.append(ids)
        guesses += texts(np.concatenate(got, 1))
        answers += texts(batch["labels"])
    return MetricResult("chrF", float(corpus_chrf(guesses, [answers]).score), len(guesses))


def _ends(folder: Path) -> list[int]:
    """Return the end tokens that the package's generation settings or configuration name."""
    for name in ("generation_config.json", "config.json"):
        end = read_json(folder / name).get("eos_token_id") if (folder / name).exists() else None
        if end is not None:  # Marian's is 0
            return end if isinstance(end, list) else [end]
    return []
