"""Sublayers are found without names and proved by running them."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import transformers
from tiny import FAMILIES, vit
from tiny_wider import GATED, SEQ2SEQ, seeded
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
)

from ffmerge.errors import InputError
from ffmerge.models.find import EXPERTS, find, survey
from ffmerge.models.prove import prove
from ffmerge.models.sublayer import Weight, stacks

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


class _Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(torch.relu(x))


@pytest.mark.parametrize(
    ("activation", "reason"),
    [(_Softmax, "softmax"), (_Scaled, "arange"), (_Normed, "native_layer_norm")],
)
def test_what_is_not_the_same_for_every_neuron_is_left_alone(activation, reason: str) -> None:
    model = vit()
    model.vit.layers[2].mlp.activation_fn = activation()
    found, left = survey(model)
    assert [f.layer for f in found] == [0, 1, 3, 4, 5]
    assert [(part.path, part.reason) for part in left] == [
        ("vit.layers.2.mlp", f"{reason} between its maps does not treat every neuron alike")
    ]


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


def test_a_sublayer_that_runs_several_times_is_one_and_its_runs_are_counted() -> None:
    config = AlbertConfig(
        hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=5,
        embedding_size=16, vocab_size=50,
    )  # fmt: skip
    (found,) = find(AlbertForMaskedLM(config).eval())
    assert found.runs == 5
    assert {f.runs for f in find(vit())} == {1}


def test_convolutional_models_have_none() -> None:
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], image_size=32)
    assert survey(ResNetForImageClassification(config).eval()) == ((), ())


def test_stacks_are_sorted_by_layer() -> None:
    found = find(vit())
    assert [f.layer for f in stacks(tuple(reversed(found)))["layers"]] == list(range(6))


@pytest.mark.parametrize("name", GATED)
def test_fused_and_separate_gates_are_found_and_proved(name: str) -> None:
    model = GATED[name]()
    found = find(model)
    assert [(f.layer, f.d_ff, f.gated) for f in found] == [(i, 48, True) for i in range(4)]
    assert prove(model, found) == (True,) * 4


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_encoder_and_decoder_are_told_apart_by_what_they_read(name: str) -> None:
    by_name = stacks(find(SEQ2SEQ[name](encoder=3, decoder=2)))
    assert {stack: len(members) for stack, members in by_name.items()} == {
        "encoder": 3, "decoder": 2,
    }  # fmt: skip
    assert {f.reads for f in by_name["encoder"]} == {("input_ids",)}
    assert {f.reads for f in by_name["decoder"]} == {("input_ids", "decoder_input_ids")}


@pytest.mark.parametrize("chunk", [1, 2, 8])
def test_a_chunked_sublayer_is_found_once_and_proved(chunk: int) -> None:
    model = seeded(
        "BertForMaskedLM", "BertConfig", hidden_size=32, intermediate_size=48, vocab_size=60,
        num_hidden_layers=3, num_attention_heads=4, chunk_size_feed_forward=chunk,
    )  # fmt: skip
    found = find(model)
    assert [(f.layer, f.runs) for f in found] == [(0, 1), (1, 1), (2, 1)]
    assert prove(model, found) == (True,) * 3


_LANGUAGE = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48,
    "num_key_value_heads": 2, "vocab_size": 60, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": 2,
}  # fmt: skip
_PICTURES = {
    "image_size": 32, "hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 2, 1],
    "num_attention_heads": [1, 1, 2, 2],
}  # fmt: skip
_STAGES = (1, 1, 2, 1)

# class, configuration, settings, layers found by stack, left alone, why
LOOKALIKES: list[tuple[str, str, dict[str, Any], dict[str, int], int, str]] = [
    ("MixtralForCausalLM", "MixtralConfig", {**_LANGUAGE, "num_local_experts": 4}, {}, 3, EXPERTS),
    ("OlmoeForCausalLM", "OlmoeConfig", {**_LANGUAGE, "num_experts": 4, "num_experts_per_tok": 2},
     {}, 3, EXPERTS),
    ("GptOssForCausalLM", "GptOssConfig", {**_LANGUAGE, "num_local_experts": 4, "head_dim": 8},
     {}, 3, EXPERTS),
    ("GraniteMoeForCausalLM", "GraniteMoeConfig", {**_LANGUAGE, "num_local_experts": 4},
     {}, 3, EXPERTS),
    # experts in a dictionary, every second layer
    ("NllbMoeForConditionalGeneration", "NllbMoeConfig",
     {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
      "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
      "num_experts": 4, "encoder_sparse_step": 2, "decoder_sparse_step": 2, "vocab_size": 60,
      "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "decoder_start_token_id": 2},
     {"encoder": 1, "decoder": 1}, 2, EXPERTS),
    # one dense layer, then experts beside a sublayer that every token passes
    ("Qwen2MoeForCausalLM", "Qwen2MoeConfig",
     {**_LANGUAGE, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
      "shared_expert_intermediate_size": 40, "mlp_only_layers": [0]},
     {"layers": 1, "shared_expert": 2}, 2, EXPERTS),
    ("SegformerForImageClassification", "SegformerConfig", _PICTURES, {}, sum(_STAGES),
     "depthwise_convolution between its maps does not treat every neuron alike"),
    ("PoolFormerForImageClassification", "PoolFormerConfig",
     {"hidden_sizes": [16, 16, 32, 32], "depths": list(_STAGES)}, {}, sum(_STAGES),
     "its maps are convolutions"),
    ("SqueezeBertForMaskedLM", "SqueezeBertConfig",
     {**{k: v for k, v in _LANGUAGE.items() if k != "num_key_value_heads"}, "embedding_size": 32,
      **{f"{part}_groups": 1 for part in ("q", "k", "v", "post_attention", "intermediate",
                                          "output")}},
     {}, 3, "its maps are convolutions"),
    # the position biases of Swin v2 come from maps 2 -> 512 -> heads, which read no input
    ("Swinv2ForImageClassification", "Swinv2Config",
     {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4],
      "window_size": 4}, {"0": 2, "1": 2}, 0, ""),
    # a mixer of states is neither
    ("MambaForCausalLM", "MambaConfig",
     {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 60, "state_size": 4}, {}, 0, ""),
]  # fmt: skip


@pytest.mark.parametrize(
    ("model", "config", "settings", "layers", "count", "reason"),
    LOOKALIKES,
    ids=[case[0] for case in LOOKALIKES],
)
def test_what_looks_like_one_is_left_alone_with_the_reason(
    model, config, settings, layers, count, reason
) -> None:
    made = seeded(model, config, **settings)
    found, left = survey(made)
    assert {stack: len(members) for stack, members in stacks(found).items()} == layers
    assert all(prove(made, found))
    assert len(left) == count
    assert {part.reason for part in left} <= {reason}
    assert all(made.get_submodule(part.path) for part in left)


def test_two_sublayers_of_one_block_are_two_stacks() -> None:
    model = seeded(
        "Wav2Vec2ConformerForCTC", "Wav2Vec2ConformerConfig", vocab_size=20, hidden_size=32,
        num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, conv_dim=[8, 8],
        conv_kernel=[3, 3], conv_stride=[2, 2], num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    by_name = stacks(find(model))
    assert {stack: [f.layer for f in members] for stack, members in by_name.items()} == {
        "ffn1": [0, 1], "ffn2": [0, 1],
    }  # fmt: skip


def test_without_weights_structure_is_enough() -> None:
    """The code of BERT in transformers 4.57 looks at a mask, that of Mixtral routes tokens."""
    for name, config in (
        ("BertModel", transformers.BertConfig(hidden_size=32, num_attention_heads=4)),
        ("LlamaForCausalLM", transformers.LlamaConfig(**_LANGUAGE)),
    ):
        with torch.device("meta"):
            model = getattr(transformers, name)(config).eval()
        assert len(find(model)) == config.num_hidden_layers


def test_finding_without_weights_leaves_autocast_to_other_threads() -> None:
    """It is no-op on meta only, and is what it was when several threads are done."""
    known = torch.autocast
    seen = []

    class Looks(transformers.BertModel):
        def forward(self, input_ids: Any = None, attention_mask: Any = None) -> Any:
            with torch.autocast("meta", enabled=False):
                out = super().forward(input_ids)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                seen.append(torch.is_autocast_enabled("cpu"))
            return out

    with torch.device("meta"):
        config = transformers.BertConfig(hidden_size=32, num_attention_heads=4)
        models = [Looks(config).eval() for _ in range(4)]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(find, models))
    assert [len(each) for each in found] == [config.num_hidden_layers] * 4
    assert seen == [True] * 4
    assert torch.autocast is known


def test_code_that_needs_values_is_said_to_need_weights() -> None:
    class Looks(transformers.BertModel):
        def forward(self, input_ids: Any = None, attention_mask: Any = None) -> Any:
            input_ids.cpu().tolist()

    with torch.device("meta"):
        model = Looks(transformers.BertConfig(hidden_size=32, num_attention_heads=4)).eval()
    with pytest.raises(InputError, match="cannot be followed without weights"):
        find(model)


@pytest.mark.parametrize("name", ["bart", "marian"])
def test_a_decoder_of_16_bits_is_proved_without_its_cache(name: str) -> None:
    """The cache that a layer is called with holds keys of the model's type, not of the proof's."""
    model = SEQ2SEQ[name](2, 2).to(torch.bfloat16)
    assert prove(model, find(model)) == (True,) * 4


def test_two_equal_square_banks_are_no_experts() -> None:
    """Experts map d -> f and f -> d: of (n, d, d) twice nothing tells which would be which."""
    model, holder = vit(), nn.Module()
    model.add_module("holder", holder)
    for name, shapes in {"alike": [(4, 8, 8), (4, 8, 8)], "bank": [(4, 24, 8), (4, 8, 24)]}.items():
        module = nn.Module()
        for number, shape in enumerate(shapes):
            module.register_parameter(str(number), nn.Parameter(torch.zeros(shape)))
        holder.add_module(name, module)
    left = {part.path: part.reason for part in survey(model)[1]}
    assert left == {"holder.bank": EXPERTS}
