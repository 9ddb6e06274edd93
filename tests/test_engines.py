"""OpenVINO and the ONNX reference evaluator, against PyTorch's outputs in the package."""

import importlib
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import tiny
from architectures import merge_all

from ffmerge.config import ExportConfig
from ffmerge.errors import NotInstalled, RuntimeCheckError
from ffmerge.exporter.package import export
from ffmerge.models.manifest import Manifest
from ffmerge.runtime_tests.footprint import TRIVIAL
from ffmerge.runtime_tests.parity import check_parity
from ffmerge.runtime_tests.results import OutputParity
from ffmerge.runtime_tests.runtimes import vino
from ffmerge.runtime_tests.runtimes.registry import find_runtime


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packages")
    model = tiny.vit(layers=2)
    assert merge_all(model)
    export(model, folder / "vit", ExportConfig(profile="portable"))
    config = ExportConfig(profile="portable", dtype="int4")
    export(tiny.gpt2(layers=2), folder / "gpt2-int4", config)
    return folder


def outputs(folder: Path, runtime: str) -> list[OutputParity]:
    """Return what was compared; a processor without bfloat16 skips that precision, and no other."""
    if runtime.startswith("openvino"):
        require_openvino()
    try:
        return check_parity(folder, Manifest.read(folder), runtime)
    except NotInstalled as reason:
        if runtime != "openvino-bf16" or _has_bfloat16():
            raise
        pytest.skip(str(reason))


def _has_bfloat16() -> bool:
    """Tell whether Linux says that this processor multiplies bfloat16."""
    flags = Path("/proc/cpuinfo")
    return flags.exists() and "_bf16" in flags.read_text()


def require_openvino() -> None:
    """Skip where the extra is not installed; `make test` installs it, there its absence fails."""
    if find_spec("openvino") is None:
        missing = "the extra openvino is not installed: pip install 'ffmerge[openvino]'"
        (pytest.fail if os.environ.get("FFMERGE_OPENVINO") == "required" else pytest.skip)(missing)


@pytest.mark.parametrize("runtime", ["openvino", "reference"])
def test_float32_is_as_exact_as_onnx_runtime(packages: Path, runtime: str) -> None:
    (logits,) = outputs(packages / "vit", runtime)
    assert logits.ok, logits.reason
    assert logits.max_abs is not None and logits.max_abs < 2e-6  # measured 4.5e-7 and 6.3e-7


def test_bfloat16_is_asked_for_and_has_its_own_bounds(packages: Path) -> None:
    (logits,) = outputs(packages / "vit", "openvino-bf16")
    assert logits.ok, logits.reason
    assert logits.max_abs is not None and 1e-3 < logits.max_abs < 3e-2  # measured 9.7e-3


def test_int4_with_a_tied_embedding_is_read_alike(packages: Path) -> None:
    """OpenVINO shifts bytes as if they were wider, so rows are not unpacked by shifting.

    Both round what products read, where a last bit can be one code of 8; here neither does.
    """
    folder = packages / "gpt2-int4"
    there = outputs(folder, "openvino")
    assert all(output.ok for output in there), [output.reason for output in there]
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 1
    exact = folder / "exact.onnx"  # beside the data file
    onnx.save(model, exact)
    options = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    other = importlib.import_module("openvino").Core().compile_model(exact, "CPU", options)
    session = onnxruntime.InferenceSession(exact)
    (graph,) = Manifest.read(folder).graphs
    for case in range(len(graph.probe.cases)):
        feeds = graph.probe.draw(case)
        found = other(feeds)
        names = [output.name for output in session.get_outputs()]
        for name, expected in zip(names, session.run(names, feeds), strict=True):
            off = np.abs(found[name] - expected).max() / np.abs(expected).max()
            assert off < 2e-6  # measured 3.7e-7


def test_the_evaluator_says_which_operator_it_lacks(packages: Path) -> None:
    with pytest.raises(RuntimeCheckError, match=r"does not load the model: .*com\.microsoft"):
        find_runtime("reference").open(packages / "gpt2-int4" / "model.onnx")


def test_neither_openvino_nor_onnx_runtime_reports_anything(tmp_path: Path) -> None:
    """No module for it is loaded, nothing is connected to, nothing is written into the home."""
    require_openvino()
    program = f"""
import sys
def hook(event, arguments):
    assert not event.startswith(("socket.connect", "socket.getaddrinfo", "socket.sendto")), event
sys.addaudithook(hook)
from ffmerge.runtime_tests.runtimes.registry import find_runtime
import numpy as np
for name in ("cpu", "openvino"):
    session = find_runtime(name).open({TRIVIAL!r})
    assert session.run(["y"], {{"x": np.ones(1, np.float32)}})["y"] == 1
import openvino.tools.ovc.telemetry_utils as used
assert used.tm.__name__ == "openvino.tools.ovc.telemetry_stub", used.tm
print([name for name in sys.modules if "openvino_telemetry" in name])
"""
    home = tmp_path / "home"
    home.mkdir()
    path = {"PYTHONPATH": ":".join(filter(None, sys.path)), "HOME": str(home)}
    child = subprocess.run(
        [sys.executable, "-P", "-c", program], env=path, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr
    assert child.stdout.strip() == "['openvino_telemetry']"  # a name for which there is no module
    assert list(home.iterdir()) == []


def test_what_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    core = SimpleNamespace(get_property=lambda *_: ["FP32", "INT8"])
    with monkeypatch.context() as patch:
        patch.setattr(vino, "_core", lambda: core)
        with pytest.raises(NotInstalled, match="this processor has no such products"):
            find_runtime("openvino-bf16").open(TRIVIAL)
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(NotInstalled, match=r"pip install 'ffmerge\[openvino\]'"):
        find_runtime("openvino").open(TRIVIAL)
