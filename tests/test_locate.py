"""The first node that is off, where a runtime and not the package is wrong."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from packages import linear_package

from ffmerge.models.manifest import Manifest
from ffmerge.runtime_tests import locate as locating
from ffmerge.runtime_tests.locate import locate, relative
from ffmerge.runtime_tests.reference import read_reference
from ffmerge.runtime_tests.runtimes.registry import find_runtime

WEIGHT = np.random.default_rng(0).standard_normal((8, 5)).astype(np.float32)


def _wrong(tensor: str) -> Any:
    """Return a runtime that computes with another value of one tensor."""
    cpu = find_runtime("cpu")

    def start(path: Path, level: str, threads: int) -> Any:
        model = onnx.load(path)
        for initializer in model.graph.initializer:
            if initializer.name == tensor:
                changed = numpy_helper.to_array(initializer) + np.float32(0.5)
                initializer.CopyFrom(numpy_helper.from_array(changed, tensor))
        return cpu.start(model.SerializeToString(), level, threads)

    return replace(cpu, name="wrong", start=start)


@pytest.mark.parametrize(
    ("tensor", "op", "value", "before"),
    [("weight", "MatMul", "product", None), ("bias", "Add", "logits", "product")],
)
@pytest.mark.parametrize("step", [1, 48])
def test_another_runtime_is_judged_by_the_cpu_node_by_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int,
    tensor: str, op: str, value: str, before: str | None,
) -> None:  # fmt: skip
    monkeypatch.setattr(locating, "STEP", step)
    folder = tmp_path / "p"
    linear_package(folder, WEIGHT, np.ones(5, np.float32))
    files = sorted(folder.iterdir())
    (graph,) = Manifest.read(folder).graphs
    stored = read_reference(folder)
    found = locate(graph, stored, _wrong(tensor), "all", 1e-5, case=1)
    assert found is not None
    assert (found.op, found.value, found.before) == (op, value, before)
    assert found.tensors == (tensor,)
    assert found.judge == "CPUExecutionProvider (disabled)"
    assert f"leaves {found.judge} at {op} node" in str(found)
    x = graph.probe.draw(1)["x"].astype(np.float64)
    right = x @ WEIGHT + (value == "logits")
    off = 0.5 * (x.sum(1, keepdims=True) if tensor == "weight" else 1) * np.ones((3, 5))
    size = np.linalg.norm(off) / np.linalg.norm(right)
    assert found.difference == pytest.approx(size, rel=2e-7)  # measured 4.0e-8
    assert sorted(folder.iterdir()) == files
    assert locate(graph, stored, find_runtime("cpu"), "all", 0.0) is None


def test_what_is_no_number_where_it_should_be_one_is_infinitely_far() -> None:
    expected = np.array([3.0, 4.0, -np.inf])
    assert relative(expected, np.array([3.0, 4.5, 0.0])) == 0.1  # a mask is left out
    assert relative(expected, np.array([3.0, np.nan, 0.0])) == np.inf
    assert relative(np.zeros(3), np.ones(3) * 1e-9) == 0
