import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from packages import linear_package
from tiny import gpt2

from ffmerge.config import ValidateConfig
from ffmerge.errors import InputError
from ffmerge.exporter.package import export
from ffmerge.models.examples import from_arrays
from ffmerge.models.manifest import Manifest
from ffmerge.models.probe import Array
from ffmerge.runtime_tests import reference
from ffmerge.runtime_tests.runtimes.registry import RUNTIMES, find_runtime
from ffmerge.runtime_tests.validate import check_package, validate

EYE, ZEROS = np.eye(4, dtype=np.float32), np.zeros(4, np.float32)


def _rows(labels: Array | None) -> dict[str, Array]:
    """Return one-hot rows, which the identity classifies as their own position."""
    rows = {"x": EYE[[0, 1, 2, 3, 0, 1, 2, 3, 0, 1]]}
    return rows if labels is None else {**rows, "labels": labels}


@pytest.fixture
def package(tmp_path: Path) -> Path:
    linear_package(tmp_path / "package", EYE, ZEROS)
    return tmp_path / "package"


def test_a_good_package_is_ok_on_every_level(package: Path) -> None:
    steps: list[str] = []
    result = validate(package, progress=steps.append).to_json()
    assert result["ok"]
    (cpu,) = result["providers"]
    assert (cpu["name"], cpu["requested"], cpu["used"], cpu["device"]) == (
        "cpu",
        "CPUExecutionProvider",
        "CPUExecutionProvider",
        "cpu",
    )
    assert (
        [o["optimization"] for o in cpu["outputs"]]
        == cpu["optimization"]
        == list(find_runtime("cpu").levels)
    )
    keys = {"name", "max_abs", "max_rel", "cosine", "atol", "rtol", "ok", "worst", "compared"}
    assert all(keys <= set(output) for output in cpu["outputs"])
    assert {"rss_bytes", "anonymous_bytes"} <= set(cpu["memory"])
    assert 0 < cpu["latency_ms"]["median"] <= cpu["latency_ms"]["p95"]
    assert result["metric"] is None
    assert result["environment"]["onnxruntime"] == ort.__version__
    sizes = {p.name: p.stat().st_size for p in package.iterdir()}
    assert result["package"]["bytes_model"] == sizes["model.onnx"] + sizes["model.onnx_data"]
    assert result["package"]["parameters"] == 20
    assert len(steps) == 1 + 3 + 1  # the files, three levels, memory and latency


def test_what_is_found_is_written_into_the_package(package: Path) -> None:
    before = sorted(p.name for p in package.iterdir())
    check_package(package)
    assert sorted(p.name for p in package.iterdir()) == before
    written = ["report.html", "report.md", "validation.json"]
    for _ in range(2):  # the second replaces the first
        result = validate(package)
        assert sorted(p.name for p in package.iterdir()) == sorted([*before, *written])
    assert json.loads((package / "validation.json").read_text()) == result.to_json()


def test_in_python_it_means_the_same_as_the_command(package: Path, command: Any) -> None:
    np.savez(package.parent / "rows.npz", x=EYE, labels=np.arange(4))
    data = str(package.parent / "rows.npz")
    here = validate(package, ValidateConfig(data=data)).to_json()
    page = (package / "report.md").read_text()
    assert command("validate", package, "--data", data, "--json")[0] == 0
    there = json.loads((package / "validation.json").read_text())
    for name in ("ok", "metric", "metrics", "package", "environment", "not_tested"):
        assert there[name] == here[name]
    assert here["providers"][0]["outputs"] == there["providers"][0]["outputs"]
    command_line = "ffmerge validate package --provider cpu --data DATA"
    assert command_line in page and command_line in (package / "report.md").read_text()


def test_a_notebook_shows_verdict_costs_and_runtimes(package: Path) -> None:
    result = validate(package)
    assert repr(result) == "Validation(cpu: ok)"
    page = result._repr_html_()
    for text in ("Validation(cpu: ok)", "Size on disk", "Latency, median", "CPUExecutionProvider"):
        assert text in page
    (cpu,) = result.providers
    off = replace(result, providers=(replace(cpu, stopped="<b>it</b> fell back"),))
    assert "&lt;b&gt;it&lt;/b&gt; fell back" in off._repr_html_()


def test_each_graph_is_opened_once_a_level_and_the_reference_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With data, and real rows and prompts of its own."""
    examples = from_arrays({"input_ids": np.random.default_rng(0).integers(0, 97, (6, 12))})
    export(gpt2(layers=1), tmp_path / "p", data=examples)
    opened, read = [], []
    start = find_runtime("cpu").start

    def counted(model: Any, level: str, threads: int) -> Any:
        opened.append((model, level))
        return start(model, level, threads)

    monkeypatch.setitem(RUNTIMES, "cpu", replace(find_runtime("cpu"), start=counted))
    load = reference.load_file
    monkeypatch.setattr(reference, "load_file", lambda path: read.append(path) or load(path))
    result = validate(tmp_path / "p", data=examples)
    assert result.ok and result.metric and result.providers[0].sample
    assert len(result.providers[0].generation) == 3
    graph = tmp_path / "p" / "model.onnx"
    assert opened == [(graph, level) for level in find_runtime("cpu").levels]
    assert read == [tmp_path / "p" / "reference.safetensors"]


def test_a_package_that_is_off_is_not_ok(tmp_path: Path) -> None:
    linear_package(tmp_path / "package", EYE, ZEROS, EYE + 1e-3)
    result = validate(tmp_path / "package")
    assert not result.ok
    assert "logits (disabled)" in str(result.providers[0].reason)
    assert "logits (all)" in str(result.providers[0].reason)


def test_what_is_not_a_number_is_still_json(tmp_path: Path) -> None:
    linear_package(tmp_path / "package", EYE, ZEROS, EYE * np.float32(np.nan))
    result = validate(tmp_path / "package")
    text = (tmp_path / "package" / "validation.json").read_text()
    assert "NaN" not in text.replace("NaN or infinity", "")
    assert json.loads(text)["providers"][0]["outputs"][0]["worst"]["got"] is None
    assert not result.ok


def test_a_changed_data_file_is_refused(package: Path) -> None:
    data = bytearray((package / "model.onnx_data").read_bytes())
    data[0] ^= 1
    (package / "model.onnx_data").write_bytes(data)
    with pytest.raises(InputError, match=r"model\.onnx_data is not the file"):
        validate(package)


def test_an_unknown_provider_is_refused(package: Path) -> None:
    with pytest.raises(InputError, match="unknown provider 'tpu'"):
        validate(package, ValidateConfig(providers=("cpu", "tpu")))


def test_an_absent_provider_fails_and_the_others_still_run(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    both = ValidateConfig(providers=("cuda", "cpu"))
    result = validate(package, both, _rows(np.arange(10) % 4))
    cuda, cpu = result.to_json()["providers"]
    assert not result.ok
    assert (cuda["ok"], cuda["used"], cuda["device"]) == (False, None, None)
    assert cuda["requested"] == "CUDAExecutionProvider"
    assert "CUDAExecutionProvider was not used" in cuda["reason"]
    assert cpu["ok"]
    assert result.metric is not None  # measured on the CPU


def test_the_metric_is_measured_over_all_batches(package: Path) -> None:
    labels = np.arange(10) % 4
    labels[[0, 9]] = 3  # two wrong, one of them in the second batch
    metric = validate(package, data=_rows(labels)).metric
    assert metric is not None
    assert (metric.name, metric.value, metric.examples) == ("accuracy", 0.8, 10)


def test_without_labels_or_without_a_metric_there_is_none(package: Path) -> None:
    assert validate(package, data=_rows(None)).metric is None
    manifest = Manifest.read(package)
    replace(manifest, task="feature-extraction").write(package)
    assert validate(package, data=_rows(np.zeros(10))).metric is None


def test_a_package_that_names_no_output_is_refused(package: Path) -> None:
    replace(Manifest.read(package), graphs=()).write(package)
    with pytest.raises(InputError, match="names no output"):
        validate(package)


@pytest.mark.parametrize("content", ["[]", "7", '{"schema": 1}'])
def test_what_is_no_manifest_is_refused(content: str, package: Path) -> None:
    (package / "ffmerge.json").write_text(content)
    with pytest.raises(InputError, match="is not of schema"):
        validate(package)


def test_a_manifest_is_one_line_in_a_shell(package: Path) -> None:
    assert repr(Manifest.read(package)).startswith("<Manifest: ")
    assert len(repr(Manifest.read(package))) < 200
