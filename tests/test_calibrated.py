"""Closed forms against float64 solutions written out, and merges whose result is known."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from drawn import Arrays, data_of, outputs_of, own_of, seen_in
from scipy.optimize import linear_sum_assignment
from tiny import bert, gpt2, vit
from tiny_wider import GATED, SEQ2SEQ, relu_bert, t5

from ffmerge.config import MergeConfig
from ffmerge.models.find import find
from ffmerge.models.sublayer import stacks
from ffmerge.passes.weights import calibrated
from ffmerge.passes.weights.merge import merge_

# linear maps, Conv1D, gate and up apart, fused, and with biases; encoder and decoder
MODELS: dict[str, Callable[[], Any]] = {
    "vit": lambda: vit(32, 64, 4),
    "gpt2": lambda: gpt2(32, 64, 4),
    "bert": lambda: bert(32, 64, 4),
    "llama": GATED["llama"],
    "phi3": GATED["phi3"],
    "t5": lambda: t5(3, 3, feed_forward_proj="gated-gelu"),
    "marian": lambda: SEQ2SEQ["marian"](3, 3),
}


def _merged(make: Callable[[], Any], method: str = "calibrated") -> Any:
    """Return a model whose layers from 1 on are merged on ``data_of``."""
    model = make()
    config = MergeConfig(window=(1, 2), method=method, rank=3, batch_size=10)
    merge_(model, data_of(model), config, {k: x[:2] for k, x in data_of(model).items()})
    return model


def _make_copies(model: Any, shuffle: bool) -> None:
    """Make layer 2 of every stack a copy of layer 1, its neurons in another order."""
    for members in stacks(find(model)).values():
        order = torch.arange(members[1].d_ff)
        if shuffle:
            order = torch.randperm(members[1].d_ff, generator=torch.Generator().manual_seed(3))
        for a, b in zip(members[1].weights, members[2].weights, strict=True):
            value = model.get_parameter(a.name).detach().clone()
            model.get_parameter(b.name).data = a.reordered(value, order)


@pytest.mark.parametrize("shuffle", [False, True], ids=["equal", "permuted"])
@pytest.mark.parametrize("method", ["calibrated", "residual", "weights"])
@pytest.mark.parametrize("name", MODELS)
def test_copies_merge_without_loss(name: str, method: str, shuffle: bool) -> None:
    model = MODELS[name]()
    _make_copies(model, shuffle)
    data = data_of(model)
    before = outputs_of(model, data)
    size = sum(p.numel() for p in model.parameters())
    config = MergeConfig(window=(1, 2), method=method, rank=3)
    merge_(model, None if method == "weights" else data, config)
    assert (outputs_of(model, data) - before).abs().max() < 1e-5  # measured 2.1e-6
    assert sum(p.numel() for p in model.parameters()) < size


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_four_times_the_data_does_not_hurt(name: str) -> None:
    original = MODELS[name]()
    held_out = data_of(original, 64, seed=99)
    wanted = outputs_of(original, held_out)

    def error(rows: int, seed: int) -> float:
        model = MODELS[name]()
        config = MergeConfig(window=(1, 2), method="calibrated", tokens=100_000)
        merge_(model, data_of(model, rows, seed), config, {k: x[:1] for k, x in held_out.items()})
        return float((outputs_of(model, held_out) - wanted).norm() / wanted.norm())

    few, many = ([error(rows, seed) for seed in range(3)] for rows in (16, 64))
    assert np.mean(many) < np.mean(few)  # measured 0.82 and 0.84 of it


def _dead(model: Any) -> None:
    """Let a third of the neurons of layers 1 and 2 put out nothing, whatever they read."""
    for member in find(model)[1:3]:
        for weight in member.weights[:2]:
            model.get_parameter(weight.name).data[: member.d_ff // 3] = 0


def _same(model: Any, rows: int = 6) -> Arrays:
    return {"input_ids": np.full((rows, 9), 7), "decoder_input_ids": np.full((rows, 5), 7)}


SINGULAR: dict[str, tuple[Callable[[], Any], Callable[[Any], None], Callable[[Any], Arrays]]] = {
    "dead neurons": (relu_bert, _dead, data_of),
    "inputs that never change": (lambda: t5(3, 3), lambda m: None, _same),
    "fewer tokens than neurons": (relu_bert, lambda m: None, lambda m: data_of(m, 1)),
    "one row again and again": (
        relu_bert, lambda m: None, lambda m: {k: x.repeat(30, 0) for k, x in data_of(m, 1).items()}
    ),
    "all at once": (
        relu_bert, _dead, lambda m: {"input_ids": np.full((4, 1), 7)}
    ),
}  # fmt: skip


@pytest.mark.parametrize("method", ["calibrated", "residual"])
@pytest.mark.parametrize("what", SINGULAR)
def test_singular_statistics_give_a_finite_model(
    what: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one that is right on what it has seen, where that is too little to be wrong on."""
    monkeypatch.setattr(calibrated, "RIDGE", 1e-6)
    make, spoil, draw = SINGULAR[what]
    model = make()
    spoil(model)
    data = draw(model)
    before, other = outputs_of(model, data), data_of(model)
    plain = outputs_of(model, other)
    config = MergeConfig(window=(1, 2), method=method, rank=3)
    merge_(model, data, config, {k: x[:1] for k, x in data.items()})
    assert all(torch.isfinite(p).all() for p in model.parameters())
    after = outputs_of(model, other)
    assert (after - plain).norm() < 2 * plain.norm()  # measured 0.004 to 1.1 of it
    if what != "dead neurons":
        error = (outputs_of(model, data) - before).norm() / before.norm()
        assert error < 1e-5  # measured 3.8e-7


@pytest.mark.parametrize("name", ["bert", "gpt2", "marian"])
@pytest.mark.parametrize("method", ["calibrated", "residual"])
def test_padding_counts_for_nothing(name: str, method: str) -> None:
    """Whatever stands under the padding: bit for bit the same model."""
    merged = []
    for padding in (5, 44):
        model = MODELS[name]()
        data = data_of(model)
        mask = np.ones_like(data["input_ids"])
        for row in range(len(mask)):
            mask[row, 9 - row % 4 :] = 0
        data["input_ids"] = np.where(mask, data["input_ids"], padding)
        data["attention_mask"] = mask
        if model.config.is_encoder_decoder:
            mask = mask[:, :7]
            data["decoder_input_ids"] = np.where(mask, data["decoder_input_ids"], padding)
            data["decoder_attention_mask"] = mask
        config = MergeConfig(window=(1, 2), method=method, rank=2)
        merge_(model, data, config, {k: x[:1] for k, x in data.items()})
        merged.append(dict(model.named_parameters()))
    assert all(torch.equal(merged[0][name], merged[1][name]) for name in merged[0])


def test_a_bf16_model_stays_one_and_close_to_the_float32_merge() -> None:
    outputs = []
    for dtype in (torch.bfloat16, torch.float32):
        model = bert(32, 64, 4).bfloat16().to(dtype)
        config = MergeConfig(window=(1, 2), method="residual", rank=3)
        merge_(model, data_of(model), config, {k: x[:1] for k, x in data_of(model).items()})
        assert {p.dtype for p in model.parameters()} == {dtype}
        outputs.append(outputs_of(model.float(), data_of(model)))
    error = (outputs[0] - outputs[1]).norm()
    assert error < 2e-3 * outputs[1].norm()  # measured 3.6e-4


def _shuffled(model: Any, layer: int, seed: int) -> None:
    member = find(model)[layer]
    order = torch.randperm(member.d_ff, generator=torch.Generator().manual_seed(seed))
    for weight in member.weights:
        parameter = model.get_parameter(weight.name)
        parameter.data = weight.reordered(parameter.data, order)


@pytest.mark.parametrize("method", ["weights", "calibrated"])
@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("name", ["gpt2", "phi3"])
def test_the_order_in_which_a_member_holds_its_neurons_changes_nothing(
    name: str, layer: int, method: str
) -> None:
    """Also that of the first, which the others are matched to: then the merge is reordered."""
    outputs = []
    for shuffle in (False, True):
        model = MODELS[name]()
        if shuffle:
            _shuffled(model, layer, seed=5)
        data = None if method == "weights" else data_of(model)
        merge_(model, data, MergeConfig(window=(0, 2), method=method))
        outputs.append(outputs_of(model, data_of(model)))
    assert (outputs[0] - outputs[1]).abs().max() < 2e-5  # measured 2.6e-6


def test_the_first_member_keeps_its_neurons_where_they_are() -> None:
    for method in ("permute", "copy-anchor"):
        model = bert(32, 64, 4)
        data, own = data_of(model), [own_of(model, member)["0 weight"] for member in find(model)]
        seen, want = seen_in(model, data), own[0]
        if method == "permute":
            f = len(want)
            for other in (1, 2):
                c = np.corrcoef(seen[0]["0 out"].T, seen[other]["0 out"].T)[:f, f:]
                want = want + own[other][linear_sum_assignment(c, maximize=True)[1]]
            want = want / 3
        config = MergeConfig(window=(0, 2), method=method)
        merge_(model, data, config, {k: x[:1] for k, x in data.items()})
        error = (own_of(model, find(model)[1])["0 weight"] - want).abs().max()
        assert error < 5e-8  # measured 5.0e-9


@pytest.mark.parametrize(
    ("method", "own"),
    [
        ("residual", ["bias", "down", "scale", "up"]),
        ("calibrated", ["bias", "scale"]),
        ("permute", []),
    ],
)
def test_the_record_says_what_each_layer_has_for_itself(method: str, own: list[str]) -> None:
    model = _merged(lambda: GATED["llama"](3), method)
    assert model.config.ffmerge["own"] == own
    first, second = (find(model)[layer] for layer in (1, 2))
    for path, other in zip(first.maps, second.maps, strict=True):
        mine, theirs = (dict(model.get_submodule(p).named_parameters()) for p in (path, other))
        assert set(mine) == {"weight", *own} - ({"scale"} if path == first.output else set())
        assert {part for part in mine if mine[part] is not theirs[part]} == set(mine) - {"weight"}
