"""An adapter of PEFT is in the weights after loading, or refused by name."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from ffmerge.errors import InputError
from ffmerge.models import checkpoint
from ffmerge.models.inspection import inspect

_SIZES = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 40,
}  # fmt: skip
DOWN = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
UP = DOWN.replace("lora_A", "lora_B")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a Llama with an adapter beside it: alpha 8 over rank 4 on one projection."""
    torch.manual_seed(0)
    source = tmp_path / "model"
    LlamaForCausalLM(LlamaConfig(**_SIZES, num_key_value_heads=1)).save_pretrained(source)
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8,
        "target_modules": ["q_proj"], "layers_to_transform": [0],
        "base_model_name_or_path": str(source),
    }  # fmt: skip
    (source / "adapter_config.json").write_text(json.dumps(settings))
    save_file({DOWN: torch.randn(4, 32), UP: torch.randn(32, 4)}, source / ADAPTER)
    return source


ADAPTER = "adapter_model.safetensors"
IDS = torch.arange(9)[None]


def _right(folder: Path) -> Any:
    """Return what the base computes with the product of the adapter's matrices added."""
    config = LlamaConfig.from_pretrained(folder)
    model = LlamaForCausalLM(config)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    parts = load_file(folder / ADAPTER)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight += 8 / 4 * parts[UP] @ parts[DOWN]
    return model.eval()(IDS).logits


def test_an_adapter_beside_its_base_is_merged(folder: Path, tmp_path: Path) -> None:
    model = checkpoint.load(folder)
    assert (model(IDS).logits - _right(folder)).abs().max() < 1e-5
    assert type(model) is LlamaForCausalLM
    assert all(parameter.requires_grad for parameter in model.parameters())
    checkpoint.save(model, tmp_path / "plain", folder)
    assert not list((tmp_path / "plain").glob("adapter*"))
    again = checkpoint.load(tmp_path / "plain")
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_an_adapter_alone_is_merged_into_the_base_it_names(folder: Path, tmp_path: Path) -> None:
    right = _right(folder)
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("adapter_config.json", ADAPTER):
        (folder / name).rename(alone / name)
    assert (checkpoint.load(alone)(IDS).logits - right).abs().max() < 1e-5


def test_a_trained_head_comes_with_its_adapter(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = tmp_path / "model"
    BertForSequenceClassification(BertConfig(**_SIZES, num_labels=3)).save_pretrained(base)
    model = BertForSequenceClassification.from_pretrained(base)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", r=2)).eval()
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    wrapped.save_pretrained(tmp_path / "adapter")
    found = checkpoint.load(tmp_path / "adapter")
    assert (found(IDS).logits - wrapped(IDS).logits).abs().max() < 1e-5


def _spoil(folder: Path, what: str) -> None:
    parts = load_file(folder / ADAPTER)
    if what == "no weights":
        (folder / ADAPTER).unlink()
    elif what == "pickled":
        (folder / ADAPTER).rename(folder / "adapter_model.bin")
    elif what == "outside":
        (folder / ADAPTER).rename(folder.parent / ADAPTER)
        (folder / ADAPTER).symlink_to(f"../{ADAPTER}")
    elif what == "a tensor too many":
        more = {DOWN.replace(".0.", ".1."): torch.ones(4, 32)}
        save_file(parts | more, folder / ADAPTER)
    elif what == "a tensor too few":
        save_file({DOWN: parts[DOWN]}, folder / ADAPTER)
    elif what == "not a number":
        save_file({DOWN: parts[DOWN] * float("nan"), UP: parts[UP]}, folder / ADAPTER)
    elif what == "settings":
        (folder / "adapter_config.json").write_text('{"peft_type": "MAGIC"}')
    elif what == "no settings":
        (folder / "adapter_config.json").unlink()


@pytest.mark.parametrize(
    "what",
    [
        "no weights", "pickled", "outside", "a tensor too many", "a tensor too few",
        "not a number", "settings", "no settings",
    ],
)  # fmt: skip
def test_an_adapter_that_does_not_fit_is_refused(what: str, folder: Path) -> None:
    _spoil(folder, what)
    with pytest.raises(InputError, match="adapter") as caught:
        checkpoint.load(folder)
    assert len(str(caught.value).splitlines()) == 1


def test_without_peft_the_adapter_is_refused_by_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ffmerge.models.adapter.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"adapter of PEFT.*pip install peft"):
        checkpoint.load(folder)


def test_inspection_says_which_model_an_adapter_alone_is_for(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match="only an adapter: give the model that adapter_config"):
        inspect(folder)
