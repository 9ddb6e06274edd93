"""chrF of what a translator's package writes, held against transformers' generate()."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sacrebleu
import torch
from reference.tasks import REFERENCES, numeral_pairs, tokenizer

from ffmerge.config import ExportConfig
from ffmerge.exporter.package import export
from ffmerge.models import checkpoint
from ffmerge.models.examples import Examples, from_arrays
from ffmerge.models.manifest import Manifest
from ffmerge.runtime_tests import translation
from ffmerge.runtime_tests.runtimes.registry import find_runtime
from ffmerge.runtime_tests.validate import validate

ROWS = 24


def rows() -> Examples:
    return from_arrays(REFERENCES["numerals"].load("test", count=ROWS))


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    numerals = REFERENCES["numerals"]
    folder = tmp_path_factory.mktemp("numerals") / "package"
    examples = from_arrays(numerals.load("validation", count=ROWS))
    config = ExportConfig(
        task="text2text-generation"
    )  # two graphs: no cache, tests/test_serving.py has
    export(checkpoint.load(numerals.folder), folder, config, numerals.folder, examples)
    return folder


def test_chrf_is_that_of_the_texts_that_transformers_generates(package: Path) -> None:
    pairs = numeral_pairs("test", 0, ROWS)
    model = checkpoint.load(REFERENCES["numerals"].folder)
    model.generation_config.eos_token_id = model.config.eos_token_id
    words = tokenizer("numerals_marian")
    inputs = words([english for english, _ in pairs], return_tensors="pt", padding=True)
    with torch.no_grad():
        ids = model.generate(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"],
            num_beams=1, do_sample=False, max_new_tokens=64,
        )  # fmt: skip
    guesses = words.batch_decode(ids, skip_special_tokens=True)
    expected = sacrebleu.corpus_chrf(guesses, [[german for _, german in pairs]]).score
    result = validate(package, data=rows())
    found = {row.data: row for row in result.metrics if row.name == "chrF"}
    assert found["--data"].value == pytest.approx(expected, abs=1e-9)  # measured 0
    assert (found["--data"].examples, found["--data"].by) == (ROWS, "cpu")
    assert found["real rows of the package"].value > 95 < expected
    assert result.not_measured is None and result.ok


def test_other_words_have_less(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = translation.decoder

    def wrong(served: Any, batch: Any) -> Any:
        step, calls = right(served, batch), iter(range(1000))
        return lambda ids: np.roll(step(ids), next(calls) % 3 == 2, axis=-1)

    runtime = find_runtime("cpu")
    graphs = Manifest.read(package).served().items()
    served = [(graph, runtime.open(package / path)) for path, graph in graphs]
    good = translation.measure_chrf(package, served, rows().batches(8)).value
    monkeypatch.setattr(translation, "decoder", wrong)
    assert translation.measure_chrf(package, served, rows().batches(8)).value < 80 < good


def test_why_chrf_is_missing_is_told(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no tokenizer.json" in str(translation.why_not(package.parent))
    monkeypatch.setattr(translation, "find_spec", lambda name: None)
    assert "install sacrebleu" in str(translation.why_not(package))
    result = validate(package)
    assert result.not_measured == translation.why_not(package)
    assert not [row for row in result.metrics if row.name == "chrF"]


@pytest.mark.parametrize(
    ("generation", "config", "ends"),
    [({"eos_token_id": 0}, {"eos_token_id": 5}, [0]), ({}, {"eos_token_id": [0, 2]}, [0, 2])],
)
def test_the_end_token_may_be_id_0(
    tmp_path: Path, generation: dict[str, Any], config: dict[str, Any], ends: list[int]
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert translation._ends(tmp_path) == ends
