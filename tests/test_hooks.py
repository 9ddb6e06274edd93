"""The GitHub Action and the pre-commit hook: what their files say is run, and ends as it should."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import yaml
from graphs import build, normal
from packages import linear_package

ROOT = Path(__file__).parents[1]
# where this interpreter's commands are, ffmerge among them
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def bash(script: str, *words: str, **environment: str) -> int:
    environment = {**os.environ, "PATH": PATH, **environment}
    return subprocess.run(["bash", "-c", script, *words], env=environment, check=False).returncode


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    """A good ONNX file, and one that stores a matrix twice."""
    text = "(float[n,64] x) => (float[n,64] y) { h = MatMul(x, W) y = MatMul(h, V) }"
    weight = normal(64, 64)
    for name, second in (("good", normal(64, 64, seed=1)), ("twice", weight)):
        ir.save(build(text, W=weight, V=second), tmp_path / f"{name} file.onnx")
    return str(tmp_path / "good file.onnx"), str(tmp_path / "twice file.onnx")


def test_the_hook_takes_several_files_and_fails_for_any(files: tuple[str, str]) -> None:
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    good, twice = files
    program, flag, script, zeroth = shlex.split(hook["entry"])
    assert (program, flag) == ("bash", "-c")
    assert bash(script, zeroth, good, good) == 0
    assert bash(script, zeroth, twice, good) == 1


def test_the_action_audits_and_validates(files: tuple[str, str], tmp_path: Path) -> None:
    action = yaml.safe_load((ROOT / "action.yml").read_text())
    steps = {step["name"]: step for step in action["runs"]["steps"]}
    assert [*steps] == ["Install", "Audit", "Validate"]
    assert "pip install" in steps["Install"]["run"]
    for name in ("Audit", "Validate"):
        for value in steps[name]["env"].values():
            assert value.split(".")[1].strip(" }") in action["inputs"]
    good, twice = files
    assert bash(steps["Audit"]["run"], TARGET=good) == 0
    assert bash(steps["Audit"]["run"], TARGET=twice) == 1
    package = tmp_path / "package"
    linear_package(package, normal(4, 3), np.zeros(3, np.float32))
    assert bash(steps["Validate"]["run"], TARGET=str(package), PROVIDER="cpu") == 0
    assert bash(steps["Validate"]["run"], TARGET=str(package), PROVIDER="nothing") == 2
