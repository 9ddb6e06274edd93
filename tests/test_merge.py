"""Merging against the paper's equations written out, and its exact cases."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tiny import FAMILIES, bert, gpt2, vit
from tiny_wider import GATED, SEQ2SEQ, seeded, t5

from ffmerge.config import MergeConfig
from ffmerge.errors import InputError
from ffmerge.models import checkpoint, ties
from ffmerge.models.find import find
from ffmerge.models.record import Group
from ffmerge.models.sublayer import stacks
from ffmerge.passes.weights import cost, methods
from ffmerge.passes.weights.align import match
from ffmerge.passes.weights.least_squares import Regression
from ffmerge.passes.weights.merge import merge_
from ffmerge.passes.weights.search import Trials


def _data(model, rows: int = 24) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(1)
    if model.main_input_name == "pixel_values":
        return {
            "pixel_values": generator.standard_normal((rows, 3, 16, 16)).astype(np.float32),
            "labels": generator.integers(0, 7, rows),
        }
    ids = generator.integers(1, 61, (rows, 9))
    if "Sequence" in type(model).__name__:
        return {"input_ids": ids, "labels": generator.integers(0, 3, rows)}
    return {"input_ids": ids}


def _weights(model, layer: int) -> list[np.ndarray]:
    sublayer = find(model)[layer]
    return [model.get_parameter(w.name).detach().numpy().copy() for w in sublayer.weights]


def _permute_neurons(model, source: int, target: int) -> None:
    """Make layer ``target`` a copy of layer ``source`` with its hidden neurons shuffled."""
    sublayers = find(model)
    order = torch.randperm(sublayers[source].d_ff, generator=torch.Generator().manual_seed(3))
    for a, b in zip(sublayers[source].weights, sublayers[target].weights, strict=True):
        value = model.get_parameter(a.name).detach().clone()
        model.get_parameter(b.name).data = a.reordered(value, order)


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
    merge_(model, _data(model), MergeConfig(window=(2, 4), method="average"))
    for layer in (2, 3, 4):
        for got, want in zip(_weights(model, layer), expected, strict=True):
            assert np.abs(got - want).max() < 2e-8  # measured 7.5e-9


def test_permute_follows_equations_1_to_6() -> None:
    """Written out with explicit permutation matrices, for GPT-2's (in, out) layout too."""
    for model, transpose in ((vit(), False), (gpt2(), True)):
        data = _data(model)
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
    _permute_neurons(model, 1, 2)
    data = _data(model)
    main = torch.from_numpy(data[model.main_input_name])
    before = model(**{model.main_input_name: main}).logits.detach()
    spoiled = EVERY[name]()
    _permute_neurons(spoiled, 1, 2)
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
        merge_(model, _data(model), MergeConfig(window=(1, 3), method="permute"))
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
    merge_(model, _data(model), MergeConfig(window=(1, 3), method=method))
    for got, want in zip(_weights(model, 3), before, strict=True):
        assert np.array_equal(got, want)


def test_every_start_is_tried_the_last_too_and_the_best_is_taken() -> None:
    model = vit()
    _permute_neurons(model, 4, 5)  # only the last window, 4-5, loses nothing
    data = _data(model, 64)
    data["labels"] = model(torch.from_numpy(data["pixel_values"])).logits.argmax(-1).numpy()
    result = merge_(model, data, MergeConfig(k=2))
    assert [c.groups[0].layers for c in result.candidates] == [(s, s + 1) for s in range(5)]
    assert result.record.groups[0].layers == (4, 5)
    assert result.record.metric["merged"] == result.record.metric["before"] == 1.0


def test_members_share_parameter_objects_and_others_do_not() -> None:
    model = bert()
    result = merge_(model, _data(model), MergeConfig(window=(1, 3), method="permute"))
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
    result = merge_(model, _data(model), MergeConfig(k=3, method="average"))
    chosen = set(result.record.groups[0].layers)
    for sublayer in find(model):
        if sublayer.layer not in chosen:
            for weight in sublayer.weights:
                assert torch.equal(model.get_parameter(weight.name), before[weight.name])


def test_perplexity_chooses_for_language_models() -> None:
    model = gpt2()
    result = merge_(model, _data(model), MergeConfig(k=2))
    metric = result.record.metric
    assert metric["name"] == "perplexity"
    assert metric["merged"] == min(c.value for c in result.candidates)
    ids = torch.from_numpy(_data(model)["input_ids"][1::2])
    loss = gpt2()(input_ids=ids, labels=ids).loss
    assert abs(metric["before"] - float(loss.detach().exp())) < 1e-4  # measured 2.8e-5


def test_without_labels_the_original_is_the_judge() -> None:
    model = vit()
    data = {"pixel_values": _data(model)["pixel_values"]}
    metric = merge_(model, data, MergeConfig(k=2)).record.metric
    assert metric["name"] == "fidelity"
    assert metric["before"] == pytest.approx(1, abs=1e-6)  # measured 0
    assert metric["merged"] < 1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MergeConfig(window=(3, 6)), "out of range"),
        (MergeConfig(k=7), "k = 7"),
        (MergeConfig(k=1), "k = 1"),
        (MergeConfig(k=2, method="magic"), "no method"),
        (MergeConfig(k=2, stacks=("decoder",)), "no stack"),
        (MergeConfig(window={"layers": (1, 2)}, stacks=("layers", "decoder")), "for each of"),
    ],
)
def test_settings_that_do_not_fit_are_refused(config: MergeConfig, message: str) -> None:
    with pytest.raises(InputError, match=message):
        merge_(vit(), _data(vit()), config)


def test_data_of_the_wrong_shape_is_refused() -> None:
    with pytest.raises(InputError, match="does not take this data"):
        merge_(vit(), {"pixel_values": np.zeros((4, 3, 8, 8), np.float32)}, MergeConfig(k=2))


def _hooks(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("method", ["permute", "calibrated"])
@pytest.mark.parametrize("fails", ["rows", "statistics", "fit", "measuring"])
def test_a_merge_that_fails_leaves_the_model_as_it_was(
    fails: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No hook, no tie, no other class: the next forward pass gives what it gave."""
    model, data = vit(), _data(vit())
    before = model(torch.from_numpy(data["pixel_values"])).logits
    classes = [type(module) for module in model.modules()]
    given: Any = data

    def fail(*_: Any, **__: Any) -> Any:
        raise InputError("stopped")

    def progress(step: str, done: int, total: int) -> None:
        if fails == "statistics" and step.startswith("statistics"):
            fail()

    if fails == "rows":
        given = {"pixel_values": np.zeros((4, 3, 8, 8), np.float32)}
    elif fails == "fit":
        monkeypatch.setattr(Regression, "update", fail)
        monkeypatch.setattr(methods, "mean_of", fail)
    elif fails == "measuring":
        monkeypatch.setattr(Trials, "rank", fail)
    with pytest.raises(InputError) as caught:  # its traceback holds all frames
        merge_(model, given, MergeConfig(k=2, method=method), data, progress=progress)
    assert _hooks(model) == 0
    assert [type(module) for module in model.modules()] == classes
    assert not ties.ties(model)
    assert torch.equal(model(torch.from_numpy(data["pixel_values"])).logits, before)
    assert caught.value.args


def test_a_merged_model_is_not_merged_again() -> None:
    model = vit()
    merge_(model, _data(model), MergeConfig(k=2))
    with pytest.raises(InputError, match="merged already"):
        merge_(model, _data(model), MergeConfig(k=2))


class _InPlace(torch.nn.Module):
    """Elementwise to the eye: the second factor of the product in place is not followed."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x).mul_(torch.arange(x.shape[-1], device=x.device))


def test_what_the_proof_rejects_is_left_out_of_every_window() -> None:
    model = vit()
    model.vit.layers[2].mlp.activation_fn = _InPlace()
    assert len(find(model)) == 6
    result = merge_(model, _data(model), MergeConfig(k=3, method="average"))
    tried = [c.groups[0].layers for c in result.candidates]
    assert tried == [(0, 1, 3), (1, 3, 4), (3, 4, 5)]
    for sublayer in model.vit.layers:
        sublayer.mlp.activation_fn = _InPlace()
    with pytest.raises(InputError, match="merged already"):
        merge_(model, _data(model), MergeConfig(k=2))


_PLAIN = {
    "hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 48, "vocab_size": 60,
    "num_attention_heads": 4,
}  # fmt: skip
_STAGES = {
    "hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1], "image_size": 32,
    "num_attention_heads": [1, 1, 2, 2],
}  # fmt: skip


@pytest.mark.parametrize(
    ("model", "config", "settings", "message"),
    [
        ("MixtralForCausalLM", "MixtralConfig",
         {**_PLAIN, "num_local_experts": 2, "num_key_value_heads": 4}, "mixture-of-experts"),
        ("AlbertForMaskedLM", "AlbertConfig", {**_PLAIN, "embedding_size": 8},
         "shared already.* 3 times"),
        ("MambaForCausalLM", "MambaConfig",
         {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 60, "state_size": 4},
         "no feed-forward sublayer"),
        ("SegformerForImageClassification", "SegformerConfig", _STAGES, "depthwise_convolution"),
    ],
)  # fmt: skip
def test_what_holds_nothing_to_merge_says_why(model, config, settings, message: str) -> None:
    made = seeded(model, config, **settings)
    before = {name: id(p) for name, p in made.named_parameters()}
    with pytest.raises(InputError, match=message) as caught:
        merge_(made, None, MergeConfig(k=2, method="average"))
    assert len(str(caught.value).splitlines()) == 1
    assert {name: id(p) for name, p in made.named_parameters()} == before


def _pairs_of_texts(rows: int = 12) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(2)
    labels = generator.integers(3, 61, (rows, 7))
    labels[::3, 5:] = -100
    mask = np.ones((rows, 6), int)
    mask[1::3, 4:] = 0
    return {
        "input_ids": generator.integers(3, 61, (rows, 6)), "attention_mask": mask, "labels": labels,
    }  # fmt: skip


TASK = "text2text-generation"


@pytest.mark.parametrize("sync", [False, True])
@pytest.mark.parametrize("name", SEQ2SEQ)
def test_encoder_and_decoder_merge_in_one_call_and_come_back_tied(name, sync, tmp_path) -> None:
    model, data = SEQ2SEQ[name](), _pairs_of_texts()
    one = {
        stack: sum(model.get_parameter(w.name).numel() for w in members[0].weights)
        for stack, members in stacks(find(model)).items()
    }
    result = merge_(model, data, MergeConfig(k=3, sync=sync, task=TASK, method="permute"))
    record = result.record
    assert [group.stack for group in record.groups] == ["encoder", "decoder"]
    assert {len(group.layers) for group in record.groups} == {3}
    removed = record.parameters_before - record.parameters_after
    assert removed == 2 * (one["encoder"] + one["decoder"])
    tried = [[(g.stack, g.layers[0]) for g in c.groups] for c in result.candidates]
    if sync:
        assert tried == [[("encoder", i), ("decoder", i)] for i in (0, 1)]
        assert record.groups[0].layers == record.groups[1].layers
    else:
        assert tried == [[(stack, i)] for stack in ("encoder", "decoder") for i in (0, 1)]
    last = [c for c in result.candidates if c.groups[-1].stack == "decoder"]
    assert record.metric["name"] == "perplexity"
    assert record.metric["merged"] == min(c.value for c in last)
    checkpoint.save(model, tmp_path / "m")
    again = checkpoint.load(tmp_path / "m")
    assert ties.ties(again) == ties.ties(model)
    inputs = {"input_ids": torch.arange(3, 15).view(2, 6), "labels": torch.arange(3, 17).view(2, 7)}
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, again(**inputs).logits)


def test_each_stack_is_searched_with_those_before_it_merged() -> None:
    """The greedy search redone by hand: every value is that of a model merged so far by hand."""
    data = _pairs_of_texts()
    result = merge_(t5(), data, MergeConfig(k=3, method="average", task=TASK))
    encoder = min(result.candidates[:2], key=lambda c: c.value)
    for candidate in result.candidates[2:]:
        windows = {c.groups[0].stack: (c.groups[0].layers[0], c.groups[0].layers[-1])
                   for c in (encoder, candidate)}  # fmt: skip
        config = MergeConfig(window=windows, method="average", task=TASK)
        by_hand = merge_(t5(), data, config).record
        assert by_hand.groups == (*encoder.groups, *candidate.groups)
        assert by_hand.metric["merged"] == candidate.value


@pytest.mark.parametrize("method", ["permute", "calibrated"])
def test_a_decoder_is_aligned_by_the_original_however_little_memory(method, monkeypatch) -> None:
    """Collected in parts, its statistics would be those behind an encoder that is merged."""
    found = []
    for memory in (cost.PAIRS, 1):
        monkeypatch.setattr(cost, "PAIRS", memory)
        model = t5(3, 3)
        config = MergeConfig(k=2, method=method, task=TASK)
        result = merge_(model, _pairs_of_texts(), config)
        found.append((result.candidates, dict(model.named_parameters())))
    (candidates, whole), (in_parts, parts) = found
    assert candidates == in_parts
    assert all(torch.equal(p, parts[n]) for n, p in whole.items())


def test_the_metric_of_an_encoder_decoder_is_its_loss_on_the_labels() -> None:
    model, data = t5(), _pairs_of_texts(6)
    odd = {name: torch.from_numpy(array[1::2].copy()) for name, array in data.items()}
    expected = float(t5()(**odd).loss.detach().exp())
    metric = merge_(model, data, MergeConfig(window=(0, 1), task=TASK)).record.metric
    assert abs(metric["before"] / expected - 1) < 5e-6  # measured 6.0e-7
    without = {name: array for name, array in data.items() if name != "labels"}
    without["decoder_input_ids"] = np.where(data["labels"] == -100, 2, data["labels"])
    metric = merge_(t5(), without, MergeConfig(window=(0, 1), task=TASK)).record.metric
    assert metric["name"] == "fidelity"
    assert metric["before"] == pytest.approx(1, abs=1e-6)  # measured 0


def test_fidelity_counts_no_padding() -> None:
    data = _pairs_of_texts(6)
    data["decoder_input_ids"] = np.where(data["labels"] == -100, 2, data.pop("labels"))
    counted = torch.from_numpy(data["decoder_input_ids"][1::2] != 2)
    model, original = t5(), t5()
    metric = merge_(model, data, MergeConfig(window=(0, 2), task=TASK)).record.metric
    odd = {name: torch.from_numpy(array[1::2].copy()) for name, array in data.items()}
    with torch.no_grad():
        cosines = torch.cosine_similarity(original(**odd).logits, model(**odd).logits, dim=-1)
    assert not counted.all()
    assert abs(metric["merged"] - float(cosines[counted].mean())) < 1e-6  # measured 0
    assert abs(metric["merged"] - float(cosines.mean())) > 1e-5


def test_stacks_may_be_chosen_and_have_windows_of_their_own() -> None:
    model = t5()
    record = merge_(model, None, MergeConfig(k=4, stacks=("decoder",), method="average")).record
    assert record.groups == (Group("decoder", (0, 1, 2, 3)),)
    windows = {"decoder": (0, 1), "encoder": (1, 3)}
    record = merge_(t5(), None, MergeConfig(window=windows, method="average")).record
    assert record.groups == (Group("decoder", (0, 1)), Group("encoder", (1, 2, 3)))


def test_towers_are_merged_by_name(tmp_path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
             "num_attention_heads": 4}  # fmt: skip
    model = seeded(
        "CLIPModel", "CLIPConfig", vision_config={**sizes, "image_size": 16, "patch_size": 4},
        text_config={**sizes, "vocab_size": 60, "max_position_embeddings": 20, "eos_token_id": 1},
    )  # fmt: skip
    with pytest.raises(InputError, match=r"several stacks .*: choose one"):
        merge_(model, None, MergeConfig(k=2, method="average"))
    generator = np.random.default_rng(0)
    ids = generator.integers(3, 60, (8, 17))  # as long as the picture has patches, and padded
    mask = np.ones_like(ids)
    mask[:, 9:] = 0
    data = {
        "input_ids": ids, "attention_mask": mask,
        "pixel_values": generator.standard_normal((8, 3, 16, 16)).astype("f"),
    }  # fmt: skip
    config = MergeConfig(window=(0, 1), stacks=("text_model", "vision_model"), task="none")
    merge_(model, data, config)
    checkpoint.save(model, tmp_path / "m")
    assert ties.ties(checkpoint.load(tmp_path / "m")) == ties.ties(model)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MergeConfig(k=3), r"k = 3 does not fit: stack 'decoder' has 2 layers"),
        (MergeConfig(window=(1, 2)), r"window 1-2 .* stack 'decoder' has layers 0 to 1"),
        (MergeConfig(k=2, stacks=("encoder", "middle")), "no stack 'middle'"),
        (MergeConfig(window={"encoder": (0, 1), "middle": (0, 1)}), "no stack 'middle'"),
    ],
)
def test_settings_that_fit_one_stack_only_are_refused(config: MergeConfig, message: str) -> None:
    model = t5(encoder=4, decoder=2)
    with pytest.raises(InputError, match=message):
        merge_(model, _pairs_of_texts(), config)
    assert not [tie for tie in ties.ties(model) if "wi" in tie.name]


def test_labels_that_do_not_fit_the_decoder_are_refused() -> None:
    data = _pairs_of_texts()
    data["decoder_input_ids"] = data["labels"][:, :3].clip(2)
    with pytest.raises(InputError, match="do not fit"):
        merge_(t5(), data, MergeConfig(k=2, method="average", task=TASK))
