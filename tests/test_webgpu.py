"""Packages on WebGPU: on this machine's GPU, else on the software adapter of Debian's Chromium.

``make test-webgpu`` runs this. Where there is neither it skips with the reason;
with FFMERGE_WEBGPU=required, as in CI, that fails.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from architectures import CASES, index_of, merge_all, model_of
from packages import linear_package
from test_fused import DECODERS, drawn

from ffmerge.config import ExportConfig
from ffmerge.errors import NotInstalled
from ffmerge.exporter.package import export
from ffmerge.runtime_tests.runtimes.ort import ALLOWED, WEBGPU, _plugged_in

pytestmark = pytest.mark.webgpu

SWIFTSHADER = Path("/usr/lib/chromium")
FILES = ("libvk_swiftshader.so", "vk_swiftshader_icd.json")
SOFTWARE = {"VK_ICD_FILENAMES": str(SWIFTSHADER / FILES[1]), ALLOWED: "1"}
Validate = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture(scope="module")
def settings() -> dict[str, str]:
    """Return what to add to the environment; nothing where there is a GPU."""
    missing = [] if find_spec("onnxruntime_ep_webgpu") else ["the extra webgpu (pip)"]
    try:
        found = None if missing else _plugged_in(WEBGPU)
    except NotInstalled:
        found = None
    if found and "GPU" in str(found.device.type):
        return {}
    files = [SWIFTSHADER / name for name in FILES]
    missing += [f"{file} (apt-get install chromium)" for file in files if not file.exists()]
    if missing:
        required = os.environ.get("FFMERGE_WEBGPU") == "required"
        fail = pytest.fail if required else pytest.skip
        fail(f"no GPU, and this machine lacks {' and '.join(missing)}")
    return SOFTWARE


def run(folder: Path, *options: str, **environment: str) -> tuple[int, dict[str, Any]]:
    """Return exit code and JSON of ``ffmerge validate``, in a process with those settings."""
    child = subprocess.run(
        [sys.executable, "-m", "ffmerge", "validate", folder, "--json", *options],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert child.stdout, child.stderr
    return child.returncode, json.loads(child.stdout)


def vit() -> Any:
    return tiny.vit(layers=2)


def gpt2() -> Any:
    return tiny.gpt2(layers=2)


def marian() -> Any:
    return model_of(*CASES[index_of("MarianMTModel")][:3])


# largest difference from PyTorch in any output, on the software adapter
@pytest.mark.parametrize(
    ("make", "outputs"),
    [
        (vit, {"logits"}),  # measured 5.4e-7
        (gpt2, {"logits", "present.0.key", "present.1.value"}),  # measured 8.3e-7
        (marian, {"logits", "last_hidden_state", "present.0.encoder.key"}),  # measured 4.8e-7
    ],
)
def test_a_merged_package_runs_on_webgpu(
    make: Callable[[], Any], outputs: set[str], settings: dict[str, str], tmp_path: Path
) -> None:
    model = make()
    assert merge_all(model)
    export(model, tmp_path / "package", ExportConfig(profile="portable"))
    code, result = run(
        tmp_path / "package", "--provider", "cpu", "--provider", "webgpu", **settings
    )
    cpu, webgpu = result["providers"]
    assert code == 0, webgpu["reason"]
    assert webgpu["used"] == webgpu["requested"] == WEBGPU
    compute = {p: sum(ops.values()) for p, ops in webgpu["placement"]["compute"].items()}
    assert compute[WEBGPU] >= 0.9 * sum(compute.values()), compute  # measured 1.0 of each
    assert sum(compute.values()) >= 20
    assert cpu["placement"]["compute"].keys() == {"CPUExecutionProvider"}
    for provider in (cpu, webgpu):
        assert outputs <= {output["name"] for output in provider["outputs"]}
        assert max(output["max_abs"] for output in provider["outputs"]) <= 1e-6
    if settings:
        assert webgpu["device"] == "webgpu, in software"


@pytest.mark.parametrize(("dtype", "block"), [("int8", 64), ("int4", 32), ("int4", 64)])
def test_blocks_run_on_webgpu(
    dtype: str, block: int, settings: dict[str, str], tmp_path: Path
) -> None:
    """Of 4 bits in blocks of 64 with zero points: weights are moved away from zero."""
    model = gpt2()
    for parameter in model.parameters():
        if (dtype, block) == ("int4", 64) and parameter.ndim == 2:
            parameter.data += 2 * parameter.data.std()
    package = export(
        model, tmp_path / "package", ExportConfig(dtype=dtype, block=block, profile="portable")
    )
    zeros = [record.name for record in package.manifest.tensors if record.name.endswith("/zero")]
    assert bool(zeros) == ((dtype, block) == ("int4", 64))
    code, result = run(tmp_path / "package", "--provider", "webgpu", **settings)
    (webgpu,) = result["providers"]
    assert code == 0, webgpu["reason"]
    assert "MatMulNBits" in webgpu["placement"]["compute"][WEBGPU]


def llama() -> Any:
    return drawn(DECODERS["Llama"]())


def bert() -> Any:
    return tiny.bert(layers=2)


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (llama, "GroupQueryAttention"),
        (gpt2, "MultiHeadAttention"),
        (bert, "MultiHeadAttention"),
        (marian, "MultiHeadAttention"),
    ],
)
def test_for_webgpu_attention_is_computed_there(
    make: Callable[[], Any], kind: str, settings: dict[str, str], tmp_path: Path
) -> None:
    """As one operator; angles, which are small, ONNX Runtime leaves to the processor."""
    model = make()
    assert merge_all(model)
    export(model, tmp_path / "package", ExportConfig(profile="webgpu"))
    code, result = run(tmp_path / "package", "--provider", "webgpu", **settings)
    (webgpu,) = result["providers"]
    assert code == 0, webgpu["reason"]
    assert webgpu["placement"]["compute"][WEBGPU][kind] == (6 if make is marian else 2)
    elsewhere = webgpu["placement"]["compute"].get("CPUExecutionProvider", {})
    assert set(elsewhere) <= {"Cast", "Cos", "If", "Sin"}
    # measured 1.0e-6, 6.0e-7, 1.2e-7 and 4.8e-7
    assert max(output["max_abs"] for output in webgpu["outputs"]) <= 5e-6


def test_the_attention_of_the_standard_is_left_to_the_processor(
    settings: dict[str, str], tmp_path: Path
) -> None:
    """Why there is a profile for WebGPU: once this fails, the one for the CPU may do."""
    export(bert(), tmp_path / "package", ExportConfig(profile="cpu"))
    _, result = run(tmp_path / "package", "--provider", "webgpu", **settings)
    (webgpu,) = result["providers"]
    assert webgpu["placement"]["compute"]["CPUExecutionProvider"]["Attention"] == 2


@pytest.mark.parametrize("make", [llama, gpt2, bert, marian])
@pytest.mark.parametrize("dtype", ["fp16", "q4f16"])
def test_half_precision_on_a_driver_that_has_it(
    make: Callable[[], Any], dtype: str, tmp_path: Path
) -> None:
    """With FFMERGE_VULKAN, the file of such a driver; keys and values stay float16."""
    driver = os.environ.get("FFMERGE_VULKAN")
    if driver is None:
        pytest.skip("FFMERGE_VULKAN names no driver that computes in float16")
    export(make(), tmp_path / "package", ExportConfig(profile="webgpu", dtype=dtype))
    settings = {"VK_ICD_FILENAMES": driver, ALLOWED: "1"}
    code, result = run(tmp_path / "package", "--provider", "webgpu", **settings)
    (webgpu,) = result["providers"]
    assert code == 0, webgpu["reason"]
    compute = webgpu["placement"]["compute"]
    assert set(compute.get("CPUExecutionProvider", {})) <= {"Cast", "Cos", "If", "Sin"}


def test_int8_products_are_left_to_the_processor_and_that_fails(
    settings: dict[str, str], tmp_path: Path
) -> None:
    """ONNX Runtime's WebGPU has no MatMulInteger: correct, but not what was asked for."""
    export(vit(), tmp_path / "package", ExportConfig(dtype="int8-dynamic", profile="portable"))
    code, result = run(tmp_path / "package", "--provider", "webgpu", **settings)
    (webgpu,) = result["providers"]
    assert code == 1
    assert all(output["ok"] for output in webgpu["outputs"])
    assert "at least 90% are needed" in webgpu["reason"]
    assert "MatMulInteger on CPUExecutionProvider" in webgpu["reason"]


def test_half_precision_needs_a_device_that_has_it(
    settings: dict[str, str], tmp_path: Path
) -> None:
    if not settings:
        pytest.skip("this machine has a GPU, which may have half precision")
    export(vit(), tmp_path / "package", ExportConfig(dtype="fp16", profile="portable"))
    code, result = run(tmp_path / "package", "--provider", "webgpu", **settings)
    assert code == 1
    assert "requires f16 but the device does not support it" in result["providers"][0]["reason"]


def test_an_adapter_in_software_is_used_only_if_allowed(
    settings: dict[str, str], tmp_path: Path
) -> None:
    if not settings:
        pytest.skip("this machine has a GPU")
    linear_package(tmp_path / "package", np.eye(4, dtype=np.float32), np.zeros(4, np.float32))
    forbidden = {**settings, ALLOWED: "0"}
    code, result = run(tmp_path / "package", "--provider", "webgpu", **forbidden)
    assert code == 1
    assert result["providers"][0]["used"] is None
    assert f"{WEBGPU} was not used: this machine shows no GPU" in result["providers"][0]["reason"]

    code, result = run(tmp_path / "package", "--all", **forbidden)
    assert code == 0
    (absent,) = [each for each in result["not_tested"] if each["name"] == "webgpu"]
    assert absent["requested"] == WEBGPU

    without = {**settings, "VK_ICD_FILENAMES": str(tmp_path / "none.json")}
    code, result = run(tmp_path / "package", "--provider", "webgpu", **without)
    assert code == 1
    assert "no Vulkan driver works" in result["providers"][0]["reason"]
