"""Batches in parts: the numbers stay, and what a pass takes is bounded."""

import numpy as np
import pytest
import torch
from tiny import bert, gpt2

from ffmerge.config import RecoverConfig
from ffmerge.models.examples import from_arrays
from ffmerge.passes.weights import evaluate, parts, recover
from ffmerge.passes.weights.evaluate import score_for

IDS = np.random.default_rng(0).integers(1, 97, (12, 10))
DATA = from_arrays({"input_ids": IDS, "attention_mask": np.ones_like(IDS)})


def test_a_pass_has_no_more_rows_than_its_logits_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "LOGITS", 3 * 10 * 97 * 4)  # of three rows
    model, seen = gpt2(32, 64, 2), []
    model.register_forward_hook(lambda *call: seen.append(len(call[-1].logits)))
    whole = score_for(model, "text-generation", DATA, 12).measure(model)
    assert seen == [3, 3, 3, 3]
    ids = torch.from_numpy(IDS)
    with torch.no_grad():
        logits = model(ids).logits[:, :-1].double().flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
    assert whole == pytest.approx(float(loss.exp()), rel=1e-6)  # measured 7e-8


def test_a_model_without_a_vocabulary_takes_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "LOGITS", 1)
    assert parts.rows_by_logits(bert(32, 64, 2), {"input_ids": IDS}) == 12


def test_fidelity_goes_by_some_outputs_where_there_are_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original, other = gpt2(32, 64, 2), gpt2(32, 64, 2)
    with torch.no_grad():
        other.transformer.h[1].mlp.c_proj.weight *= 0.5
        ids = torch.from_numpy(IDS)
        cosines = torch.cosine_similarity(original(ids).logits, other(ids).logits, dim=-1)
    found = {}
    for held in (1 << 26, 97 * 42):  # all 120 positions, and every third
        monkeypatch.setattr(evaluate, "HELD", held)
        score = score_for(original, "text-generation", DATA, 4, "fidelity")
        assert score.measure(original) == pytest.approx(1, abs=1e-6)  # measured 6e-8
        found[held] = score.measure(other)
    whole, part = found.values()
    assert whole == pytest.approx(float(cosines.mean()), abs=1e-6)  # measured 6e-8
    assert part == pytest.approx(float(cosines.view(3, 40)[:, ::3].mean()), abs=1e-6)


def test_recovery_takes_as_many_rows_as_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = gpt2(32, 64, 2)
    config = RecoverConfig(task="text-generation")
    taken = {}
    for saved in (1 << 30, 1 << 20):
        monkeypatch.setattr(parts, "SAVED", saved)
        found = recover._micro_batches(model, gpt2(32, 64, 2), config, DATA)
        taken[saved] = [len(part["input_ids"]) for part in found]
    assert taken[1 << 30] == [12]
    one = (1 << 20) // taken[1 << 20][0]  # a row of 10 tokens keeps at most so many bytes
    # what attention, norms and the two layers keep is of the order of 20 d + 4 f floats a layer
    assert 2 * 10 * (20 * 32 + 4 * 64) * 4 / 3 < one < 2 * 10 * (20 * 32 + 4 * 64) * 4 * 3
    assert sum(taken[1 << 20]) == 12
