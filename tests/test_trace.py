"""Node by node, a package computes what PyTorch does in float32, as near as its precision is."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tamper
import torch
from safetensors.numpy import save_file
from tiny import gpt2, vit

from ffmerge.config import ExportConfig, MergeConfig
from ffmerge.exporter.package import export
from ffmerge.exporter.reference import _save
from ffmerge.models.data import from_arrays
from ffmerge.models.inputs import to_tensors
from ffmerge.models.manifest import REFERENCE, Manifest
from ffmerge.models.trace import sampled, traced_feeds
from ffmerge.passes.weights import precision
from ffmerge.passes.weights.merge import merge_
from ffmerge.runtime_tests import tolerance
from ffmerge.runtime_tests.locate import locate
from ffmerge.runtime_tests.reference import read_reference
from ffmerge.runtime_tests.runtimes.registry import find_runtime
from ffmerge.runtime_tests.validate import check_package


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-2, two layers sharing with low-rank parts of their own, in int8, with its cache."""
    model = gpt2(layers=3)
    ids = np.random.default_rng(0).integers(0, 97, (12, 20))
    rows = from_arrays({"input_ids": ids, "attention_mask": np.ones_like(ids)})
    merge_(model, rows, MergeConfig(window=(1, 2), method="residual"))
    folder = tmp_path_factory.mktemp("gpt2") / "p"
    export(model, folder, ExportConfig(dtype="int8"), data=rows)
    return folder


def test_every_node_is_near_pytorchs(package: Path) -> None:
    manifest, stored = Manifest.read(package), read_reference(package)
    (graph,) = manifest.graphs
    trace = stored.trace(graph)
    assert trace is not None and len(trace) > 50
    assert {"transformer.h.2.mlp.c_fc", "transformer.ln_f"} <= {v.layer for v in trace}
    runtime = find_runtime("cpu")
    assert locate(graph, stored, runtime, "all", 0.1) is None  # measured 0.042
    assert locate(graph, stored, runtime, "all", 1e-4) is not None


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "int8", "int8-dynamic", "int4"])
def test_the_trace_is_pytorchs_float32_in_every_precision(dtype: str, tmp_path: Path) -> None:
    """A value of the graph is what a hook on the module sees, whatever the graph's weights are."""
    model, generator = vit(layers=2), torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim == 1:  # fresh models have biases of 0, and nothing would be seen
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    export(model, tmp_path / "p", ExportConfig(dtype=dtype))
    (graph,) = Manifest.read(tmp_path / "p").graphs
    trace = read_reference(tmp_path / "p").trace(graph)
    assert trace is not None
    seen: dict[str, np.ndarray] = {}
    layer = "vit.layers.1.mlp.fc1"
    model.get_submodule(layer).register_forward_hook(
        lambda module, inputs, output: seen.update(value=output.detach().numpy())
    )
    with torch.no_grad():
        model(**to_tensors(traced_feeds(graph.probe, {}), model))
    at = next(i for i, value in enumerate(trace) if value.layer == layer)
    assert trace[at].shape == seen["value"].shape
    assert np.abs(trace[at].sample - sampled(seen["value"])).max() < 2e-6  # the same kernels


def test_its_quality_and_its_greedy_ids_hold(package: Path) -> None:
    (cpu,) = check_package(package).providers
    assert cpu.ok, cpu.reason
    for generation in cpu.generation:
        assert generation.tokens == 16 and generation.prompts == 4


def test_wrong_scales_are_found(package: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(package, tmp_path / "p"))
    tamper.doubled(folder, "transformer.h.0.mlp.c_fc.weight")
    (cpu,) = check_package(folder).providers
    assert not cpu.ok


def test_elements_are_spared_only_where_no_node_is_off(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were all of them, and nothing else asked of an output, wrong scales would be found still."""
    folder = Path(shutil.copytree(package, tmp_path / "p"))
    tamper.doubled(folder, "transformer.h.0.mlp.c_fc.weight")
    monkeypatch.setattr(tolerance, "SPARED", 1.0)
    row = Manifest.read(folder).dtype
    lax = {"cosine": -1.0, "cache": -1.0, "agreement": 0.0, "kl": 1e9, "tokens": 0.0}
    monkeypatch.setitem(tolerance.TOLERANCES, row, replace(tolerance.TOLERANCES[row], **lax))
    (cpu,) = check_package(folder).providers
    assert all(output.ok for output in cpu.outputs) and any(output.out for output in cpu.outputs)
    assert not cpu.ok and "mlp.c_fc" in str(cpu.divergences[0])


@pytest.mark.parametrize("dtype", ["fp16", "int8", "int4"])
def test_a_weight_is_rounded_by_parts_as_at_once(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(70, 90, generator=torch.Generator().manual_seed(0))
    whole = precision.to_dtype(weight, dtype)
    monkeypatch.setattr(precision, "AT_ONCE", 200)  # two rows
    assert torch.equal(precision.to_dtype(weight, dtype), whole)


def test_the_same_reference_is_the_same_bytes_and_an_older_one_is_read(tmp_path: Path) -> None:
    """Of several keys of metadata safetensors takes any order: older packages had some."""
    traced = {f"{name}.onnx/trace": [["v", [2], name]] for name in "abcdef"}
    tensors = {name: np.ones(2, np.float32) for name in traced}
    path, written = tmp_path / REFERENCE, set()
    for _ in range(4):
        _save(path, tensors, traced)
        written.add(path.read_bytes())
    assert len(written) == 1
    assert read_reference(tmp_path).traces == traced
    save_file(tensors, path, {name: json.dumps(values) for name, values in traced.items()})
    assert read_reference(tmp_path).traces == traced
