"""Node by node, a quantized package computes what PyTorch does with weights rounded elsewhere."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import tamper
import torch
from tiny import gpt2, vit

from ffmerge.exporter import reference
from ffmerge.exporter.package import ExportConfig, export
from ffmerge.models.data import from_arrays
from ffmerge.models.manifest import Manifest
from ffmerge.passes.weights import precision
from ffmerge.passes.weights.merge import MergeConfig, merge_
from ffmerge.runtime_tests.locate import locate
from ffmerge.runtime_tests.reference import read_reference
from ffmerge.runtime_tests.runtimes.registry import find_runtime
from ffmerge.runtime_tests.validate import check


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-2, two layers sharing with low-rank parts of their own, in int8, with its cache."""
    model = gpt2(layers=3)
    ids = np.random.default_rng(0).integers(0, 97, (12, 20))
    rows = from_arrays({"input_ids": ids, "attention_mask": np.ones_like(ids)})
    merge_(model, rows, MergeConfig(window=(1, 2), method="residual"))
    folder = tmp_path_factory.mktemp("gpt2") / "p"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "AT_ONCE", 64 * 30)  # the table is multiplied by in four parts
        export(model, folder, ExportConfig(dtype="int8"), data=rows)
    return folder


def test_every_node_is_pytorchs(package: Path) -> None:
    manifest, stored = Manifest.read(package), read_reference(package)
    (graph,) = manifest.graphs
    trace = stored.trace(graph)
    assert trace is not None and len(trace.values) > 50
    assert {"transformer.h.2.mlp.c_fc", "transformer.ln_f"} <= {v.layer for v in trace.values}
    runtime = find_runtime("cpu")
    assert locate(graph, stored, runtime, "all", 2e-2) is None  # measured 0.011
    # Until the first code flips, which a sum's last bit decides, all is exact: measured 5e-7.
    flipped = locate(graph, stored, runtime, "all", 2e-6)
    assert flipped is None or "h.0." not in flipped.layer
    assert locate(graph, stored, runtime, "all", 1e-9) is not None


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_maps_with_biases_are_traced_in_parts(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every product by a rounded weight of ten outputs at a time."""
    monkeypatch.setattr(reference, "AT_ONCE", 10 * 64)
    model, generator = vit(layers=2), torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim == 1:  # fresh models have biases of 0, and nothing would be seen
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    export(model, tmp_path / "p", ExportConfig(dtype=dtype))
    manifest, stored = Manifest.read(tmp_path / "p"), read_reference(tmp_path / "p")
    (graph,) = manifest.graphs
    # measured below 3e-7 and below 1.4e-2: ONNX Runtime multiplies by int4 weights in int8
    assert locate(graph, stored, find_runtime("cpu"), "all", 2e-2) is None


def test_its_quality_and_its_greedy_ids_hold(package: Path) -> None:
    (cpu,) = check(package).providers
    assert cpu.ok, cpu.reason
    for generation in cpu.generation:
        assert generation.tokens == 16 and generation.prompts == 4


def test_wrong_scales_are_found(package: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(package, tmp_path / "p"))
    tamper.doubled(folder, "transformer.h.0.mlp.c_fc.weight")
    (cpu,) = check(folder).providers
    assert not cpu.ok


@pytest.mark.parametrize("dtype", ["fp16", "int8", "int4"])
def test_a_weight_is_rounded_by_parts_as_at_once(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(70, 90, generator=torch.Generator().manual_seed(0))
    whole = precision.to_dtype(weight, dtype)
    monkeypatch.setattr(precision, "_AT_ONCE", 200)  # two rows
    assert torch.equal(precision.to_dtype(weight, dtype), whole)
