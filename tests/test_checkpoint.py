"""Merged checkpoints: stored once, exact when reloaded, loud when a plain loader opens them."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, gpt2, vit
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    BertConfig,
    BertLMHeadModel,
    GPT2LMHeadModel,
    ViTForImageClassification,
)

from ffmerge.config import MergeConfig
from ffmerge.errors import InputError, TieError
from ffmerge.models import checkpoint, ties
from ffmerge.models.find import find
from ffmerge.models.sublayer import stacks
from ffmerge.passes.weights.merge import merge_


def _merged(name: str):
    model = FAMILIES[name]()
    inputs = (
        {"pixel_values": np.random.default_rng(0).standard_normal((4, 3, 16, 16)).astype("f")}
        if name == "vit"
        else {"input_ids": np.arange(36).reshape(4, 9)}
    )
    merge_(model, inputs, MergeConfig(window=(1, 4), method="permute"))
    return model, {k: torch.from_numpy(v) for k, v in inputs.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
def test_round_trip_is_tied_and_exact(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, inputs = _merged(name)
    model = model.to(dtype)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    checkpoint.save(model, tmp_path / "a")
    again = checkpoint.load(tmp_path / "a")
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    assert [t.members for t in ties.ties(again)] == [t.members for t in ties.ties(model)]
    checkpoint.save(again, tmp_path / "b")
    for file in ("config.json", "model.ffmerge.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize("name", FAMILIES)
def test_each_distinct_parameter_is_stored_once(name: str, tmp_path: Path) -> None:
    model, _ = _merged(name)
    checkpoint.save(model, tmp_path / "merged")
    with safe_open(tmp_path / "merged" / "model.ffmerge.safetensors", "np") as file:
        stored = sum(file.get_tensor(key).nbytes for key in file.keys())
    assert stored == sum(p.nbytes for p in {id(p): p for p in model.parameters()}.values())


@pytest.mark.parametrize(
    "loader", [ViTForImageClassification, AutoModelForImageClassification], ids=lambda c: c.__name__
)
def test_a_plain_loader_fails_instead_of_inventing_weights(loader, tmp_path: Path) -> None:
    model, _ = _merged("vit")
    checkpoint.save(model, tmp_path / "merged")
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        loader.from_pretrained(tmp_path / "merged")


def test_a_broken_tie_is_not_saved(tmp_path: Path) -> None:
    model, _ = _merged("vit")
    fc1 = model.vit.layers[3].mlp.fc1
    fc1.weight = torch.nn.Parameter(fc1.weight.detach().clone())
    with pytest.raises(TieError, match="no longer shares"):
        checkpoint.save(model, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_an_unmerged_model_is_saved_as_transformers_does(tmp_path: Path) -> None:
    checkpoint.save(gpt2(), tmp_path / "plain")
    ids = torch.arange(10)[None]
    plain = GPT2LMHeadModel.from_pretrained(tmp_path / "plain")
    assert torch.equal(plain(ids).logits, gpt2()(ids).logits)


def _spoil(folder: Path, what: str) -> None:
    weights = folder / "model.ffmerge.safetensors"
    if what == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif what == "no weights":
        weights.unlink()
    elif what == "no config":
        (folder / "config.json").unlink()
    elif what == "config is not JSON":
        (folder / "config.json").write_text("{")
    elif what == "unknown type":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "model_type": "nonesuch"}))
    elif what == "unknown record":
        config = json.loads((folder / "config.json").read_text())
        config["ffmerge"]["colour"] = "red"
        (folder / "config.json").write_text(json.dumps(config))
    elif what == "a layer that is not there":
        config = json.loads((folder / "config.json").read_text())
        config["ffmerge"]["groups"][0]["layers"] = [1, 99]
        (folder / "config.json").write_text(json.dumps(config))
    elif what == "fewer layers recorded":
        config = json.loads((folder / "config.json").read_text())
        config["ffmerge"]["groups"][0]["layers"] = [1, 2]
        (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "what",
    [
        "truncated", "no weights", "no config", "config is not JSON", "unknown type",
        "unknown record", "a layer that is not there", "fewer layers recorded",
    ],
)  # fmt: skip
def test_a_spoilt_checkpoint_is_refused(what: str, tmp_path: Path) -> None:
    model, _ = _merged("vit")
    checkpoint.save(model, tmp_path / "merged")
    _spoil(tmp_path / "merged", what)
    with pytest.raises(InputError) as caught:
        checkpoint.load(tmp_path / "merged")
    assert len(str(caught.value).splitlines()) == 1


def test_a_missing_folder_is_refused_without_asking_the_hub(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a folder"):
        checkpoint.load(tmp_path / "nowhere")


def test_shards_hold_each_distinct_parameter_once_and_at_most_the_size_asked_for(
    tmp_path: Path,
) -> None:
    model, inputs = _merged("vit")
    checkpoint.save(model, tmp_path / "merged", max_shard_size="100KB")
    files = sorted((tmp_path / "merged").glob("model.ffmerge-*.safetensors"))
    assert len(files) > 2
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.ffmerge.json").read_text())
    sizes = []
    for file in files:
        with safe_open(file, "np") as shard:
            assert {name for name, at in index["weight_map"].items() if at == file.name} == {
                *shard.keys()
            }
            sizes.append(sum(shard.get_tensor(key).nbytes for key in shard.keys()))
    assert max(sizes) <= 100_000
    assert sum(sizes) == sum(p.nbytes for p in {id(p): p for p in model.parameters()}.values())
    again = checkpoint.load(tmp_path / "merged")
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    files[1].unlink()
    with pytest.raises(InputError):
        checkpoint.load(tmp_path / "merged")


def test_expanded_holds_every_copy_and_is_tied_again(tmp_path: Path) -> None:
    model, inputs = _merged("vit")
    checkpoint.save(model, tmp_path / "expanded", expanded=True)
    with safe_open(tmp_path / "expanded" / "model.safetensors", "np") as file:
        stored = sum(file.get_tensor(key).nbytes for key in file.keys())
    assert stored == sum(p.nbytes for p in vit().parameters())
    assert sorted(p.name for p in (tmp_path / "expanded").iterdir()) == [
        "config.json", "model.safetensors",
    ]  # fmt: skip
    again = checkpoint.load(tmp_path / "expanded")
    assert [t.members for t in ties.ties(again)] == [t.members for t in ties.ties(model)]
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    checkpoint.save(again, tmp_path / "once")  # and back
    assert len(ties.ties(checkpoint.load(tmp_path / "once"))) == 4


def test_saving_and_loading_run_the_model_once_however_many_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = gpt2()
    windows = {"layers": (1, 2)}
    merge_(model, None, MergeConfig(window=windows, method="average", task="text-generation"))
    groups = model.config.ffmerge["groups"]
    others = stacks(find(model))["layers"][3:5]  # a second group
    means = {}
    for key, one, two in zip(others[0].keys, *(member.weights for member in others), strict=True):
        means[key] = (model.get_parameter(one.name) + model.get_parameter(two.name)).detach() / 2
    ties.tie_(model, [others], [ties.SharedWeights(means)])
    model.config.ffmerge["groups"] = [*groups, {"stack": "layers", "layers": [3, 4]}]
    runs = []
    forward = type(model).forward

    def counted(self, *args, **kwargs):
        runs.append(self)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", functools.wraps(forward)(counted))
    checkpoint.save(model, tmp_path / "merged")
    assert len(runs) == 1
    again = checkpoint.load(tmp_path / "merged")
    assert len(runs) == 2
    checkpoint.save(model, tmp_path / "expanded", expanded=True)
    assert len(runs) == 3
    checkpoint.skeleton(tmp_path / "merged")
    assert len(runs) == 4
    assert ties.ties(again) == ties.ties(model)
    assert {len(tie.members) for tie in ties.ties(again)} == {2}
    assert len(ties.ties(again)) == 9  # two groups of four, and the head with the embeddings


def test_copies_that_differ_are_not_tied_again(tmp_path: Path) -> None:
    model, _ = _merged("vit")
    checkpoint.save(model, tmp_path / "expanded", expanded=True)
    weights = load_file(tmp_path / "expanded" / "model.safetensors")
    name = next(key for key in weights if "3.intermediate.dense.bias" in key)
    weights[name][0] += 1e-6
    save_file(weights, tmp_path / "expanded" / "model.safetensors", {"format": "pt"})
    with pytest.raises(TieError, match="no longer shares"):
        checkpoint.load(tmp_path / "expanded")


def test_the_generated_code_refuses_what_it_cannot_tie(tmp_path: Path) -> None:
    model, _ = _merged("vit")
    checkpoint.save(model, tmp_path / "merged")
    load = AutoModelForImageClassification.from_pretrained
    with pytest.raises(ValueError, match="classifier"):  # another head is another model ...
        load(tmp_path / "merged", trust_remote_code=True, num_labels=3)
    retrained = load(
        tmp_path / "merged", trust_remote_code=True, num_labels=3, ignore_mismatched_sizes=True
    )
    assert len(ties.ties(retrained)) == 4  # ... unless that is said
    code = tmp_path / "merged" / "modeling_ffmerge.py"
    text = code.read_text()
    for spoilt in ("(1, 2, 3)", "(0, 1, 2)"):
        code.write_text(text.replace("(1, 2, 3, 4)", spoilt))
        with pytest.raises(ValueError, match="holds no value"):
            load(tmp_path / "merged", trust_remote_code=True)


def test_a_class_that_no_auto_class_makes_is_found_through_auto_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = BertLMHeadModel(BertConfig(**sizes, vocab_size=60, is_decoder=True)).eval()
    model.__class__ = type("BertForNothing", (BertLMHeadModel,), {})
    # transformers replaces its module while it is imported: under pytest there can be two
    for module in (transformers, checkpoint.transformers):
        monkeypatch.setattr(module, "BertForNothing", model.__class__, raising=False)
    merge_(model, None, MergeConfig(window=(1, 2), method="average", task="text-generation"))
    checkpoint.save(model, tmp_path / "merged")
    auto_map = json.loads((tmp_path / "merged" / "config.json").read_text())["auto_map"]
    assert auto_map == {"AutoModel": "modeling_ffmerge.BertForNothing"}
    again = AutoModel.from_pretrained(tmp_path / "merged", trust_remote_code=True)
    ids = torch.arange(9)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)
