"""The command line as a user meets it: exit codes, JSON, and what bad input leaves behind."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from tiny import ABOVE, BELOW, vit
from transformers import ResNetConfig, ResNetForImageClassification

import ffmerge.__main__ as command_line
from ffmerge.models import checkpoint

Run = Callable[..., tuple[int, dict[str, Any], str]]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "vit"
    checkpoint.save(vit(), folder)
    generator = np.random.default_rng(0)
    np.savez(
        folder.parent / "data.npz",
        pixel_values=generator.standard_normal((16, 3, 16, 16)).astype("f"),
        labels=generator.integers(0, 7, 16),
    )
    return folder


def test_merge_export_audit_validate(run: Run, model_folder: Path, tmp_path: Path) -> None:
    """The line from a checkpoint to a validated package, each step by its own command."""
    data = model_folder.parent / "data.npz"
    code, merged, _ = run("merge", model_folder, tmp_path / "m", "--k", 4, "--data", data, "--json")
    assert code == 0
    removed = 3 * 2 * 64 * 256 - 4 * 256  # every layer keeps its biases, and gets a scale
    assert merged["parameters_before"] - merged["parameters_after"] == removed
    assert merged["bytes_before"] - merged["bytes_after"] == 4 * removed
    assert set(merged["metric"]) >= {"name", "before", "merged", "recovered"}
    assert [len(g["layers"]) for g in merged["groups"]] == [4]

    code, exported, _ = run("export", tmp_path / "m", tmp_path / "p", "--json")
    assert code == 0
    on_disk = sum(f.stat().st_size for f in (tmp_path / "p").iterdir() if f.name != "ffmerge.json")
    assert exported["bytes_total"] == on_disk == sum(f["bytes"] for f in exported["files"])

    code, audited, _ = run("audit", tmp_path / "p", "--json")
    assert (code, audited["ok"], audited["bytes_duplicate"]) == (0, True, 0)
    assert len(audited["ties"]) == 2
    assert audited["bytes_unique"] == exported["bytes_unique"]

    code, validated, err = run("validate", tmp_path / "p", "--data", data, "--json")
    assert code == 0, err
    (provider,) = validated["providers"]
    assert provider["used"] == "CPUExecutionProvider"
    assert all(output["max_abs"] < 5e-6 for output in provider["outputs"])  # measured 6e-7
    assert {output["optimization"] for output in provider["outputs"]} == {
        "disabled",
        "basic",
        "all",
    }
    logits = checkpoint.load(tmp_path / "m")(torch.from_numpy(np.load(data)["pixel_values"])).logits
    right = (logits.argmax(-1).numpy() == np.load(data)["labels"]).mean()
    assert validated["metric"]["value"] == right
    report = (tmp_path / "p" / "report.html").read_text()
    assert f"{100 * validated['metric']['value']:.2f}" in report and "fc1.weight" in report
    assert "ffmerge export merged p --task image-classification" in report
    assert json.loads((tmp_path / "p" / "validation.json").read_text())["ok"] is True

    code, again, _ = run("audit", tmp_path / "p", "--json")  # the report is not part of the promise
    assert code == 0
    assert again.pop("memory").keys() == audited.pop("memory").keys() == {"model.onnx"}
    assert again == audited


def _onnx(model: Any, path: Path, optimize: bool) -> None:
    torch.onnx.export(
        model, (torch.zeros(2, 3, 16, 16),), path, dynamo=True, optimize=optimize, verbose=False,
        dynamic_shapes={"pixel_values": {0: "batch_size"}},
    )  # fmt: skip


def _tied(dims: tuple[int, int], separate: bool) -> Any:
    """A ViT whose layers 1 to 3 hold the same FFN values, as one parameter or as copies."""
    model = vit(*dims, layers=4)
    source = model.vit.layers[1].mlp
    for layer in (2, 3):
        for name, parameter in list(source.named_parameters()):
            owner, _, attribute = name.rpartition(".")
            value = torch.nn.Parameter(parameter.detach().clone()) if separate else parameter
            setattr(model.vit.layers[layer].mlp.get_submodule(owner), attribute, value)
    return model


@pytest.mark.parametrize(
    ("dims", "separate", "optimize", "finding"),
    [
        (ABOVE, False, False, "unshared_at_load"),  # k Transposes of one weight
        # the published code's flow: equal but separate
        pytest.param(ABOVE, True, True, "duplicates", marks=pytest.mark.slow),
        (BELOW, False, True, "duplicates"),  # the exporter folds small weights per consumer
        pytest.param(BELOW, True, False, "duplicates", marks=pytest.mark.slow),
    ],
)
def test_share_repairs_what_other_exports_lose(
    dims: tuple[int, int], separate: bool, optimize: bool, finding: str, run: Run, tmp_path: Path
) -> None:
    source, target = tmp_path / "in.onnx", tmp_path / "out.onnx"
    _onnx(_tied(dims, separate), source, optimize)
    code, before, _ = run("audit", source, "--json")
    assert code == 1
    size = dims[0] * dims[1] * 4
    lost = [entry for entry in before[finding] if entry["bytes"] == 2 * size]
    assert len(lost) == 2  # fc1 and fc2, each two copies too many
    if finding == "unshared_at_load":
        assert {entry["name"] for entry in lost} == {
            f"vit.layers.3.mlp.{fc}.weight" for fc in ("fc1", "fc2")
        }
    else:
        assert all(len(entry["names"]) == 3 for entry in lost)

    code, shared, _ = run("share", source, target, "--json")
    assert code == 0
    assert {f["path"]: f["bytes"] for f in shared["files"]} == {
        p.name: p.stat().st_size for p in tmp_path.glob("out.onnx*")
    }
    code, after, _ = run("audit", target, "--json")
    assert (code, after["ok"]) == (0, True)
    x = np.random.default_rng(0).standard_normal((5, 3, 16, 16)).astype("f")
    outputs = [ort.InferenceSession(p).run(None, {"pixel_values": x})[0] for p in (source, target)]
    assert np.abs(outputs[0] - outputs[1]).max() < 2e-6  # measured 0


def test_inspect(run: Run, model_folder: Path) -> None:
    code, found, _ = run("inspect", model_folder, "--json")
    assert code == 0
    assert found["model_type"] == "vit"
    assert found["stacks"][0]["layers"] == 6


@pytest.mark.parametrize(
    "command", ["demo", "inspect", "merge", "export", "share", "audit", "validate"]
)
def test_every_command_explains_itself_with_an_example(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["ffmerge", command, "--help"])
    with pytest.raises(SystemExit) as ended:
        command_line.main()
    assert ended.value.code == 0
    assert f"Example: ffmerge {command}" in " ".join(capsys.readouterr().out.split())


@pytest.fixture(scope="module")
def places(model_folder: Path) -> dict[str, str]:
    """What the bad-input cases name."""
    base = model_folder.parent
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=2)
    ResNetForImageClassification(config).save_pretrained(base / "resnet")
    checkpoint.save(vit(), base / "truncated")
    weights = base / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5000])
    np.savez(base / "wrong.npz", pixel_values=np.zeros((4, 3, 8, 8), "f"), labels=np.zeros(4, int))
    (base / "there").mkdir()
    (base / "file").write_text("x")
    (base / "bad.onnx").write_bytes(b"\x08\x09 not a model")
    (base / "empty.onnx").write_bytes(b"")
    names = (
        "vit", "resnet", "truncated", "data.npz", "wrong.npz", "there", "file", "bad.onnx",
        "empty.onnx", "new",
    )  # fmt: skip
    return {name.replace(".", "_"): str(base / name) for name in names}


@pytest.mark.parametrize(
    "arguments",
    [
        "inspect {new}",
        "inspect {there}",
        "inspect {resnet}",
        "inspect {file}",
        "merge {new} {new}2 --k 2 --data {data_npz}",
        "merge {resnet} {new} --k 2 --data {data_npz}",
        "merge {truncated} {new} --k 2 --data {data_npz}",
        "merge {vit} {new} --window 3-6 --data {data_npz}",
        "merge {vit} {new} --window 3-3 --data {data_npz}",
        "merge {vit} {new} --window three --data {data_npz}",
        "merge {vit} {new} --k 7 --data {data_npz}",
        "merge {vit} {new} --data {data_npz}",
        "merge {vit} {new} --k 2",
        "merge {vit} {new} --k 2 --data {wrong_npz}",
        "merge {vit} {new} --k 2 --data {file}",
        "merge {vit} {there} --k 2 --data {data_npz}",
        "merge {vit} {file}/below --k 2 --data {data_npz}",
        "merge {vit} /proc/ffmerge --window 1-2 --data {data_npz}",
        "export {new} {new}2",
        "export {truncated} {new}",
        "export {vit} {there}",
        "export {vit} /proc/ffmerge",
        "export {vit} {new} --task text-generation",
        "export {vit} {new} --opset 3",
        "share {new} {new}2",
        "share {bad_onnx} {new}",
        "share {empty_onnx} {new}",
        "audit {new}",
        "audit {there}",
        "audit {bad_onnx}",
        "audit {empty_onnx}",
        "validate {new}",
        "validate {vit}",
        "validate {there} --provider abacus",
        "demo --out {there}",
        "nonsense",
    ],
)
def test_bad_input_exits_2_with_one_sentence_and_leaves_nothing(
    arguments: str, run: Run, places: dict[str, str]
) -> None:
    base = Path(places["vit"]).parent
    before = {p: p.stat().st_mtime_ns for p in base.rglob("*")}
    code, _, err = run(*arguments.format(**places).split())
    assert code == 2, err
    if arguments != "nonsense":  # there typer adds the usage
        assert err.startswith("ffmerge: ")
        assert len(err.strip().splitlines()) == 1
    assert {p: p.stat().st_mtime_ns for p in base.rglob("*")} == before


def test_a_provider_that_is_absent_is_a_failure(
    run: Run, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    assert run("export", model_folder, tmp_path / "p")[0] == 0
    code, found, _ = run("validate", tmp_path / "p", "--provider", "cuda", "--json")
    assert (code, found["ok"]) == (1, False)
    assert found["providers"][0]["used"] is None
    assert "CUDA" in found["providers"][0]["reason"]


def test_importing_ffmerge_imports_neither_torch_nor_onnxruntime() -> None:
    code = (
        "import sys, ffmerge; assert ffmerge.__version__;"
        "print([m for m in ('torch', 'onnxruntime', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_all_resolve() -> None:
    import ffmerge

    assert all(getattr(ffmerge, name) is not None for name in ffmerge.__all__)
    with pytest.raises(AttributeError):
        _ = ffmerge.nonsense


def test_module_runs_as_a_command() -> None:
    command = [sys.executable, "-m", "ffmerge", "inspect", os.devnull]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""


def test_the_device_suite_runs_on_a_package_and_notices_a_change(
    run: Run, model_folder: Path, tmp_path: Path
) -> None:
    assert run("export", model_folder, tmp_path / "p")[0] == 0
    command = [sys.executable, "-m", "ffmerge.runtime_tests", "-q", "--package", tmp_path / "p"]
    whole = subprocess.run(command, capture_output=True, text=True)
    assert whole.returncode == 0
    assert "6 passed" in whole.stdout
    data = tmp_path / "p" / "model.onnx_data"
    data.write_bytes(data.read_bytes()[:-4] + b"\0\0\0\1")
    assert subprocess.run(command, capture_output=True, text=True).returncode == 1
