"""ffmerge as passes of Olive, by a stand-in for what Olive asks, and by Olive if it is there."""

import json
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import yaml

from ffmerge.errors import InputError
from ffmerge.models import digits
from ffmerge.models.manifest import Manifest

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "examples" / "olive-recipes" / "HuggingFaceTB-SmolLM2-135M" / "cpu"
MODEL = ROOT / "models" / "digits_vit"


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module as Olive imports it; Olive's classes hold what they are given."""

    class Stand(SimpleNamespace):
        pass

    class Composite(Stand):
        def __init__(self, models: list[Stand], names: list[str]) -> None:
            super().__init__(models=models, names=names)

    for name, given in {
        "olive": {},
        "olive.model": {"ONNXModelHandler": Stand, "CompositeModelHandler": Composite},
        "olive.passes": {"Pass": object},
        "olive.passes.pass_config": {"PassConfigParam": Stand},
    }.items():
        module = ModuleType(name)
        vars(module).update(given)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "ffmerge.olive_pass", raising=False)
    yield import_module("ffmerge.olive_pass")
    sys.modules.pop("ffmerge.olive_pass")


def _run(passes: Any, name: str, out: Path, model: Any, **given: Any) -> Any:
    kind = getattr(passes, name)
    defaults = {key: param.default_value for key, param in kind._default_config(None).items()}
    assert set(given) <= set(defaults)
    assert all(param.description for param in kind._default_config(None).values())
    return kind()._run_for_config(model, SimpleNamespace(**{**defaults, **given}), str(out))


def _data(folder: Path) -> str:
    arrays = {name: array[:96] for name, array in dict(digits.load("validation")).items()}
    np.savez(folder / "d.npz", **arrays)
    return str(folder / "d.npz")


def test_a_model_is_merged_exported_and_rounded(passes: Any, tmp_path: Path) -> None:
    whole = SimpleNamespace(model_name_or_path=str(MODEL))
    given = {"method": "average", "budget": "-10%", "data": _data(tmp_path)}
    (tmp_path / "cache").mkdir()  # Olive makes the folder
    made = _run(passes, "FfmergeExport", tmp_path / "cache", whole, **given)
    assert made.onnx_file_name == "model.onnx"
    package = Manifest.read(Path(made.model_path))
    assert package.parameters <= 0.9 * 302_410
    assert not list(tmp_path.glob("tmp*"))
    graph = SimpleNamespace(model_path=f"{made.model_path}/model.onnx")
    shared = _run(passes, "FfmergeShare", tmp_path / "int8.onnx", graph, dtype="int8")
    assert Path(shared.model_path) == tmp_path / "int8"
    path = Path(shared.model_path) / shared.onnx_file_name
    onnx.checker.check_model(path)
    assert path.with_name("model.onnx_data").stat().st_size < 0.4 * package.bytes_unique


def test_a_model_of_several_graphs_is_a_composite(
    passes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = [SimpleNamespace(path="encoder_model.onnx"), SimpleNamespace(path="decoder.onnx")]
    result = SimpleNamespace(manifest=SimpleNamespace(graphs=graphs))
    monkeypatch.setattr(passes.commands, "export", lambda *given: result)
    whole = SimpleNamespace(model_name_or_path=str(MODEL))
    made = _run(passes, "FfmergeExport", tmp_path / "out", whole)
    assert made.names == ["encoder_model", "decoder"]
    assert [part.onnx_file_name for part in made.models] == [graph.path for graph in graphs]


@pytest.mark.parametrize("given", [{"profile": "cpu,portable"}, {"dtype": "fp32,q8"}])
def test_graphs_that_no_handler_would_name_are_refused(
    passes: Any, tmp_path: Path, given: dict[str, str]
) -> None:
    whole = SimpleNamespace(model_name_or_path=str(MODEL))
    with pytest.raises(InputError, match="give one profile and one dtype"):
        _run(passes, "FfmergeExport", tmp_path / "out", whole, **given)
    assert not (tmp_path / "out").exists()


def test_the_recipe_names_passes_and_options_that_there_are(passes: Any) -> None:
    config = json.loads((RECIPE / "package_config.json").read_text())
    assert config == {"passes": passes.PASSES}
    run = json.loads((RECIPE / "olive_config.json").read_text())
    for step in run["passes"].values():
        kind = getattr(passes, step["type"])
        assert set(step["config"]) <= set(kind._default_config(None))
    info = yaml.safe_load((RECIPE / "info.yml").read_text())
    files = [recipe["file"] for recipe in info["recipes"]]
    assert all((RECIPE / file).is_file() for file in files)
    command = json.loads((RECIPE / "olive_ci.json").read_text())[0]["command"]
    assert command in (RECIPE / "README.md").read_text()


@pytest.mark.skipif(find_spec("olive") is None, reason="olive-ai is not installed")
def test_olive_runs_the_passes(tmp_path: Path) -> None:
    run = {
        "input_model": {"type": "HfModel", "config": {"model_path": str(MODEL)}},
        "passes": {"e": {"type": "FfmergeExport", "config": {}}},
        "engine": {"cache_dir": str(tmp_path / "cache"), "output_dir": str(tmp_path / "out")},
    }
    run["input_model"]["config"]["task"] = "image-classification"
    (tmp_path / "run.json").write_text(json.dumps(run))
    words = ["run", "--config", "run.json", "--package-config", RECIPE / "package_config.json"]
    subprocess.run([sys.executable, "-m", "olive", *words], cwd=tmp_path, check=True)
    assert list((tmp_path / "out").rglob("model.onnx"))
