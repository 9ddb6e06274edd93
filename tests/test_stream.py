"""Which module is given what a sublayer's output is added to, told by names that are known."""

from typing import Any

import pytest
import torch
from architectures import CASES, model_of
from test_narrow import MODELS, STREAMS
from torch import nn

from ffmerge.models.find import find
from ffmerge.passes.weights.stream import Stream, streams

NORM_AFTER = (
    "DistilBertForMaskedLM",
    "BartForConditionalGeneration",
    "RobertaForMaskedLM",
)
NORM_BEFORE = ("Dinov2ForImageClassification", "OPTForCausalLM", "WhisperForConditionalGeneration")
SIDE_BY_SIDE = ("GPTNeoXForCausalLM", "GPTJForCausalLM", "PhiForCausalLM")


@pytest.mark.parametrize("name", MODELS)
def test_it_is_what_is_normalized_before_or_read(name: str) -> None:
    model = MODELS[name]()
    members = find(model)
    found = streams(model, members)
    given = {member: stream.given for member, stream in found.items()}
    assert given == {member: member.output.replace(*STREAMS[name]) for member in members}


@pytest.mark.parametrize("name", MODELS)
def test_after_the_sum_of_bert_comes_a_norm(name: str) -> None:
    model = MODELS[name]()
    found = streams(model, find(model))
    assert {stream.normalized for stream in found.values()} == {name == "bert"}


@pytest.mark.parametrize("name", NORM_AFTER + NORM_BEFORE)
def test_others_are_told_apart_alike(name: str) -> None:
    case = next(case for case in CASES if case[0] == name)
    model = model_of(*case[:3])
    found = streams(model, find(model))
    assert {stream.normalized for stream in found.values()} == {name in NORM_AFTER}


@pytest.mark.parametrize("name", SIDE_BY_SIDE)
def test_side_by_side_with_attention_there_is_none(name: str) -> None:
    case = next(case for case in CASES if case[0] == name)
    model = model_of(*case[:3])
    assert streams(model, find(model)) == {}


def test_what_is_put_out_is_scaled_first_and_not_what_is_added() -> None:
    """A norm behind the sublayer, as in OLMo 2; and one model in 16 bits."""
    case = next(case for case in CASES if case[0] == "Olmo2ForCausalLM")
    model: Any = model_of(*case[:3])
    members = find(model)
    assert streams(model, members) == {}
    for layer in model.model.layers:
        layer.post_feedforward_layernorm = nn.Identity()
    found = streams(model.to(torch.bfloat16), members)
    assert found == {member: Stream(member.inputs[-1]) for member in members}
