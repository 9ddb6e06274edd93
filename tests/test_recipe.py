"""Recipes: the same commands from one file, refused before anything is done if one is wrong."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import typer
from reference.tasks import REFERENCES
from tiny import vit

from ffmerge.__main__ import app
from ffmerge.recipe import steps

DIGITS = REFERENCES["digits"]

RECIPE = """
- merge: {{model: {0}/vit, out: {0}/merged, budget: -5%, data: {0}/data.npz, batch-size: 4}}
- export: {{model: {0}/merged, out: {0}/package, dtype: int8}}
- audit: {{path: {0}/package, load: no}}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    vit(64, 256, layers=2).save_pretrained(tmp_path / "vit")
    pixels = np.random.default_rng(0).standard_normal((8, 3, 16, 16)).astype("f")
    np.savez(tmp_path / "data.npz", pixel_values=pixels)
    return tmp_path


def test_its_steps_are_the_commands(folder: Path, command: Any) -> None:
    (folder / "r.yaml").write_text(RECIPE.format(folder))
    code, out, _ = command("run", folder / "r.yaml", "--json")
    steps = json.loads(out)["steps"]
    assert (code, [step["command"] for step in steps]) == (0, ["merge", "export", "audit"])
    assert [step["exit_code"] for step in steps] == [0, 0, 0]
    by_hand = folder / "by_hand"
    options = ["--budget=-5%", "--data", folder / "data.npz", "--batch-size", 4, "--json"]
    _, merged, _ = command("merge", folder / "vit", by_hand, *options)
    assert steps[0]["result"] == json.loads(merged)
    name = "model.ffmerge.safetensors"
    assert (folder / "merged" / name).read_bytes() == (by_hand / name).read_bytes()
    assert json.loads((folder / "package" / "ffmerge.json").read_text())["dtype"] == "int8"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("share: {source: a, target: b, resident: no}", "share --no-resident -- a b"),
        ("share: {target: b, source: a, resident: yes, opset: 17}",
         "share --resident --opset=17 -- a b"),
        ("validate: {package: p, provider: [cpu, webgpu], all: yes}",
         "validate --provider=cpu --provider=webgpu --all -- p"),
        ("merge: {model: m, out: o, budget: -5%, auto_precision: no}", "merge --budget=-5% -- m o"),
    ],
)  # fmt: skip
def test_options_are_what_would_be_typed(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(f"- {text}")
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert steps(tmp_path / "r.yaml", commands) == [words.split()]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- merge: {model: a, out: b, windows: 1-2}", "step 1: merge has no windows; it has model"),
        ("- export: {model: a, out: b}\n- fly: {}", "step 2: no command 'fly'"),
        ("- merge: {model: a, out: b, k: two}", "'--k'"),
        ("- merge: {model: a, out: b, k: yes}", "k takes a value, not True"),
        ("- export: {model: a}", "Missing argument 'out'"),
        ("- run: {recipe: r.yaml}", "no command 'run'"),
        ("- merge", "write `- COMMAND: {option: value}`"),
        ("- merge: 3", "takes its options as"),
        ("- [", "cannot be read"),
        ("", "write `- COMMAND: {option: value}`"),
    ],
)
def test_a_wrong_recipe_is_refused_before_its_first_step(
    text: str, said: str, folder: Path, command: Any
) -> None:
    fine = f"- merge: {{model: {folder}/vit, out: {folder}/new, window: 0-1, method: average}}\n"
    (folder / "r.yaml").write_text(text)
    code, out, err = command("run", folder / "r.yaml")
    assert (code, out) == (2, "") and said in err and err.count("\n") == 1
    (folder / "r.yaml").write_text(fine + (text or "-"))
    assert command("run", folder / "r.yaml")[0] == 2
    assert not (folder / "new").exists()


def test_it_stops_at_the_step_that_fails(folder: Path, command: Any) -> None:
    """Input that cannot be used ends with 2 and its sentence, what does not hold with 1."""
    window = f"- merge: {{model: {folder}/vit, out: {folder}/new, window: 0-9, method: average}}\n"
    (folder / "r.yaml").write_text(f"{window}- inspect: {{model: {folder}/vit}}\n")
    code, out, err = command("run", folder / "r.yaml")
    assert (code, out) == (2, "") and "window 0-9 is out of range" in err
    equal = onnx.numpy_helper.from_array(np.ones((64, 64), np.float32))
    twice = [onnx.TensorProto(name=name) for name in "ab"]
    for tensor in twice:
        tensor.MergeFrom(onnx.TensorProto(dims=equal.dims, data_type=1, raw_data=equal.raw_data))
    shape = [onnx.helper.make_tensor_value_info(name, 1, [64, 64]) for name in "y"]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Add", ["a", "b"], ["y"])], "g", [], shape, twice
    )
    onnx.save(onnx.helper.make_model(graph), folder / "twice.onnx")
    step = f"- audit: {{path: {folder}/twice.onnx, load: no}}\n"
    (folder / "r.yaml").write_text(f"{step}- inspect: {{model: {folder}/vit}}\n")
    code, out, err = command("run", folder / "r.yaml", "--json")
    assert code == 1 and err.startswith("ffmerge: step 1 of 2: audit --no-load")
    assert len(err.splitlines()) == 1
    assert [(s["command"], s["exit_code"]) for s in json.loads(out)["steps"]] == [("audit", 1)]


def test_steps_are_announced_and_a_dry_run_does_none(tmp_path: Path, command: Any) -> None:
    model, out = DIGITS.folder, tmp_path / "package"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"- inspect: {{model: {model}}}\n- export: {{model: {model}, out: {out}}}\n")
    code, _, err = command("run", recipe, "--dry-run")
    lines = err.splitlines()
    assert code == 0 and not out.exists()
    assert lines == [
        f"ffmerge: step 1 of 2: inspect {model}",
        f"ffmerge: step 2 of 2: export {model} {out}",
    ]
    code, _, err = command("run", recipe, "--dry-run", "-q")
    assert code == 0 and err == ""
    recipe.write_text("- push: {package: p, repository: a/b, token: hf_secret}\n")
    code, out, err = command("run", recipe, "--dry-run", "--json")
    assert code == 0 and "secret" not in out + err and "push --token=*** p a/b" in err


def test_verbose_tells_every_step_and_quiet_none(tmp_path: Path, command: Any) -> None:
    model = DIGITS.folder
    code, _, err = command("export", model, tmp_path / "a", "-v")
    assert code == 0 and "tracing and writing (" in err
    code, _, err = command("-q", "export", model, tmp_path / "b")
    assert code == 0 and err == ""
