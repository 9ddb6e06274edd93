"""What a fit reads without passes is what it reads with them."""

from typing import Any

import pytest
import torch
from test_calibrated import _data
from test_recover import _difference, _values
from tiny import bert, gpt2, vit
from tiny_wider import GATED

from ffmerge.models.find import find
from ffmerge.passes.weights import activations, calibrated, methods, recorded
from ffmerge.passes.weights.calibrated import _side_by_side
from ffmerge.passes.weights.merge import MergeConfig, merge_
from ffmerge.passes.weights.recorded import Recorded
from ffmerge.passes.weights.settings import Settings

ALONE = {
    "vit": lambda: vit(32, 64, 4), "gpt2": lambda: gpt2(32, 64, 4),
    "llama": lambda: GATED["llama"](4), "phi3": lambda: GATED["phi3"](4),
}  # fmt: skip


def _recorded(model: Any, batches: list[Any], tokens: int = 10**9) -> Recorded:
    members = find(model)[:3]
    found = Recorded(model, tokens)
    pairs = {"layers": Settings().pairs(members)}
    found.begin(members)
    activations.collect(model, pairs, iter(batches), 30, False, found)
    return found


def _batches(model: Any) -> list[Any]:
    data = _data(model, 12)
    return [{name: x[i : i + 4] for name, x in data.items()} for i in (0, 4, 8)]


@pytest.mark.parametrize("name", ALONE)
def test_what_is_kept_is_what_passes_give(name: str) -> None:
    """Of all batches, though the statistics end with the first: by merged weights, no pass."""
    model = ALONE[name]()
    members, batches = find(model)[:3], _batches(model)
    kept = _recorded(model, batches)
    sharing = methods.average(model, members, methods.Evidence())
    passes = list(_side_by_side(model, members, sharing, batches, 10**9, forced=True))
    runs: list[int] = []
    handle = model.register_forward_pre_hook(lambda *_: runs.append(1))
    got = kept.side_by_side(members, sharing)
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


def test_a_block_that_holds_its_maps_is_run_as_a_whole() -> None:
    model = bert(32, 64, 4)
    members = find(model)[:3]
    sharing = methods.average(model, members, methods.Evidence())
    assert _recorded(model, _batches(model)).side_by_side(members, sharing) is None


def test_a_model_of_16_bits_is_run_as_a_whole() -> None:
    model = gpt2(32, 64, 4).bfloat16()
    members = find(model)[:3]
    sharing = methods.average(model, members, methods.Evidence())
    assert _recorded(model, _batches(model)).side_by_side(members, sharing) is None


def test_a_pass_goes_on_only_for_what_is_kept() -> None:
    """The statistics have enough with the first batch of three."""
    for make, passes in ((gpt2, 3), (bert, 1)):
        model, ran = make(32, 64, 4), list[int]()
        model.register_forward_pre_hook(lambda *_, ran=ran: ran.append(1))
        _recorded(model, _batches(model))
        assert len(ran) == passes + 1  # the first is of find


def test_a_pass_of_its_own_keeps_the_same() -> None:
    model = ALONE["llama"]()
    members, batches = find(model)[:3], _batches(model)
    sharing = methods.average(model, members, methods.Evidence())
    kept, own = _recorded(model, batches), Recorded(model, 10**9)
    own.begin(members)
    own.fill({"layers": [members]}, batches)
    found = [list(each.side_by_side(members, sharing) or ()) for each in (kept, own)]
    assert len(found[0]) == len(found[1]) == 3
    for one, other in zip(*found, strict=True):
        for layer in (0, 1, 2):
            assert all(map(torch.equal, one[layer], other[layer]))


def test_no_more_is_kept_than_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = gpt2(32, 64, 4)
    members, batches = find(model)[:3], _batches(model)
    sharing = methods.average(model, members, methods.Evidence())
    positions = batches[0]["input_ids"].size
    size = len(batches) * len(members) * positions * 2 * 32 * 4  # inputs and outputs, float32
    for memory, fits in ((size, True), (size - 1, False)):
        monkeypatch.setattr(recorded, "MEMORY", memory)
        kept = _recorded(model, batches)
        assert (kept.side_by_side(members, sharing) is not None) == fits
    kept = _recorded(model, batches)
    kept.begin(members[:2])
    assert kept.side_by_side(members, sharing) is None


@pytest.mark.parametrize("name", ALONE)
def test_a_search_is_the_same_without_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found, passes = [], []
    for memory in (recorded.MEMORY, 0):
        monkeypatch.setattr(recorded, "MEMORY", memory)
        real, ran = calibrated._side_by_side, list[int]()

        def counted(*args: Any, real: Any = real, ran: list[int] = ran) -> Any:
            ran.append(1)
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(calibrated, "_side_by_side", counted)
            model = ALONE[name]()
            result = merge_(model, _data(model), MergeConfig(k=2, method="residual"))
        found.append((result.candidates, _values(model)))
        passes.append(len(ran))
    (ours, weights), (theirs, expected) = found
    assert passes[0] == 0 < passes[1]
    for own, other in zip(ours, theirs, strict=True):
        assert own.value == pytest.approx(other.value, rel=1e-6)
    assert _difference(weights, expected) < 1e-6  # both measured 0
