"""A merge method of another package: found by its entry point, and nothing is imported before."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import vit

import ffmerge

CODE = """
import ffmerge

@ffmerge.method("first-of-all", source="a test", statistics=False)
def first(model, members, evidence):
    return ffmerge.passes.weights.methods.METHODS["copy-anchor"].merge(model, members, evidence)
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package ``others_methods`` as pip would leave it."""
    (tmp_path / "others_methods.py").write_text(CODE)
    about = tmp_path / "others_methods-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: others-methods\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[ffmerge.methods]\nfirst-of-all = others_methods\n")
    monkeypatch.syspath_prepend(tmp_path)


def test_a_method_of_another_package_merges(installed: None) -> None:
    assert "others_methods" not in sys.modules
    data = {"pixel_values": np.random.default_rng(0).random((4, 3, 16, 16), np.float32)}
    merged: list[Any] = []
    for method in ("first-of-all", "copy-anchor"):
        model = vit(32, 64, 4)
        ffmerge.merge_(model, data, ffmerge.MergeConfig(window=(1, 2), method=method))
        merged.append(model)
    for one, other in zip(*(model.parameters() for model in merged), strict=True):
        assert torch.equal(one, other)


def test_the_bundled_methods_are_named_where_there_is_none() -> None:
    with pytest.raises(ffmerge.FfmergeError, match="there is no method 'last-of-all': choose"):
        ffmerge.merge_(vit(32, 64, 4), {}, ffmerge.MergeConfig(k=2, method="last-of-all"))
