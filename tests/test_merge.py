"""Merging against the paper's equations written out, and its exact cases."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from drawn import labelled
from tiny import FAMILIES, bert, gpt2, permute_neurons, vit
from tiny_wider import GATED

from ffmerge.config import MergeConfig
from ffmerge.models import ties
from ffmerge.models.find import find
from ffmerge.passes.weights.align import match
from ffmerge.passes.weights.merge import merge_


def _weights(model, layer: int) -> list[np.ndarray]:
    sublayer = find(model)[layer]
    return [model.get_parameter(w.name).detach().numpy().copy() for w in sublayer.weights]


def _features(model, inputs: torch.Tensor) -> dict[int, np.ndarray]:
    """Return the outputs of each first map, (tokens, f), by layer."""
    features: dict[int, np.ndarray] = {}
    sublayers = find(model)
    hooks = [
        model.get_submodule(sublayer.inputs[0]).register_forward_hook(
            lambda m, a, out, i=sublayer.layer: features.update({i: out.detach().flatten(0, 1)})
        )
        for sublayer in sublayers
    ]
    model(**{model.main_input_name: inputs})
    for hook in hooks:
        hook.remove()
    return {layer: x.numpy() for layer, x in features.items()}


def test_match_is_the_best_of_all_permutations() -> None:
    correlation = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    order = match(correlation)
    best = max(
        itertools.permutations(range(6)), key=lambda p: sum(correlation[j, p[j]] for j in range(6))
    )
    assert tuple(order.tolist()) == best


@pytest.mark.parametrize("name", FAMILIES)
def test_average_is_the_mean_of_each_weight(name: str) -> None:
    model = FAMILIES[name]()
    expected = [sum(ws) / 3 for ws in zip(*(_weights(model, i) for i in (2, 3, 4)), strict=True)]
    merge_(model, labelled(model), MergeConfig(window=(2, 4), method="average"))
    for layer in (2, 3, 4):
        for got, want in zip(_weights(model, layer), expected, strict=True):
            assert np.abs(got - want).max() < 2e-8  # measured 7.5e-9


def test_permute_follows_equations_1_to_6() -> None:
    """Written out with explicit permutation matrices, for GPT-2's (in, out) layout too."""
    for model, transpose in ((vit(), False), (gpt2(), True)):
        data = labelled(model)
        main = model.main_input_name
        features = _features(model, torch.from_numpy(data[main][::2]))
        w_in, b_in, w_out, b_out = [], [], [], []
        for i in (1, 2, 3):
            fc1, bias1, fc2, bias2 = _weights(model, i)
            fc1, fc2 = (fc1.T, fc2.T) if transpose else (fc1, fc2)  # (f, d) and (d, f)
            f = len(fc1)
            c = np.corrcoef(features[1].T, features[i].T)[:f, f:]  # (1)
            p = np.eye(f)
            if i > 1:
                p = np.zeros((f, f))
                p[np.arange(f), match(torch.from_numpy(c)).numpy()] = 1  # (2)
            w_in.append(p @ fc1)
            b_in.append(p @ bias1)
            w_out.append(fc2 @ p.T)
            b_out.append(bias2)
        expected = [sum(x) / 3 for x in (w_in, b_in, w_out, b_out)]  # (3) to (6)
        if transpose:
            expected[0], expected[2] = expected[0].T, expected[2].T
        merge_(model, data, MergeConfig(window=(1, 3), method="permute", batch_size=100))
        for got, want in zip(_weights(model, 2), expected, strict=True):
            assert np.abs(got - want).max() < 2e-8  # measured 7.5e-9


EVERY: dict[str, Callable[..., Any]] = {**FAMILIES, **GATED}


@pytest.mark.parametrize("name", EVERY)
def test_a_permuted_copy_merges_without_loss(name: str) -> None:
    model = EVERY[name]()
    permute_neurons(model, 1, 2)
    data = labelled(model)
    main = torch.from_numpy(data[model.main_input_name])
    before = model(**{model.main_input_name: main}).logits.detach()
    spoiled = EVERY[name]()
    permute_neurons(spoiled, 1, 2)
    merge_(spoiled, data, MergeConfig(window=(1, 2), method="average"))
    merge_(model, data, MergeConfig(window=(1, 2), method="permute"))
    merged = model(**{model.main_input_name: main}).logits
    assert (merged - before).abs().max() < 5e-6  # measured 6.0e-7
    averaged = spoiled(**{model.main_input_name: main}).logits
    assert (averaged - before).abs().max() > 1e-2  # without the alignment: 0.059 to 0.76


@pytest.mark.parametrize("name", EVERY)
def test_the_order_in_which_a_member_holds_its_neurons_changes_nothing(name: str) -> None:
    """Gate, up and down of one member reordered together before: bit for bit the same merge."""
    models = EVERY[name](), EVERY[name]()
    sublayer = find(models[0])[2]
    order = torch.randperm(sublayer.d_ff, generator=torch.Generator().manual_seed(5))
    for weight in sublayer.weights:
        parameter = models[1].get_parameter(weight.name)
        parameter.data = weight.reordered(parameter.data, order)
    assert not np.array_equal(_weights(models[0], 2)[0], _weights(models[1], 2)[0])
    for model in models:
        merge_(model, labelled(model), MergeConfig(window=(1, 3), method="permute"))
    for first, second in zip(_weights(models[0], 2), _weights(models[1], 2), strict=True):
        assert np.array_equal(first, second)


@pytest.mark.parametrize("method", ["average", "permute"])
def test_equal_members_stay_bit_equal(method: str) -> None:
    model = vit()
    sublayers = find(model)
    for target in (2, 3):
        for a, b in zip(sublayers[1].weights, sublayers[target].weights, strict=True):
            model.get_parameter(b.name).data = model.get_parameter(a.name).data.clone()
    before = _weights(model, 1)
    merge_(model, labelled(model), MergeConfig(window=(1, 3), method=method))
    for got, want in zip(_weights(model, 3), before, strict=True):
        assert np.array_equal(got, want)


def test_every_start_is_tried_the_last_too_and_the_best_is_taken() -> None:
    model = vit()
    permute_neurons(model, 4, 5)  # only the last window, 4-5, loses nothing
    data = labelled(model, 64)
    data["labels"] = model(torch.from_numpy(data["pixel_values"])).logits.argmax(-1).numpy()
    result = merge_(model, data, MergeConfig(k=2))
    assert [c.groups[0].layers for c in result.candidates] == [(s, s + 1) for s in range(5)]
    assert result.record.groups[0].layers == (4, 5)
    assert result.record.metric["merged"] == result.record.metric["before"] == 1.0


def test_members_share_parameter_objects_and_others_do_not() -> None:
    model = bert()
    result = merge_(model, labelled(model), MergeConfig(window=(1, 3), method="permute"))
    layers = model.bert.encoder.layer
    for layer in (layers[2], layers[3]):
        assert layer.intermediate.dense.weight is layers[1].intermediate.dense.weight
        assert layer.output.dense.bias is layers[1].output.dense.bias
    assert layers[4].output.dense.weight is not layers[1].output.dense.weight
    one = 64 * 256 * 2 + 256 + 64
    assert result.record.parameters_before - result.record.parameters_after == 2 * one
    assert {len(tie.members) for tie in ties.ties(model)} == {3}


def test_candidates_leave_no_trace() -> None:
    model = vit()
    before = {name: p.clone() for name, p in model.named_parameters()}
    result = merge_(model, labelled(model), MergeConfig(k=3, method="average"))
    chosen = set(result.record.groups[0].layers)
    for sublayer in find(model):
        if sublayer.layer not in chosen:
            for weight in sublayer.weights:
                assert torch.equal(model.get_parameter(weight.name), before[weight.name])


def test_perplexity_chooses_for_language_models() -> None:
    model = gpt2()
    result = merge_(model, labelled(model), MergeConfig(k=2))
    metric = result.record.metric
    assert metric["name"] == "perplexity"
    assert metric["merged"] == min(c.value for c in result.candidates)
    ids = torch.from_numpy(labelled(model)["input_ids"][1::2])
    loss = gpt2()(input_ids=ids, labels=ids).loss
    assert abs(metric["before"] - float(loss.detach().exp())) < 1e-4  # measured 2.8e-5


def test_without_labels_the_original_is_the_judge() -> None:
    model = vit()
    data = {"pixel_values": labelled(model)["pixel_values"]}
    metric = merge_(model, data, MergeConfig(k=2)).record.metric
    assert metric["name"] == "fidelity"
    assert metric["before"] == pytest.approx(1, abs=1e-6)  # measured 0
    assert metric["merged"] < 1
