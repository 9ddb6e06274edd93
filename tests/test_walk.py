"""Graphs in parts: the values of the whole graph, and only what is still read is kept."""

import tempfile
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from graphs import build, normal, run

from ffmerge.errors import InputError
from ffmerge.passes.graph.infer import infer_types
from ffmerge.passes.graph.walk import Walk

CHAIN = """(float[b,8] x, float[b,8] skip) => (float[b,8] y) {
    a = MatMul(x, W) b = Tanh(a) c = MatMul(b, W) d = Add(c, skip) y = MatMul(d, W) }"""
BRANCH = """(float[b,8] x, bool flag) => (float[b,8] y) {
    a = MatMul(x, W) unused = Tanh(x)
    y = If(flag) <
        then_branch = g1 () => (float[b,8] z) { t = Tanh(a) z = MatMul(t, W) },
        else_branch = g2 () => (float[b,8] z) { z = Add(a, x) }> }"""


def typed(text: str) -> ir.Model:
    """Return a graph whose values have types, as those that are quantized."""
    model = build(text, W=normal(8, 8))
    infer_types(model)
    return model


def node(model: ir.Model, output: str) -> ir.Node:
    (found,) = (each for each in model.graph if each.outputs[0].name == output)
    return found


def test_parts_compute_what_the_whole_does() -> None:
    model = typed(CHAIN)
    batches = [{"x": normal(n, 8), "skip": normal(n, 8, seed=n)} for n in (2, 5)]
    expected = [run(model, **batch)[0] for batch in batches]
    walk = Walk(model, batches)
    walk.go(node(model, "c"))
    assert [set(batch) for batch in walk.batches] == [{"b", "skip"}] * 2
    ahead = walk.fork()
    ahead.go(node(model, "y"))
    assert set(ahead.batches[0]) == {"d"} and set(walk.batches[0]) == {"b", "skip"}
    for place in (walk, ahead):
        for got, wanted in zip(place.run([model.graph.outputs[0]]), expected, strict=True):
            assert np.allclose(got["y"], wanted, rtol=1e-5, atol=1e-5)  # measured 0


def test_batches_wait_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is read when it is asked for, and nothing is left when the walk is over."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = typed(CHAIN)
    walk = Walk(model, [{"x": normal(3, 8), "skip": normal(3, 8)}] * 4)
    walk.go(node(model, "c"))
    assert walk.batches[1]["b"] is not walk.batches[1]["b"]
    sizes = [path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()]
    assert len(sizes) == 4 and min(sizes) >= 2 * 3 * 8 * 4
    del walk
    assert not list(tmp_path.iterdir())


def test_what_is_rounded_on_the_way_counts() -> None:
    """A weight behind the place reached has its new values, one before it the old ones."""
    w, x = normal(8, 8), normal(3, 8)
    model = typed("(float[b,8] x) => (float[b,8] y) { a = MatMul(x, W) y = MatMul(a, W) }")
    walk = Walk(model, [{"x": x}])
    walk.go(node(model, "y"))
    model.graph.initializers["W"].const_value = ir.Tensor(2 * w)
    (got,) = walk.run([model.graph.outputs[0]])
    assert set(walk.batches[0]) == {"a"}
    assert np.allclose(got["y"], 2 * x @ w @ w, rtol=1e-5, atol=1e-5)  # measured 3e-6


@pytest.mark.parametrize("flag", [True, False])
def test_what_a_branch_reads_is_kept(flag: bool) -> None:
    model = typed(BRANCH)
    batch = {"x": normal(3, 8), "flag": np.array(flag)}
    walk = Walk(model, [batch])
    walk.go(node(model, "y"))
    assert set(walk.batches[0]) == {"a", "x", "flag"}
    (got,) = walk.run([model.graph.outputs[0]])
    assert np.allclose(got["y"], run(model, **batch)[0], rtol=1e-5, atol=1e-5)  # measured 0


def test_a_batch_that_does_not_fit_is_told() -> None:
    model = typed(CHAIN)
    walk = Walk(model, [{"x": normal(2, 9), "skip": normal(2, 8)}])
    with pytest.raises(InputError, match="the calibration data does not fit the model"):
        walk.go(node(model, "c"))
