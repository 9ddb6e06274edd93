"""A device runs share, audit, validate and report where torch is not installed."""

import ast
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx
import pytest
from device_env import require_device, run_on_device
from onnx import TensorProto, helper, numpy_helper

import ffmerge
from ffmerge.models import digits

MODEL = Path(ffmerge.__file__).parent / "models" / "digits_vit"
BIG = ("torch", "transformers", "optimum", "accelerate", "datasets", "scipy", "scikit-learn")


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package of the digits ViT with real rows, made where torch is."""
    folder = tmp_path_factory.mktemp("device") / "package"
    rows = digits.load("validation", count=40)
    ffmerge.export(ffmerge.load(MODEL), folder, source=MODEL, data=rows)
    return folder


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return run_on_device("-m", "ffmerge", *arguments)


def test_nothing_big_is_installed_there() -> None:
    """Otherwise the other tests would say nothing."""
    code = "from importlib.metadata import distributions as d; print([p.name for p in d()])"
    done = run_on_device("-c", code)
    names = ast.literal_eval(done.stdout)
    assert "onnxruntime" in names and not {*names} & {*BIG}, done.stderr


def test_every_module_of_the_device_side_imports(package: Path) -> None:
    root = Path(ffmerge.__file__).parent
    files = [*root.glob("passes/graph/*.py"), *root.glob("runtime_tests/**/*.py")]
    names = [".".join(("ffmerge", *f.relative_to(root).with_suffix("").parts)) for f in files]
    apart = ("conftest", "test_package", "__main__", "__init__")  # these run when imported
    names = [name for name in names if not name.endswith(apart)]
    assert len(names) > 30
    done = run_on_device("-c", f"import importlib\nfor n in {names}: importlib.import_module(n)")
    assert done.returncode == 0, done.stderr


def test_a_package_is_validated_and_reported(package: Path, tmp_path: Path) -> None:
    copy = tmp_path / "package"
    shutil.copytree(package, copy)
    done = run("validate", copy, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ok"] is True
    for name in ("validation.json", "report.html", "report.md"):
        assert (copy / name).stat().st_size > 500


def test_data_of_the_task_is_measured_from_an_npz(package: Path, tmp_path: Path) -> None:
    copy, data = tmp_path / "package", tmp_path / "test.npz"
    shutil.copytree(package, copy)
    rows = digits.load("test", count=200)
    np.savez(data, **rows)
    done = run("validate", copy, "--data", data, "--json")
    assert done.returncode == 0, done.stderr
    metric = json.loads(done.stdout)["metric"]
    assert (metric["name"], metric["examples"]) == ("accuracy", 200)
    assert metric["value"] > 0.9


def test_a_package_is_audited(package: Path) -> None:
    done = run("audit", package, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert (found["ok"], found["basis"]) == (True, "loaded")


@pytest.mark.parametrize("dtype", ["fp16", "int8", "int4"])
def test_a_file_is_shared(tmp_path: Path, dtype: str) -> None:
    """Two equal matrices of 64 x 64 become one."""
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    shape = ["rows", 64]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["between"]),
        helper.make_node("MatMul", ["between", "b"], ["y"]),
    ]
    weights = [numpy_helper.from_array(weight, name) for name in "ab"]
    graph = helper.make_graph(nodes, "g", [x], [y], weights)
    source = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), source)
    done = run("share", source, tmp_path / "shared.onnx", "--dtype", dtype, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["bytes_before"] == 2 * weight.nbytes
    assert found["bytes_unique"] < 0.6 * weight.nbytes  # measured: 0.5, 0.27 and 0.16 of it


@pytest.mark.parametrize("words", [("inspect", MODEL), ("merge", MODEL, "out", "--k", "2")])
def test_what_needs_torch_says_how_to_get_it(words: tuple[object, ...], tmp_path: Path) -> None:
    require_device()
    done = run(*(tmp_path / w if w == "out" else w for w in words))
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"ffmerge: {words[0]} needs torch, which is not installed: pip install 'ffmerge[torch]'."
    ]
