"""Sublayers are found without names and proved by running them."""

import dataclasses

import pytest
import torch
from tiny import FAMILIES, vit
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
)

from ffmerge.models.feedforward import Weight, find, prove, stacks

EXPECTED = {
    "vit": ("vit.layers.{}.mlp.fc1", "vit.layers.{}.mlp.fc2"),
    "gpt2": ("transformer.h.{}.mlp.c_fc", "transformer.h.{}.mlp.c_proj"),
    "bert": ("bert.encoder.layer.{}.intermediate.dense", "bert.encoder.layer.{}.output.dense"),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_layer_is_found_with_its_maps(name: str) -> None:
    found = find(FAMILIES[name]())
    first, last = EXPECTED[name]
    assert [(f.layer, f.inputs, f.output) for f in found] == [
        (i, (first.format(i),), last.format(i)) for i in range(6)
    ]
    assert {(f.stack, f.d_model, f.d_ff, f.gated) for f in found} == {("layers", 64, 256, False)}


@pytest.mark.parametrize("name", FAMILIES)
def test_permuting_neurons_of_the_named_axes_changes_nothing(name: str) -> None:
    model = FAMILIES[name]()
    inputs = (
        {"pixel_values": torch.rand(2, 3, 16, 16)}
        if name == "vit"
        else {"input_ids": torch.arange(10).reshape(2, 5)}
    )
    before = model(**inputs).logits
    for sublayer in find(model):
        order = torch.randperm(sublayer.d_ff)
        for weight in sublayer.weights:
            parameter = model.get_parameter(weight.name)
            parameter.data = weight.reordered(parameter.data, order)
    assert (model(**inputs).logits - before).abs().max() < 5e-6  # measured 6.6e-7


def test_all_are_proved(family) -> None:
    model = family()
    assert prove(model, find(model)) == (True,) * 6


def test_attention_does_not_pass_the_proof() -> None:
    """Values and output projection are maps d -> d with heads between: order matters there."""
    model = vit()
    attention = "vit.layers.2.attention"
    claim = dataclasses.replace(
        find(model)[2], path=attention, d_ff=64, output=f"{attention}.o_proj",
        inputs=(f"{attention}.v_proj",),
        weights=(Weight(f"{attention}.v_proj.weight", 0), Weight(f"{attention}.v_proj.bias", 0),
                 Weight(f"{attention}.o_proj.weight", 1)),
    )  # fmt: skip
    assert prove(model, [claim]) == (False,)


def test_a_wrong_axis_does_not_pass_the_proof() -> None:
    model = vit(d=64, f=64)
    sublayer = find(model)[0]
    weights = tuple(Weight(w.name, 0 if w.neurons == 1 else w.neurons) for w in sublayer.weights)
    assert prove(model, [sublayer]) == (True,)
    assert prove(model, [dataclasses.replace(sublayer, weights=weights)]) == (False,)


class _Scaled(nn.Module):
    """An activation that weighs neurons by their place."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x) * torch.arange(x.shape[-1], device=x.device)


class _Softmax(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(x, -1)


@pytest.mark.parametrize("activation", [_Softmax, _Scaled])
def test_what_is_not_the_same_for_every_neuron_is_not_found(activation) -> None:
    model = vit()
    model.vit.layers[2].mlp.activation_fn = activation()
    assert [f.layer for f in find(model)] == [0, 1, 3, 4, 5]


def test_two_maps_with_nothing_between_are_not_a_feed_forward() -> None:
    model = vit()
    model.vit.layers[1].mlp.activation_fn = nn.Identity()
    assert [f.layer for f in find(model)] == [0, 2, 3, 4, 5]


def test_gated_sublayers_have_two_input_maps() -> None:
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        vocab_size=50, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    found = find(model)
    assert [f.inputs for f in found] == [
        (f"model.layers.{i}.mlp.gate_proj", f"model.layers.{i}.mlp.up_proj") for i in range(2)
    ]
    assert prove(model, found) == (True, True)


def test_a_sublayer_that_runs_several_times_is_one() -> None:
    config = AlbertConfig(
        hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=5,
        embedding_size=16, vocab_size=50,
    )  # fmt: skip
    assert len(find(AlbertForMaskedLM(config).eval())) == 1


def test_convolutional_models_have_none() -> None:
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], image_size=32)
    assert find(ResNetForImageClassification(config).eval()) == ()


def test_stacks_are_sorted_by_layer() -> None:
    found = find(vit())
    assert [f.layer for f in stacks(tuple(reversed(found)))["layers"]] == list(range(6))
