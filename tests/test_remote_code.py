"""Code that comes with a checkpoint is run with consent only, and then it is really used."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import gpt2, vit
from transformers import AutoModelForImageClassification

import ffmerge
import ffmerge.__main__ as command_line
from ffmerge.errors import InputError
from ffmerge.models import data, ties

# a ViT of another type, whose logits are doubled so that its own class shows
_CODE = """
from pathlib import Path
from transformers import ViTConfig, ViTForImageClassification

Path({marker!r}).write_text("run")

class OwnConfig(ViTConfig):
    model_type = "own_vit"

class OwnForImageClassification(ViTForImageClassification):
    config_class = OwnConfig

    def forward(self, pixel_values=None, **kwargs):
        out = super().forward(pixel_values, **kwargs)
        out.logits = out.logits * 2
        return out
"""


@pytest.fixture(autouse=True)
def no_question(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Consent is given on the command line; transformers asks nothing, and yes is not heard."""
    asked: list[object] = []
    monkeypatch.setattr("builtins.input", lambda *text: asked.append(text) or "y")
    yield
    assert asked == []


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "the code was run"


@pytest.fixture
def own(tmp_path: Path, marker: Path) -> Path:
    """A checkpoint whose model type only its own code knows."""
    folder = tmp_path / f"own_{tmp_path.name}"
    ffmerge.save(vit(layers=3), folder)
    (folder / "modeling_own.py").write_text(_CODE.format(marker=str(marker)))
    _configure(
        folder, model_type="own_vit", architectures=["OwnForImageClassification"],
        auto_map={
            "AutoConfig": "modeling_own.OwnConfig",
            "AutoModelForImageClassification": "modeling_own.OwnForImageClassification",
        },
    )  # fmt: skip
    return folder


def _configure(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def _run(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> int:
    monkeypatch.setattr(sys, "argv", ["ffmerge", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        command_line.main()
    return int(ended.value.code or 0)


@pytest.mark.parametrize("command", ["inspect", "merge", "export"])
def test_without_consent_it_is_refused_and_not_run(
    command: str, own: Path, marker: Path, monkeypatch, capsys
) -> None:
    out = () if command == "inspect" else (own.parent / "out",)
    window = ("--window", "0-1") if command == "merge" else ()
    before = sorted(own.parent.iterdir())
    assert _run(monkeypatch, command, own, *out, *window) == 2
    said = capsys.readouterr().err.strip()
    assert "--trust-remote-code" in said
    assert len(said.splitlines()) == 1
    assert not marker.exists()
    assert sorted(own.parent.iterdir()) == before


def test_with_consent_its_class_is_merged_reloaded_and_exported(
    own: Path, marker: Path, monkeypatch, capsys
) -> None:
    out, package = own.parent / "merged", own.parent / "package"
    assert _run(monkeypatch, "inspect", own, "--trust-remote-code", "--json") == 0
    assert json.loads(capsys.readouterr().out)["stacks"][0]["layers"] == 3
    assert marker.exists()
    window = ("--window", "1-2", "--method", "average", "--trust-remote-code")
    assert _run(monkeypatch, "merge", own, out, *window) == 0
    with pytest.raises(InputError, match="--trust-remote-code"):
        ffmerge.load(out)
    model = ffmerge.load(out, trust_remote_code=True)
    assert type(model).__name__ == "OwnForImageClassification"
    assert len(ties.ties(model)) == 4
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    plain = vit(layers=3)  # the same values, merged by hand: the mean of two layers
    for name, parameter in plain.vit.layers[1].mlp.named_parameters():
        other = plain.vit.layers[2].mlp.get_parameter(name)
        parameter.data = other.data = (parameter.data + other.data) / 2
    torch.testing.assert_close(
        model(pixels).logits, plain(pixels).logits * 2, rtol=0, atol=2e-6
    )  # measured 0
    assert _run(monkeypatch, "export", out, package, "--trust-remote-code") == 0
    assert ffmerge.validate(package).ok


def test_a_known_type_is_loaded_by_its_own_class_whatever_code_lies_beside(
    own: Path, marker: Path
) -> None:
    _configure(own, model_type="vit", architectures=["ViTForImageClassification"])
    pixels = torch.zeros(1, 3, 16, 16)
    torch.testing.assert_close(  # measured 6e-8
        ffmerge.load(own)(pixels).logits, vit(layers=3)(pixels).logits, rtol=0, atol=1e-6
    )
    _configure(own, architectures=["OwnForImageClassification"])  # a class that only the code has
    with pytest.raises(InputError, match="--trust-remote-code"):
        ffmerge.load(own)
    assert not marker.exists()


def test_ffmerges_own_code_is_not_run_by_ffmerge(tmp_path: Path, marker: Path) -> None:
    model = vit(layers=3)
    ffmerge.merge_(model, None, ffmerge.MergeConfig(window=(1, 2), method="average"))
    ffmerge.save(model, tmp_path / "merged")
    code = tmp_path / "merged" / "modeling_ffmerge.py"
    code.write_text(f"open({str(marker)!r}, 'w')\n" + code.read_text())
    for trust in (False, True):
        assert len(ties.ties(ffmerge.load(tmp_path / "merged", trust_remote_code=trust))) == 4
    assert not marker.exists()
    AutoModelForImageClassification.from_pretrained(tmp_path / "merged", trust_remote_code=True)
    assert marker.exists()  # the trap works


def test_code_of_a_tokenizer_is_not_run(tmp_path: Path, marker: Path) -> None:
    folder = tmp_path / "tokenizer"
    ffmerge.save(gpt2(), folder)
    (folder / "config.json").unlink()
    (folder / "own.py").write_text(_CODE.format(marker=str(marker)))
    auto_map = {"AutoTokenizer": ["own.OwnTokenizer", None]}
    config = {"tokenizer_class": "OwnTokenizer", "auto_map": auto_map}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "text.txt").write_text("some text\n")
    with pytest.raises(InputError, match="tokenizer"):
        data.read(str(tmp_path / "text.txt"), folder, "text-generation")
    assert not marker.exists()


def test_code_that_fails_is_one_sentence(own: Path) -> None:
    (own / "modeling_own.py").write_text("import nonesuch_package_of_ffmerge\n")
    with pytest.raises(InputError) as caught:
        ffmerge.load(own, trust_remote_code=True)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("command", ["merge", "export"])
@pytest.mark.parametrize("weights", ["none", "pickle", "corrupt"])
def test_what_cannot_be_read_is_one_sentence_and_leaves_nothing(
    command: str, weights: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    folder = tmp_path / "model"
    ffmerge.save(vit(layers=3), folder)
    stored = folder / "model.safetensors"
    if weights == "pickle":
        torch.save(load_file(stored), folder / "pytorch_model.bin")
    if weights == "corrupt":
        stored.write_bytes(b"\xff" * 1000)
    else:
        stored.unlink()
    np.savez(tmp_path / "data.npz", pixel_values=np.zeros((4, 3, 16, 16), "f"))
    before = sorted(tmp_path.iterdir())
    options = ("--k", 2, "--data", tmp_path / "data.npz") if command == "merge" else ()
    assert _run(monkeypatch, command, folder, tmp_path / "out", *options) == 2
    said = capsys.readouterr().err.strip()
    assert len(said.splitlines()) == 1
    assert {"none": "holds no weights", "pickle": "pickles", "corrupt": "cannot be loaded"}[
        weights
    ] in said
    assert sorted(tmp_path.iterdir()) == before
