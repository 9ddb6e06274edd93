"""The promise at true size: ViT-B/16 with five of twelve feed-forward sublayers shared."""

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

from ffmerge.exporter.package import Package, export
from ffmerge.passes.graph.audit import audit
from ffmerge.passes.weights.merge import MergeConfig, merge_
from ffmerge.runtime_tests.footprint import measure_footprint

pytestmark = pytest.mark.slow  # the same promises are tested on small models in every run

Case = tuple[ViTForImageClassification, Package, Package]


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("vit-base")
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(num_labels=1000)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # fresh biases and norms are all equal, which would share by chance
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += torch.randn(parameter.shape, generator=generator) * 0.02
    untied = export(model, folder / "untied")
    merge_(model, None, MergeConfig(window=(3, 7), method="average"))
    return model, untied, export(model, folder / "tied")


def test_package_is_no_larger_than_its_distinct_parameters(packages: Case) -> None:
    model, untied, tied = packages
    distinct = sum(p.nbytes for p in model.parameters())
    assert distinct == 4 * (86_567_656 - 4 * 4_722_432)
    on_disk = sum(p.stat().st_size for p in tied.path.iterdir())
    assert on_disk <= 1.01 * distinct  # measured 1.0003
    assert audit(tied.path).ok
    assert audit(untied.path).ok


def test_memory_saved_is_the_bytes_removed(packages: Case) -> None:
    _, untied, tied = packages
    removed = untied.manifest.parameter_bytes - tied.manifest.parameter_bytes
    resident = [measure_footprint(p.path).rss_bytes for p in (untied, tied)]
    assert None not in resident, "this needs /proc"
    assert resident[0] - resident[1] >= 0.95 * removed  # measured 1.000


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_logits_equal_pytorch(batch: int, packages: Case) -> None:
    model, _, tied = packages
    x = np.random.default_rng(batch).standard_normal((batch, 3, 224, 224)).astype("f")
    with torch.no_grad():
        expected = model(torch.from_numpy(x)).logits.numpy()
    for level in (ort.GraphOptimizationLevel.ORT_DISABLE_ALL, None):
        options = ort.SessionOptions()
        if level is not None:
            options.graph_optimization_level = level
        session = ort.InferenceSession(tied.path / "model.onnx", options)
        (got,) = session.run(["logits"], {"pixel_values": x})
        assert np.abs(got - expected).max() <= 2e-5  # measured 2.8e-6


def test_nothing_is_embedded_in_the_graph(packages: Case) -> None:
    _, _, tied = packages
    assert Path(tied.path / "model.onnx").stat().st_size < 100_000  # measured 59,000
