"""The merge and inspect commands on models with several stacks."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_wider import seeded

from ffmerge.config import parse_windows
from ffmerge.errors import InputError
from ffmerge.models import checkpoint


@pytest.fixture
def model(tmp_path: Path) -> Path:
    made = seeded(
        "SwinForImageClassification", "SwinConfig", image_size=32, patch_size=2, embed_dim=16,
        depths=[4, 3], num_heads=[2, 4], window_size=4, num_labels=3,
    )  # fmt: skip
    made.save_pretrained(tmp_path / "swin")
    pixels = np.random.default_rng(0).standard_normal((12, 3, 32, 32)).astype("f")
    np.savez(tmp_path / "data.npz", pixel_values=pixels, labels=np.arange(12) % 3)
    return tmp_path / "swin"


@pytest.mark.parametrize(
    ("options", "groups"),
    [
        (["--window", "0-1", "--stack", "0", "--stack", "1"], [("0", [0, 1]), ("1", [0, 1])]),
        (["--window", "0:1-3", "--window", "1:0-2"], [("0", [1, 2, 3]), ("1", [0, 1, 2])]),
        (["--k", 3, "--stack", "1"], [("1", [0, 1, 2])]),
        (["--k", 3, "--sync", "--stack", 0, "--stack", 1], [("0", [0, 1, 2]), ("1", [0, 1, 2])]),
    ],
)  # fmt: skip
def test_stacks_of_one_command(options, groups, model, tmp_path, command) -> None:
    data = ["--data", tmp_path / "data.npz"]
    arguments = ("merge", model, tmp_path / "out", *options, *data, "--json")
    code, out, _ = command(*arguments)
    assert code == 0
    got = [(g["stack"], g["layers"]) for g in json.loads(out)["groups"]]
    assert got == groups
    _, out, _ = command("inspect", tmp_path / "out", "--json")
    shared = {s["name"]: (s["distinct"], s["shared"]) for s in json.loads(out)["stacks"]}
    before = {"0": 4, "1": 3}
    sizes = {stack: before[stack] - len(layers) + 1 for stack, layers in groups}
    assert shared == {s: (sizes.get(s, n), s in sizes) for s, n in before.items()}


@pytest.mark.parametrize(
    "options",
    [
        ["--k", 2],
        ["--k", 4, "--stack", "0", "--stack", "1"],
        ["--k", 2, "--stack", "0", "--stack", "2"],
        ["--window", "2-3", "--stack", "0", "--stack", "1"],
        ["--window", "0:0-1", "--window", "0:1-2"],
        ["--window", "0:0-1", "--window", "0-1"],
        ["--window", "0:0-1", "--stack", "1"],
    ],
)
def test_what_does_not_fit_ends_with_one_sentence(options, model, tmp_path, command):
    data = ["--data", tmp_path / "data.npz"]
    arguments = ("merge", model, tmp_path / "out", *options, *data)
    code, out, err = command(*arguments)
    assert (code, out, len(err.strip().splitlines())) == (2, "", 1)
    assert err.startswith("ffmerge: ")
    assert not (tmp_path / "out").exists()


def test_inspect_shows_what_is_left_alone(tmp_path, command) -> None:
    seeded(
        "Qwen2MoeForCausalLM", "Qwen2MoeConfig", hidden_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, intermediate_size=48, vocab_size=60,
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
        shared_expert_intermediate_size=40,
    ).save_pretrained(tmp_path / "m")  # fmt: skip
    code, out, _ = command("inspect", tmp_path / "m")
    assert code == 0
    assert "Left alone" in out
    assert "model.layers.1.mlp.experts" in out


def test_windows_by_stack() -> None:
    assert parse_windows([]) is None
    assert parse_windows(["3-7"]) == (3, 7)
    assert parse_windows(["a.b:0-1", "c:2-5"]) == {"a.b": (0, 1), "c": (2, 5)}
    for wrong in (["7-3"], ["a:b"], ["1-2", "1-2"], ["a:1-2", "a:2-3"]):
        with pytest.raises(InputError):
            parse_windows(wrong)


def test_a_device_that_is_not_there(model: Path, tmp_path: Path, command: Any) -> None:
    given = ("--window", "1:0-1", "--data", tmp_path / "data.npz", "--device", "cuda:9")
    code, _, err = command("merge", model, tmp_path / "out", *given)
    assert code == 2 and "cannot be put on --device 'cuda:9'" in " ".join(err.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [(), ("--offload",)], ids=str)
@pytest.mark.parametrize("dtype", ["no", "bf16"])
def test_a_gpu_merges_and_recovers_as_the_processor_does(
    dtype: str,
    options: tuple[str, ...],
    model: Path,
    tmp_path: Path,
    command: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not torch.cuda.is_available():
        required = os.environ.get("FFMERGE_CUDA") == "required"
        (pytest.fail if required else pytest.skip)("PyTorch sees no GPU here")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", dtype)
    given = ("--window", "0:1-3", "--data", tmp_path / "data.npz", "--tokens", 512)
    outputs = []
    for device, more in (("cpu", ()), ("cuda", options)):
        out = tmp_path / device
        steps = ("--recover", 3, "--learning-rate", 1e-4)
        assert command("merge", model, out, *given, *steps, "--device", device, *more)[0] == 0
        pixels = torch.from_numpy(np.load(tmp_path / "data.npz")["pixel_values"])
        with torch.no_grad():
            outputs.append(checkpoint.load(out)(pixels).logits)
    off = (outputs[0] - outputs[1]).abs().max() / outputs[0].abs().max()
    # held on an H100 without --offload; how far below these bounds has not been read yet
    assert off < {"no": 1e-4, "bf16": 2e-2}[dtype], float(off)
