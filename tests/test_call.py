"""Calls of a package: an argument that no graph reads is refused by name, labels give the loss."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import exported, index_of

import ffmerge
from ffmerge.config import CompareConfig, MergeConfig, RecoverConfig, SimilarityConfig
from ffmerge.errors import InputError
from ffmerge.models import call

IDS = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]])
LABELS = torch.tensor([[7, -100, 3, 4], [5, 6, -100, -100]])


def _served(name: str) -> tuple[Any, Any]:
    model, package = exported(index_of(name))
    return model, ffmerge.load_package(package.path)


@pytest.mark.parametrize(
    "name",
    [
        "GPT2LMHeadModel",
        "MarianMTModel",
        pytest.param("T5ForConditionalGeneration", marks=pytest.mark.slow),
    ],
)
def test_labels_give_the_loss_of_pytorch(name: str) -> None:
    """Those of a language model are shifted, those of an encoder-decoder become its input."""
    model, served = _served(name)
    labels = LABELS
    if not model.config.is_encoder_decoder:
        labels = IDS.clone()
        labels[1, 3:] = -100
    with torch.no_grad():
        expected = model(input_ids=IDS, labels=labels)
    got = served(input_ids=IDS, labels=labels)
    assert got.loss == pytest.approx(float(expected.loss), rel=1e-6)  # measured 9e-8
    assert (got.logits - expected.logits).abs().max() < 2e-5  # measured 9.5e-7


@pytest.mark.parametrize(
    ("name", "arguments", "named"),
    [
        ("GPT2LMHeadModel", {"token_type_ids": torch.ones_like(IDS)}, "token_type_ids"),
        ("GPT2LMHeadModel", {"inputs_embeds": torch.ones(2, 5, 32)}, "inputs_embeds"),
        ("GPT2LMHeadModel", {"output_hidden_states": True}, "output_hidden_states"),
        ("MarianMTModel", {"decoder_attention_mask": torch.zeros(2, 1).long()}, "decoder_att"),
    ],
)  # fmt: skip
def test_what_no_graph_reads_is_refused(name: str, arguments: dict[str, Any], named: str) -> None:
    _, served = _served(name)
    if name == "MarianMTModel":
        arguments = {**arguments, "decoder_input_ids": torch.tensor([[3], [3]])}
    with pytest.raises(InputError, match=f"cannot take {named}"):
        served(input_ids=IDS, **arguments)


def test_ids_below_0_are_refused_as_pytorch_refuses_them() -> None:
    """A graph would take them from the end of its table, and answer."""
    model, served = _served("GPT2LMHeadModel")
    labels = torch.where(IDS == IDS.max(), -100, IDS)
    with pytest.raises(IndexError):
        model(input_ids=labels)
    with pytest.raises(InputError, match="input_ids holds -100, and ids are 0 or more"):
        served(input_ids=labels)


def test_what_holds_anyway_is_taken() -> None:
    model, served = _served("MarianMTModel")
    start = torch.tensor([[3, 4], [3, 4]])
    with torch.no_grad():
        expected = model(input_ids=IDS, decoder_input_ids=start).logits
    plain: dict[str, Any] = {"output_attentions": False, "use_cache": True}
    ones = {
        "attention_mask": torch.ones_like(IDS),
        "decoder_attention_mask": torch.ones_like(start),
    }
    got = served(input_ids=IDS, decoder_input_ids=start, **plain, **ones).logits
    assert (got - expected).abs().max() < 5e-6
    first = served(input_ids=IDS, decoder_input_ids=start, return_dict=False)
    assert torch.equal(first[0], got)


def test_what_is_missing_is_named() -> None:
    """T5 has to be told what its decoder reads, in PyTorch as well."""
    _, served = _served("T5ForConditionalGeneration")
    with pytest.raises(InputError, match="decoder_input_ids is not given"):
        served(input_ids=IDS)
    _, served = _served("GPT2LMHeadModel")
    with pytest.raises(InputError, match="input_ids is not given"):
        served(attention_mask=torch.ones_like(IDS))


def test_a_class_with_a_loss_of_its_own_gives_none() -> None:
    model, served = _served("GPT2LMHeadModel")
    with pytest.raises(InputError, match="leave out labels"):
        call.loss(served, "automatic-speech-recognition", {"labels": LABELS}, {})
    assert type(served).__name__ == type(model).__name__


def _given_a_model() -> list[str]:
    """Return the public functions that have a parameter for a model of PyTorch."""
    found = []
    for name in ffmerge.__all__:
        public = getattr(ffmerge, name)
        if inspect.isfunction(public) and "model" in inspect.signature(public).parameters:
            found.append(name)
    return found


CONFIGS = {
    "compare": CompareConfig(k=2),
    "merge_": MergeConfig(k=2, method="average"),
    "recover_": RecoverConfig(steps=1),
    "similarity": SimilarityConfig(),
}


def test_the_functions_that_are_given_a_model_are_found() -> None:
    assert set(_given_a_model()) >= {"clone_sharing_parameters", "export", "inspect", "save"}
    assert set(_given_a_model()) >= set(CONFIGS)


@pytest.mark.parametrize("name", _given_a_model())
def test_a_package_is_refused_where_weights_are_read(name: str, tmp_path: Path) -> None:
    """Each with a package as its model; what follows an original, with one as that, too."""
    model, served = _served("GPT2LMHeadModel")
    known = {
        "model": served, "original": model, "data": {"input_ids": IDS.numpy()}, "validation": None,
        "target": tmp_path / "out",
    }  # fmt: skip
    public = getattr(ffmerge, name)
    given = {each: known[each] for each in inspect.signature(public).parameters if each in known}
    if name in CONFIGS:
        given["config"] = CONFIGS[name]
    if name == "export":
        del given["data"]
    told = "the model is the package .*, which runs graphs and has no weights in PyTorch: load"
    with pytest.raises(InputError, match=told):
        public(**given)
    assert not (tmp_path / "out").exists()
    if name == "recover_":
        with pytest.raises(InputError, match="the original is the package"):
            public(**{**given, "model": model, "original": served})
