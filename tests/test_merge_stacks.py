"""Models of several stacks: an encoder and a decoder in one call, towers by name."""

from typing import Any

import numpy as np
import pytest
import torch
from drawn import pairs_of_texts
from tiny_wider import SEQ2SEQ, seeded, t5

from ffmerge.config import MergeConfig
from ffmerge.errors import InputError
from ffmerge.models import checkpoint, ties
from ffmerge.models.find import find
from ffmerge.models.record import Group
from ffmerge.models.sublayer import stacks
from ffmerge.passes.weights import cost
from ffmerge.passes.weights.merge import merge_

TASK = "text2text-generation"


@pytest.mark.parametrize("sync", [False, True])
@pytest.mark.parametrize("name", SEQ2SEQ)
def test_encoder_and_decoder_merge_in_one_call_and_come_back_tied(name, sync, tmp_path) -> None:
    model, data = SEQ2SEQ[name](), pairs_of_texts()
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
    data = pairs_of_texts()
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
        result = merge_(model, pairs_of_texts(), config)
        found.append((result.candidates, dict(model.named_parameters())))
    (candidates, whole), (in_parts, parts) = found
    assert candidates == in_parts
    assert all(torch.equal(p, parts[n]) for n, p in whole.items())


def test_the_metric_of_an_encoder_decoder_is_its_loss_on_the_labels() -> None:
    model, data = t5(), pairs_of_texts(6)
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
    data = pairs_of_texts(6)
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


def towers() -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
             "num_attention_heads": 4}  # fmt: skip
    return seeded(
        "CLIPModel", "CLIPConfig", vision_config={**sizes, "image_size": 16, "patch_size": 4},
        text_config={**sizes, "vocab_size": 60, "max_position_embeddings": 20, "eos_token_id": 1},
    )  # fmt: skip


def pictures_and_texts() -> dict[str, Any]:
    generator = np.random.default_rng(0)
    ids = generator.integers(3, 60, (8, 17))  # as long as the picture has patches, and padded
    mask = np.ones_like(ids)
    mask[:, 9:] = 0
    pixels = generator.standard_normal((8, 3, 16, 16)).astype("f")
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


def test_towers_are_merged_by_name(tmp_path) -> None:
    model = towers()
    with pytest.raises(InputError, match=r"several stacks .*: choose by --stack"):
        merge_(model, None, MergeConfig(k=2, method="average"))
    config = MergeConfig(
        window=(0, 1), stacks=("text_model", "vision_model"), task="feature-extraction"
    )
    merge_(model, pictures_and_texts(), config)
    checkpoint.save(model, tmp_path / "m")
    assert ties.ties(checkpoint.load(tmp_path / "m")) == ties.ties(model)


def test_both_towers_are_narrowed_without_being_named() -> None:
    """Nothing is shared, and neurons are taken wherever they cost least."""
    config = MergeConfig(method="narrow", budget="-5%")
    record = merge_(towers(), pictures_and_texts(), config).record
    assert {each.stack for each in record.narrowed} == {"text_model", "vision_model"}
    assert record.parameters_after <= 0.95 * record.parameters_before


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
        merge_(model, pairs_of_texts(), config)
    assert not [tie for tie in ties.ties(model) if "wi" in tie.name]


def test_labels_that_do_not_fit_the_decoder_are_refused() -> None:
    data = pairs_of_texts()
    data["decoder_input_ids"] = data["labels"][:, :3].clip(2)
    with pytest.raises(InputError, match="do not fit"):
        merge_(t5(), data, MergeConfig(k=2, method="average", task=TASK))
