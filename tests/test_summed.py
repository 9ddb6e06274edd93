"""Sums before norms: parts of them for onnxruntime-genai, on the CPU apart from them."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from graphs import build, normal, ops, run
from tiny import bert

from ffmerge.config import ExportConfig
from ffmerge.exporter.package import export
from ffmerge.exporter.summed import sum_apart, sum_inside

BODY = """s = Add(x, z) n = RMSNormalization<axis=-1, epsilon=0.001>(s, w)
    m = Neg(n) y = Add(s, m) q = RMSNormalization<axis=-1>(y, w)"""
TEXT = "(float[b,t,16] x, float[b,t,16] z) => (float[b,t,16] q, float[b,t,16] y) { BODY }"


def graph(body: str) -> ir.Model:
    weights: dict[str, Any] = {"w": normal(16, seed=2) + 1}
    if "one" in body:
        weights["one"] = normal(16, seed=3)
    model = build(TEXT.replace("BODY", body), 23, **weights)
    for node in model.graph:
        node.outputs[0].shape = ir.Shape(["b", "t", 16])
    for value in model.graph.initializers.values():
        assert value.const_value is not None
        value.shape = value.const_value.shape
    model.opset_imports["com.microsoft"] = 1
    return model


@pytest.mark.parametrize(
    ("body", "joined"),
    [
        (BODY, 2),  # what is summed is read behind it, and is an output
        (BODY.replace("Add(x, z)", "Add(x, one)"), 1),  # one vector for all
        (BODY.replace("s = Add", "k = Neg(w) s = Add").replace("(s, w)", "(s, k)"), 1),
        (BODY.replace("Add(s, m)", "Sub(s, m)"), 1),
        (BODY.replace("<axis=-1>(y, w)", "<axis=1>(y, w)"), 1),  # a norm of all tokens
        (BODY.replace("m = Neg(n)", "m = RMSNormalization<axis=-1>(s, w)"), 2),  # read by two
    ],
)
def test_the_sum_and_its_norm_are_what_they_were(body: str, joined: int) -> None:
    model = graph(body)
    feeds = {"x": normal(2, 3, 16), "z": normal(2, 3, 16, seed=1)}
    if "one" in body:
        del feeds["z"]
        model.graph.inputs.pop()
    wanted = run(model, **feeds)
    sum_inside(model.graph)
    assert ops(model)["SkipSimplifiedLayerNormalization"] == joined
    for one, other in zip(run(model, **feeds), wanted, strict=True):
        assert np.allclose(one, other, atol=1e-5)  # measured 9.5e-7


LAYERS = """s = Add(x, z) n = LayerNormalization<axis=-1>(s, w)
    m = Neg(n) a = Add(n, m) y = LayerNormalization<axis=-1>(a, w) q = Neg(y)"""


@pytest.mark.parametrize(
    ("body", "apart"),
    [
        (LAYERS, 2),
        (LAYERS.replace("Neg(n)", "Neg(s)"), 1),  # read behind it, too: no kernel is for that
        (LAYERS.replace("Add(n, m)", "Add(n, w)"), 1),  # one vector for all
        (LAYERS.replace("Add(n, m)", "Sub(n, m)"), 1),
        (LAYERS.replace("q = Neg(y)", "q = Neg(a)"), 1),
        (
            LAYERS.replace(" a = A", " y = A")
            .replace("y = L", "q = L")
            .replace("(a, w) q = Neg(y)", "(y, w)"),
            1,
        ),
    ],
)
def test_a_sum_that_a_layer_norm_alone_reads_stays_apart(body: str, apart: int) -> None:
    model = graph(body)
    feeds = {"x": normal(2, 3, 16), "z": normal(2, 3, 16, seed=1)}
    wanted = run(model, **feeds)
    sum_apart(model.graph)
    assert ops(model)["Sum"] == apart
    for one, other in zip(run(model, **feeds), wanted, strict=True):
        assert np.allclose(one, other, atol=1e-5)  # measured 1.4e-6


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_onnx_runtime_makes_no_sum_a_part_of_a_layer_norm(dtype: str, tmp_path: Path) -> None:
    """As it does where a graph is for whatever runs ONNX."""
    made = {}
    for profile in ("portable", "cpu"):
        config = ExportConfig(dtype=dtype, profile=profile)
        package = export(bert(layers=2), tmp_path / profile, config)
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / f"{profile}.onnx")
        ort.InferenceSession(package.path / "model.onnx", options)
        made[profile] = ops(ir.load(tmp_path / f"{profile}.onnx"))["SkipLayerNormalization"]
    assert made == {"portable": 4, "cpu": 0}
