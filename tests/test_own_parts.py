"""What layers that share have for themselves, through files: whole, exact, or one sentence."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import gpt2, vit
from tiny_wider import GATED, SEQ2SEQ, t5

import ffmerge
import ffmerge.__main__ as command_line
from ffmerge.config import MergeConfig
from ffmerge.errors import InputError
from ffmerge.models import checkpoint, ties
from ffmerge.models.inputs import example_inputs
from ffmerge.models.inspection import inspect
from ffmerge.passes.weights.merge import merge_
from ffmerge.passes.weights.methods import METHODS

OWN = "ffmerge.safetensors"
MODELS: dict[str, Callable[[], Any]] = {
    "vit": lambda: vit(32, 64, 4),
    "gpt2": lambda: gpt2(32, 64, 4),  # Conv1D
    "llama": GATED["llama"],  # gate and up, no biases
    "phi3": GATED["phi3"],  # gate and up in one
    "t5": lambda: t5(3, 3),  # two stacks, no biases
    "marian": lambda: SEQ2SEQ["marian"](3, 3),
}
BIASED = ("vit", "gpt2", "marian")


def _data(model: Any) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": generator.standard_normal((6, 3, 16, 16)).astype("f")}
    ids = generator.integers(3, 61, (6, 8))
    decoder = {"decoder_input_ids": ids[:, :5]} if model.config.is_encoder_decoder else {}
    return {"input_ids": ids, **decoder}


def _merged(name: str, method: str = "residual") -> Any:
    """Return a model whose layers 1 and 2 of every stack share, with parts of rank 2."""
    model = MODELS[name]()
    data = _data(model)
    merge_(model, data, MergeConfig(window=(1, 2), method=method, rank=2), data)
    return model


@ffmerge.method("residual, one bias", source="this test")
def _one_bias(model: Any, members: Any, evidence: Any) -> ffmerge.SharedWeights:
    """As residual, but what a plain class has is the same in all layers."""
    found = METHODS["residual"].merge(model, members, evidence)
    assert isinstance(found, ffmerge.SharedWeights)
    own = [{key: x for key, x in each.items() if key[1] != "bias"} for each in found.own]
    shared = {key: x for key, x in found.own[0].items() if key in members[0].keys}
    return ffmerge.SharedWeights({**found.shared, **shared}, own)


@ffmerge.method("own biases", source="this test", statistics=False)
def _own_biases(model: Any, members: Any, evidence: Any) -> ffmerge.SharedWeights:
    """As average, but each layer keeps its biases."""
    shared = dict(METHODS["average"].merge(model, members, evidence).shared)
    own = [
        {key: model.get_parameter(w.name).detach() for key, w in zip(m.keys, m.weights, strict=True)
         if key[1] == "bias"}
        for m in members
    ]  # fmt: skip
    return ffmerge.SharedWeights({k: x for k, x in shared.items() if k[1] != "bias"}, own)


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        inputs = example_inputs(model)
        floats = next(model.parameters()).dtype
        given = {k: x.to(floats) if x.is_floating_point() else x for k, x in inputs.items()}
        return model(**given).logits


def _parts(model: Any) -> set[str]:
    ends = ("scale", "up", "down")
    return {name for name, _ in model.named_parameters() if name.rsplit(".", 1)[-1] in ends}


def _stored(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of all weight files."""
    files = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    return {key: tensor for tensors in files for key, tensor in tensors.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_they_come_back_exactly_in_every_way(name: str, dtype: Any, tmp_path: Path) -> None:
    """By ffmerge, by the code beside the weights, and saved again from either."""
    model = _merged(name)
    for parameter in model.parameters():  # not what a model computes, such as rotary angles
        parameter.data = parameter.data.to(dtype)
    wanted = _logits(model)
    shards = "20KB" if dtype == torch.bfloat16 else "5GB"
    checkpoint.save(model, tmp_path / "a", max_shard_size=shards)
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["ffmerge"]["own"] == ["bias", "down", "scale", "up"]
    again = checkpoint.load(tmp_path / "a")
    auto = getattr(transformers, next(iter(config["auto_map"])))
    remote = auto.from_pretrained(tmp_path / "a", trust_remote_code=True, dtype="auto").eval()
    for found in (again, remote):
        assert torch.equal(_logits(found), wanted)
        assert ties.ties(found) == ties.ties(model)
        assert _parts(found) == _parts(model)
        assert {p.dtype for p in found.parameters()} == {dtype}
    remote.save_pretrained(tmp_path / "b", max_shard_size=shards)
    checkpoint.save(again, tmp_path / "c", max_shard_size=shards)
    checkpoint.save(remote, tmp_path / "d", max_shard_size=shards)
    first, *others = (_stored(tmp_path / folder) for folder in "abcd")
    for other in others:
        assert first.keys() == other.keys()
        assert all(torch.equal(first[key], other[key]) for key in first)
    assert torch.equal(_logits(checkpoint.load(tmp_path / "b")), wanted)


@pytest.mark.parametrize("name", [n for n in MODELS if n != "marian"])  # positions: not stored
def test_every_parameter_is_stored_once_and_counted(name: str, tmp_path: Path) -> None:
    model = _merged(name)
    checkpoint.save(model, tmp_path / "merged")
    stored = sum(tensor.numel() for tensor in _stored(tmp_path / "merged").values())
    assert stored == sum(p.numel() for p in model.parameters())
    bare = checkpoint.skeleton(tmp_path / "merged")
    assert {p.device.type for p in bare.parameters()} == {"meta"}
    for found in (inspect(tmp_path / "merged"), inspect(model)):
        assert found.parameters == sum(p.numel() for p in model.parameters())
        assert found.parameters == model.config.ffmerge["parameters_after"]
        assert all(found.distinct[name] < found.runs(name) for name in found.stacks)
    sizes = inspect(tmp_path / "merged").sizes
    assert sizes == inspect(model).sizes


@pytest.mark.parametrize("name", BIASED)
def test_expanded_is_a_plain_checkpoint_with_all_multiplied_out(name: str, tmp_path: Path) -> None:
    model = _merged(name)
    checkpoint.save(model, tmp_path / "plain", expanded=True)
    names = {path.name for path in (tmp_path / "plain").iterdir()}
    assert "model.safetensors" in names and not {OWN, "modeling_ffmerge.py"} & names
    assert "ffmerge" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    plain, info = type(model).from_pretrained(tmp_path / "plain", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    loaded = checkpoint.load(tmp_path / "plain")
    for found in (plain.eval(), loaded):
        error = (_logits(found) - _logits(model)).abs().max()
        assert error < 3e-6  # measured 3.6e-7
    assert not _parts(loaded)
    assert torch.equal(_logits(checkpoint.load(_saved(model, tmp_path))), _logits(model))


def _saved(model: Any, folder: Path) -> Path:
    checkpoint.save(model, folder / "once")
    return folder / "once"


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_expanded_is_refused_where_no_plain_class_has_the_biases(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no biases to hold") as caught:
        checkpoint.save(_merged(name), tmp_path / "plain", expanded=True)
    assert len(str(caught.value).splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
    model = _merged(name, "residual, one bias")  # scale and residual alone can be multiplied out
    checkpoint.save(model, tmp_path / "plain", expanded=True)
    error = (_logits(checkpoint.load(tmp_path / "plain")) - _logits(model)).abs().max()
    assert error < 5e-6  # measured 1.1e-6


def test_own_biases_alone_need_no_file_of_their_own(tmp_path: Path) -> None:
    model = _merged("gpt2", "own biases")
    for expanded in (False, True):
        folder = tmp_path / str(expanded)
        checkpoint.save(model, folder, expanded=expanded)
        assert not (folder / OWN).exists()
        ways = [checkpoint.load(folder)]
        if not expanded:
            auto = transformers.AutoModelForCausalLM.from_pretrained
            ways.append(auto(folder, trust_remote_code=True).eval())
        for again in ways:
            assert torch.equal(_logits(again), _logits(model))
            assert ties.ties(again) == ties.ties(model)


def _spoil(folder: Path, what: str) -> None:
    file = folder / OWN
    stored = load_file(file)
    if what == "missing":
        file.unlink()
    elif what == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif what == "no safetensors":
        file.write_bytes(b"\xff" * 500)
    elif what == "of a model of another size":
        other = gpt2(16, 32, 4)
        chosen = MergeConfig(window=(1, 2), method="residual", rank=2)
        merge_(other, _data(other), chosen)
        checkpoint.save(other, folder.parent / "other")
        file.write_bytes((folder.parent / "other" / OWN).read_bytes())
    elif what == "of other layers":
        save_file({key.replace("0.2.", "0.3."): t for key, t in stored.items()}, file)
    elif what == "a layer without":
        save_file({key: t for key, t in stored.items() if not key.startswith("0.2.")}, file)
    elif what == "one part less":
        save_file({key: t for key, t in stored.items() if not key.endswith("scale")}, file)
    elif what == "a part too much":
        save_file({**stored, "0.1.0.colour": torch.zeros(64)}, file)
    elif what == "empty":
        save_file({}, file)


@pytest.mark.parametrize(
    "what",
    [
        "missing", "truncated", "no safetensors", "of a model of another size", "of other layers",
        "a layer without", "one part less", "a part too much", "empty",
    ],
)  # fmt: skip
def test_a_spoilt_file_is_one_sentence(what: str, tmp_path: Path) -> None:
    checkpoint.save(_merged("gpt2"), tmp_path / "merged")
    _spoil(tmp_path / "merged", what)
    for read in (checkpoint.load, inspect):
        with pytest.raises(InputError, match=r"ffmerge\.safetensors") as caught:
            read(tmp_path / "merged")
        assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(Exception):  # noqa: B017  (whatever the loader raises, but no model)
        transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "merged", trust_remote_code=True
        )


def test_a_file_that_no_merge_wrote_is_left_alone(tmp_path: Path) -> None:
    model = _merged("gpt2", "permute")
    checkpoint.save(model, tmp_path / "merged")
    save_file({"0.1.0.scale": torch.zeros(64)}, tmp_path / "merged" / OWN)
    assert torch.equal(_logits(checkpoint.load(tmp_path / "merged")), _logits(model))


def test_the_command_merges_with_them_and_says_why_it_cannot_expand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = GATED["llama"](3)
    checkpoint.save(model, tmp_path / "model")
    np.savez(tmp_path / "data.npz", **_data(model))
    options = ("--window", "1-2", "--data", tmp_path / "data.npz", "--method", "residual")

    def run(out: str, *more: str) -> int:
        given = ["ffmerge", "merge", tmp_path / "model", tmp_path / out, *options, *more]
        monkeypatch.setattr(sys, "argv", [str(each) for each in given])
        with pytest.raises(SystemExit) as ended:
            command_line.main()
        return int(ended.value.code or 0)

    assert run("plain", "--expanded") == 2
    assert "no biases to hold" in capsys.readouterr().err
    assert not (tmp_path / "plain").exists()
    assert run("once", "--json") == 0
    assert json.loads(capsys.readouterr().out)["own"] == ["bias", "down", "scale", "up"]
    assert _parts(checkpoint.load(tmp_path / "once"))
