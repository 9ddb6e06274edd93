"""What a fit reads without passes is what it reads with them."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from drawn import data_of
from recovering import difference, values_of
from tiny import bert, gpt2, vit
from tiny_wider import GATED

from ffmerge.config import MergeConfig
from ffmerge.models.find import find
from ffmerge.passes.weights import cache, calibrated, methods
from ffmerge.passes.weights.cache import ActivationCache
from ffmerge.passes.weights.calibrated import side_by_side
from ffmerge.passes.weights.evidence import Evidence
from ffmerge.passes.weights.merge import merge_

ALONE = {
    "vit": lambda: vit(32, 64, 4), "gpt2": lambda: gpt2(32, 64, 4),
    "llama": lambda: GATED["llama"](4), "phi3": lambda: GATED["phi3"](4),
}  # fmt: skip


def _cache(model: Any, batches: list[Any], tokens: int = 10**9) -> ActivationCache:
    return ActivationCache(model, {"layers": find(model)[:3]}, lambda: batches, tokens)


def _average(model: Any) -> tuple[Any, Any]:
    members = find(model)[:3]
    return members, methods.average(model, members, Evidence())


def _batches(model: Any) -> list[Mapping[str, Any]]:
    data = data_of(model, 12)
    return [{name: x[i : i + 4] for name, x in data.items()} for i in (0, 4, 8)]


@pytest.mark.parametrize("name", ALONE)
def test_what_is_kept_is_what_passes_give(name: str) -> None:
    """Of all batches: by merged weights, and after the first time without a pass."""
    model = ALONE[name]()
    (members, weights), batches = _average(model), _batches(model)
    kept = _cache(model, batches)
    passes = list(side_by_side(model, members, weights, batches, 10**9))
    assert kept.replay(members[:1], weights) is not None  # records
    runs: list[int] = []
    handle = model.register_forward_pre_hook(lambda *_: runs.append(1))
    got = kept.replay(members, weights)
    assert got is not None
    found = list(got)
    handle.remove()
    assert len(found) == len(passes) == 3
    assert runs == []
    for own, other in zip(found, passes, strict=True):
        assert own.keys() == other.keys() == {0, 1, 2}
        for layer, (hidden, outputs) in own.items():
            wanted, put_out = other[layer]
            assert torch.equal(outputs, put_out)
            assert (hidden - wanted).abs().max() <= 1e-6 * wanted.abs().max()  # measured 0


def test_no_more_positions_are_kept_than_are_asked_for() -> None:
    model = gpt2(32, 64, 4)
    members, weights = _average(model)
    first = _batches(model)[0]["input_ids"].size
    for tokens, batches in ((first, 1), (first + 1, 2)):
        got = _cache(model, _batches(model), tokens).replay(members, weights)
        assert got is not None and len(list(got)) == batches


@pytest.mark.parametrize("make", [bert, lambda *sizes: gpt2(*sizes).bfloat16()])
def test_what_cannot_run_alone_costs_no_pass(make: Any) -> None:
    """A block that holds its maps itself (BERT), and a model of 16 bits."""
    model = make(32, 64, 4)
    members, weights = _average(model)
    kept = _cache(model, _batches(model))
    runs: list[int] = []
    model.register_forward_pre_hook(lambda *_: runs.append(1))
    assert kept.replay(members, weights) is None
    assert runs == []


def test_a_module_that_does_another_thing_alone_is_found_out_on_a_batch() -> None:
    model = gpt2(32, 64, 4)
    members, weights = _average(model)
    mlp = model.get_submodule(members[1].path)
    forward = type(mlp).forward
    mlp.forward = lambda x: forward(mlp, x) if x.shape[1] == 9 else forward(mlp, 2 * x)
    kept = _cache(model, _batches(model))
    runs: list[int] = []
    model.register_forward_pre_hook(lambda *_: runs.append(1))
    assert kept.replay(members, weights) is None
    assert kept.replay(members[:1], weights) is not None
    assert len(runs) == 1 + 3
    assert not any(module._forward_hooks for module in model.modules())


def test_no_more_is_kept_than_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = gpt2(32, 64, 4)
    (members, weights), batches = _average(model), _batches(model)
    positions = batches[0]["input_ids"].size
    size = len(batches) * len(members) * positions * 2 * 32 * 4  # inputs and outputs, float32
    for memory, fits in ((size, True), (size - 1, False)):
        monkeypatch.setattr(cache, "MEMORY", memory)
        assert (_cache(model, batches).replay(members, weights) is not None) == fits
    more = find(model)[:4]
    assert _cache(model, batches).replay(more, weights) is None  # of a layer it was not made for


@pytest.mark.parametrize("name", ALONE)
def test_a_search_is_the_same_without_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found, passes = [], []
    for memory in (cache.MEMORY, 0):
        monkeypatch.setattr(cache, "MEMORY", memory)
        real, ran = calibrated.side_by_side, list[int]()

        def counted(*args: Any, real: Any = real, ran: list[int] = ran) -> Any:
            ran.append(1)
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(calibrated, "side_by_side", counted)
            model = ALONE[name]()
            result = merge_(model, data_of(model), MergeConfig(k=2, method="residual"))
        found.append((result.candidates, values_of(model)))
        passes.append(len(ran))
    (ours, weights), (theirs, expected) = found
    assert passes[0] == 0 < passes[1]
    for own, other in zip(ours, theirs, strict=True):
        assert own.value == pytest.approx(other.value, rel=1e-6)  # measured 0
    assert difference(weights, expected) < 1e-6  # measured 0
