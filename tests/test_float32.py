"""Checkpoints of 16 bits in an export: the same package, from weights that are not in memory."""

import sys
from pathlib import Path

import pytest
import torch
from tiny import gpt2, vit

from ffmerge import commands
from ffmerge.config import ExportConfig, LoadConfig
from ffmerge.errors import InputError
from ffmerge.models import checkpoint, float32
from ffmerge.models.float32 import float32_
from ffmerge.runtime_tests.validate import validate

NARROW = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize(
    "dtype", [NARROW[0], pytest.param(NARROW[1], marks=pytest.mark.slow)], ids=str
)
def test_the_package_is_that_of_the_widened_model(dtype: torch.dtype, tmp_path: Path) -> None:
    """Weights are compared as bytes, and outputs with PyTorch: nothing is rounded on the way."""
    model = gpt2(layers=2).to(dtype)
    model.save_pretrained(tmp_path / "narrow")
    model.float().save_pretrained(tmp_path / "wide")
    for name in ("narrow", "wide"):
        commands.export(str(tmp_path / name), tmp_path / "out" / name, ExportConfig(), LoadConfig())
    data = [
        (tmp_path / "out" / name / "model.onnx_data").read_bytes() for name in ("narrow", "wide")
    ]
    assert data[0] == data[1]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["narrow", "wide"]
    assert validate(tmp_path / "out" / "narrow").ok


@pytest.mark.skipif(sys.platform != "linux", reason="mapped files are read from /proc")
def test_weights_are_pages_of_files(tmp_path: Path, monkeypatch) -> None:
    """Each lies where the system has mapped a file of the folder; ties and values hold."""
    monkeypatch.setattr(float32, "AT_ONCE", 4 * 64 * 256)  # the largest weight, or several small
    model = vit(layers=2).bfloat16()
    model.vit.layers[1].mlp = model.vit.layers[0].mlp
    wanted = {name: p.float() for name, p in model.named_parameters(remove_duplicate=False)}
    float32_(model, tmp_path)
    files = [*tmp_path.iterdir()]
    assert len(files) > 3
    assert max(f.stat().st_size for f in files) < 4 * 64 * 256 + 4096
    spans = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(".safetensors") and str(tmp_path) in line:
            spans.append([int(end, 16) for end in line.split()[0].split("-")])
    found = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in found.items():
        assert torch.equal(parameter, wanted[name])
        assert any(low <= parameter.data_ptr() < high for low, high in spans), name
    layers = model.vit.layers
    assert layers[0].mlp.fc1.weight is layers[1].mlp.fc1.weight


def test_a_float32_model_is_left_as_it_is(tmp_path: Path) -> None:
    model = vit(layers=2)
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    float32_(model, tmp_path)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == before
    assert [*tmp_path.iterdir()] == []


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    gpt2(layers=2).bfloat16().save_pretrained(tmp_path / "model")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(float32, "save_file", full)
    with pytest.raises(InputError, match=r"float32 weights cannot be written: .*No space left"):
        commands.export(str(tmp_path / "model"), tmp_path / "out", ExportConfig(), LoadConfig())
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert checkpoint.load(tmp_path / "model").dtype == torch.bfloat16


def test_data_that_cannot_be_read_is_not_an_output_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpt2(layers=2).save_pretrained(tmp_path / "model")

    def broken(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(commands.data, "read", broken)
    with pytest.raises(PermissionError):
        commands.export(
            str(tmp_path / "model"), tmp_path / "out", ExportConfig(), LoadConfig(), "data.txt"
        )
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
