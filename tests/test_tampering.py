"""A package that was changed is caught by the right check, which names the tensor."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tamper
from packages import linear_package
from tiny import vit

from ffmerge.config import ExportConfig, MergeConfig
from ffmerge.errors import InputError
from ffmerge.exporter.package import export
from ffmerge.models import checkpoint, data, digits
from ffmerge.models.manifest import Manifest
from ffmerge.passes.weights.merge import merge_

Run = Callable[..., tuple[int, dict[str, Any], str]]
DIGITS = Path(__file__).parents[1] / "models" / "digits_vit"


@pytest.fixture(scope="module")
def pictures() -> data.Examples:
    return data.from_arrays(digits.load("test", count=64))


def _exported(folder: Path, dtype: str, model: Any, pictures: data.Examples | None) -> Path:
    export(model, folder, ExportConfig(dtype=dtype), data=pictures)
    return folder


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny ViT whose layers 1-2 share, in float32, exported without data."""
    model = vit(layers=4)
    merge_(model, None, MergeConfig(window=(1, 2), method="weights"))
    return _exported(tmp_path_factory.mktemp("tied") / "p", "fp32", model, None)


@pytest.fixture(scope="module", params=["int8", "int4"])
def quantized(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, pictures: Any
) -> Path:
    """The trained digits ViT in fewer bits, with pictures."""
    folder = tmp_path_factory.mktemp(request.param) / "p"
    return _exported(folder, request.param, checkpoint.load(DIGITS), pictures)


@pytest.fixture
def copied(tied: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tied, tmp_path / "p"))


def test_a_flipped_byte_is_caught_by_the_checksums(run: Run, copied: Path) -> None:
    names = [t.name for t in Manifest.read(copied).tensors if t.path == "model.onnx_data"]
    name = next(n for n in names if n.endswith("layers.3.mlp.fc1.weight"))
    tamper.flip(copied, name)
    code, _, err = run("validate", copied, "--json")
    assert code == 2
    assert (
        f"model.onnx_data is not the file that ffmerge.json describes: the bytes of {name}" in err
    )
    assert not (copied / "validation.json").exists()


def test_a_flip_in_the_graph_is_no_tensor(tmp_path: Path) -> None:
    linear_package(tmp_path / "p", np.eye(32, dtype="f"), np.zeros(32, "f"))
    tamper.sealed(tmp_path / "p")
    path = tmp_path / "p" / "model.onnx"
    path.write_bytes(path.read_bytes().replace(b"hand", b"band"))
    with pytest.raises(InputError, match="its bytes changed"):
        Manifest.read(tmp_path / "p").check_files(tmp_path / "p")
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(InputError, match="bytes instead of"):
        Manifest.read(tmp_path / "p").check_files(tmp_path / "p")


def test_swapped_tensors_are_caught_by_parity_and_located(run: Run, copied: Path) -> None:
    names = [t.name for t in Manifest.read(copied).tensors]
    first, second = (
        next(n for n in names if f"layers.{i}." in n and n.endswith("o_proj.weight"))
        for i in (0, 3)
    )
    tamper.swap(copied, first, second)
    code, found, err = run("validate", copied, "--json")
    assert code == 1, err
    (provider,) = found["providers"]
    assert not any(output["ok"] for output in provider["outputs"])
    (divergence,) = provider["divergences"]
    assert divergence["tensors"][0] == first or first in divergence["tensors"]
    assert second not in divergence["tensors"]
    assert divergence["op"] in ("Add", "MatMul")
    assert "layers.0.attention" in divergence["layer"]
    assert divergence["judge"] == "PyTorch"
    assert divergence["difference"] > 0.5  # measured 1.4, as of two independent matrices
    assert first in provider["reason"]
    assert run("audit", copied, "--json")[0] == 0  # each is still stored once


def test_a_tie_broken_by_hand_is_caught_by_audit(run: Run, copied: Path) -> None:
    tie = next(t for t in Manifest.read(copied).ties if "fc1.weight" in t.name)
    value = tamper.repoint(copied, "MatMul", tie.name, 1, lambda w: w + np.float32(0.01), nth=1)
    code, found, _ = run("audit", copied, "--json")
    assert code == 1
    broken = [t for t in found["ties"] if not t["ok"]]
    assert [t["group"] for t in broken] == [tie.name]
    assert f"{tie.name} stands for 2 places but is used 1 times" in broken[0]["reason"]

    code, found, _ = run("validate", copied, "--json")
    assert code == 1
    (divergence,) = found["providers"][0]["divergences"]
    assert f"{tie.name}.copy" in divergence["tensors"]
    assert "layers.2.mlp" in divergence["layer"]
    assert value  # the product is a part of the node that is named


def test_a_quantized_package_passes_for_its_quality(run: Run, quantized: Path) -> None:
    code, found, err = run("validate", quantized, "--json")
    assert code == 0, (err, found)
    (provider,) = found["providers"]
    assert provider["divergences"] == []
    least, most = {"int8": (0.9998, 2e-4), "int4": (0.995, 2e-2)}[Manifest.read(quantized).dtype]
    for output in provider["outputs"]:
        assert output["quality"]["positions"] == 32
        assert output["quality"]["agreement"] == 1.0
        assert output["cosine"] > least  # measured 0.9999 and 0.998
        assert output["quality"]["kl"] < most  # measured 7e-5 and 1.2e-2
        assert [case["real"] for case in output["cases"]] == [False, False, False, True]


@pytest.mark.parametrize("wrong", ["doubled", "swapped"])
def test_a_wrongly_quantized_package_fails(
    run: Run, quantized: Path, tmp_path: Path, wrong: str
) -> None:
    folder = Path(shutil.copytree(quantized, tmp_path / "p"))
    name = "vit.layers.4.mlp.fc2.weight"
    if wrong == "swapped":
        tamper.swap(folder, name, "vit.layers.5.mlp.fc2.weight")
    else:
        getattr(tamper, wrong)(folder, name)
    code, found, err = run("validate", folder, "--json")
    assert code == 1, err
    (divergence,) = found["providers"][0]["divergences"]
    assert "layers.4.mlp.fc2" in divergence["layer"]
    assert {name, f"{name}/scale", "scale.new"} & {*divergence["tensors"]}
