"""What is installed is ``ffmerge`` and nothing else, and every room is in it."""

import tomllib
import zipfile
from pathlib import Path

import pytest
from setuptools import build_meta

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr("sys.argv", ["setup.py", "--quiet"])
        name = build_meta.build_wheel(str(folder))
    return zipfile.ZipFile(folder / name)


def test_only_ffmerge_is_installed(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"ffmerge"}
    assert not any(name.startswith("ffmerge/tests") for name in wheel.namelist())


def test_every_source_file_of_the_rooms_is_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    rooms = ("models", "passes", "exporter", "runtime_tests")
    sources = [p for room in rooms for p in (ROOT / room).rglob("*.py")] + list(ROOT.glob("*.py"))
    expected = {f"ffmerge/{p.relative_to(ROOT).as_posix()}" for p in sources}
    assert {n for n in wheel.namelist() if n.endswith(".py")} == expected


def test_the_demo_model_and_the_template_are_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    for name in ("models/digits_vit/model.safetensors", "runtime_tests/report.html.j2", "py.typed"):
        assert f"ffmerge/{name}" in names


def test_the_packages_list_names_every_room() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {
        ".".join(("ffmerge", *p.parent.relative_to(ROOT).parts))
        for room in ("models", "passes", "exporter", "runtime_tests")
        for p in (ROOT / room).rglob("__init__.py")
    }
    assert set(listed) == found | {"ffmerge"}


def test_the_reference_model_is_small_and_good() -> None:
    import torch

    from ffmerge.models import checkpoint, digits

    folder = ROOT / "models" / "digits_vit"
    assert (folder / "model.safetensors").stat().st_size <= 3_000_000
    model, test = checkpoint.load(folder), digits.load("test")
    with torch.no_grad():
        logits = model(torch.from_numpy(test["pixel_values"])).logits.numpy()
    assert model.config.num_hidden_layers == 12
    assert (logits.argmax(-1) == test["labels"]).mean() >= 0.97  # measured 0.975
