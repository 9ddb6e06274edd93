"""ONNX Runtime Web behind the interface of the runtimes; with a browser only in `make test-web`."""

import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from architectures import merge_all
from packages import linear_package
from web_env import NODE_MODULES, require_browser

from ffmerge.config import ExportConfig, ValidateConfig
from ffmerge.errors import NotInstalled, RuntimeCheckError
from ffmerge.exporter.package import export
from ffmerge.runtime_tests.footprint import TRIVIAL
from ffmerge.runtime_tests.runtimes import web
from ffmerge.runtime_tests.runtimes.registry import find_runtime
from ffmerge.runtime_tests.validate import validate

NAMES = ("wasm", "web-webgpu")
EYE, ZEROS = np.eye(4, dtype=np.float32), np.zeros(4, np.float32)


@pytest.fixture
def browser(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FFMERGE_CHROMIUM", require_browser())
    monkeypatch.setenv("FFMERGE_NODE_MODULES", str(NODE_MODULES))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_missing_is_named(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FFMERGE_CHROMIUM", str(tmp_path / "none"))
    with pytest.raises(NotInstalled, match=r"Chromium is not installed.*FFMERGE_CHROMIUM"):
        find_runtime(name).open(TRIVIAL)
    monkeypatch.setenv("FFMERGE_CHROMIUM", str(shutil.which("true")))
    monkeypatch.setenv("FFMERGE_NODE_MODULES", str(tmp_path))
    with pytest.raises(NotInstalled, match="npm install onnxruntime-web"):
        find_runtime(name).open(TRIVIAL)


def test_a_browser_that_ends_is_no_endless_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "onnxruntime-web" / "dist").mkdir(parents=True)
    monkeypatch.setenv("FFMERGE_CHROMIUM", str(shutil.which("true")))
    monkeypatch.setenv("FFMERGE_NODE_MODULES", str(tmp_path))
    monkeypatch.setattr(web, "_browsers", {})
    with pytest.raises(RuntimeCheckError, match="Chromium ended with 0 at open"):
        find_runtime("wasm").open(TRIVIAL)


@pytest.mark.parametrize(("dispatches", "refused"), [("0", True), ("7", False)])
def test_a_run_that_leaves_the_gpu_idle_is_refused(
    dispatches: str, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = SimpleNamespace(
        ask=lambda told, tensors: ({"dispatches": dispatches}, {}),
        process=SimpleNamespace(poll=lambda: 0),  # it has ended: there is nothing to release
    )
    monkeypatch.setattr(web, "_opened", lambda *_: (page, "0", {}))
    expected = pytest.raises(RuntimeCheckError, match="not used") if refused else nullcontext()
    with expected:
        assert find_runtime("web-webgpu").profile(Path("model.onnx"), ["y"], {}) is None


@pytest.mark.web
@pytest.mark.parametrize("name", NAMES)
def test_a_decoder_with_cache_is_in_parity(name: str, tmp_path: Path, browser: None) -> None:
    """Layers merged, an empty past and a full one, padding; memory and latency are told."""
    model = tiny.gpt2(layers=2)
    assert merge_all(model)
    export(model, tmp_path / "package", ExportConfig(profile="portable"))
    (found,) = validate(tmp_path / "package", ValidateConfig(providers=(name,))).providers
    assert found.ok, found.reason
    assert found.used == found.requested == name.removeprefix("web-")
    assert max(o.max_abs or 0 for o in found.outputs) < 5e-6  # measured 6.6e-7
    assert len(found.outputs) == 1 + 2 * 2
    assert found.footprint and found.footprint.rss_bytes is not None
    if name == "web-webgpu":  # measured 1.0002: each weight once, what two layers share too
        weights = sum(p.nbytes for p in model.parameters())
        assert 0.98 * weights < found.footprint.rss_bytes < 1.02 * weights


@pytest.mark.web
def test_every_kind_of_number_passes_and_errors_come_back(tmp_path: Path, browser: None) -> None:
    import onnx

    kinds = {"f": "float", "d": "double", "q": "int64", "i": "int32", "B": "uint8", "?": "bool"}
    inputs = ", ".join(f"{kind}[n] x{i}" for i, kind in enumerate(kinds.values()))
    outputs = ", ".join(f"{kind}[n] y{i}" for i, kind in enumerate(kinds.values()))
    body = " ".join(f"y{i} = Identity(x{i})" for i in range(len(kinds)))
    text = f'<ir_version: 8, opset_import: ["": 17]> g ({inputs}) => ({outputs}) {{ {body} }}'
    session = find_runtime("wasm").open(onnx.parser.parse_model(text).SerializeToString())
    for values in ([3, 1, 0], []):
        feeds = {f"x{i}": np.array(values, code)[::-1] for i, code in enumerate(kinds)}
        got = session.run([f"y{i}" for i in range(len(kinds))], feeds)
        for i in range(len(kinds)):
            assert got[f"y{i}"].dtype == feeds[f"x{i}"].dtype
            assert np.array_equal(got[f"y{i}"], feeds[f"x{i}"])
    with pytest.raises(RuntimeCheckError, match=r"does not run the model: .*x1"):
        session.run(["y0"], {"x0": np.zeros(1, np.float32)})
    with pytest.raises(RuntimeCheckError, match="does not load the model"):
        find_runtime("wasm").open(b"no model")


@pytest.mark.web
def test_a_wrong_weight_fails(tmp_path: Path, browser: None) -> None:
    linear_package(tmp_path / "package", EYE, ZEROS, EYE + 1e-3)
    (found,) = validate(tmp_path / "package", ValidateConfig(providers=("wasm",))).providers
    assert not found.ok and "out of tolerance" in str(found.reason)
