"""float16 inside, float32 outside, and one cast where float16 will not do."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphs import build, normal, ops, run

from ffmerge.models.record import Tie
from ffmerge.passes.graph.audit import audit
from ffmerge.passes.graph.contract import check_ties
from ffmerge.passes.graph.run import share_model

F16 = ir.DataType.FLOAT16


def half(text, opset=20, ties=(), **weights):
    return share_model(build(text, opset, **weights), ties, "fp16")


def dtype(result, name):
    return result.model.graph.initializers[name].const_value.dtype


def test_products_are_those_of_float16_numbers():
    text = "(float[n,64] x) => (float[n,32] y) { h = MatMul(x, W) y = Add(h, b) }"
    weight, bias, x = normal(64, 32), normal(32, seed=1), normal(5, 64, seed=2)
    result = half(text, W=weight, b=bias)
    assert result.bytes_after == 2 * (64 * 32 + 32) and not result.skipped
    assert [v.dtype for v in (*result.model.graph.inputs, *result.model.graph.outputs)] == [
        ir.DataType.FLOAT
    ] * 2
    expected = x.astype("e").astype("d") @ weight.astype("e").astype("d") + bias.astype("e")
    (got,) = run(result.model, x=x)
    # the product and the sum are each rounded to 11 bits; measured 4e-3 on values up to 22
    assert np.abs(got - expected).max() <= 2**-10 * np.abs(expected).max() * 1.5
    assert ops(result.model) == {"Cast": 2, "MatMul": 1, "Add": 1}
    onnx.checker.check_model(ir.to_proto(result.model), full_check=True)


def test_each_value_is_cast_once():
    text = """(float[n,64] x) => (float[n,64] y, float[n,64] z) {
        a = MatMul(x, W) b = Max(a, x) c = Max(a, b) y = MatMul(c, W) z = Add(y, c) }"""
    weight, x = normal(64, 64), normal(5, 64, seed=1)
    (y, z) = run(build(text, W=weight), x=x)
    result = half(text, W=weight)
    # x and c to float16; a, y and z back
    assert ops(result.model)["Cast"] == 5
    made = [out.name for node in result.model.graph for out in node.outputs]
    assert len(made) == len(set(made))
    for got, expected in zip(run(result.model, x=x), (y, z), strict=True):
        assert np.abs(got - expected).max() < 2e-3 * np.abs(expected).max()  # measured 3.1e-4


def test_a_weight_of_a_blocked_and_a_free_node_is_stored_once(tmp_path):
    text = """(float[64,64] x) => (float[64,64] y, float[64,64] z) {
        y = MatMul(x, W) z = Max(x, W) }"""
    weight, x = normal(64, 64), normal(64, 64, seed=1)
    expected = run(build(text, W=weight), x=x)
    result = half(text, ties=[Tie("W", ("W", "V"))], W=weight)
    assert result.bytes_after == 4 * 64 * 64
    (skip,) = result.skipped
    assert (skip.name, skip.reason) == ("W", "FLOAT: Max node n1 reads it in float32")
    assert check_ties(result.model, result.ties)[0].ok
    ir.save(result.model, tmp_path / "m.onnx")
    assert audit(tmp_path / "m.onnx").ok
    for got, wanted in zip(run(result.model, x=x), expected, strict=True):
        assert np.allclose(got, wanted, rtol=0, atol=1e-6)  # measured 0


@pytest.mark.parametrize(
    ("nodes", "constants", "scale"),
    [
        ("s = Pow(x, two) m = ReduceMean(s) v = Add(m, eps) r = Sqrt(v) y = Div(x, r)",
         {"two": np.float32(2), "eps": np.float32(1e-6)}, 1000.0),
        ("s = Mul(x, x) m = ReduceMean(s) v = Add(m, eps) r = Sqrt(v) y = Div(x, r)",
         {"eps": np.float32(1e-12)}, 1000.0),
        ("i = Cast<to=7>(x) f = Cast<to=1>(i) a = Mul(f, w) y = Sin(a)",
         {"w": np.float32(0.37)}, 5000.0),
    ],
    ids=["rms by Pow", "rms by Mul", "angles"],
)  # fmt: skip
def test_ranges_and_digits_that_float16_lacks_are_kept(nodes, constants, scale):
    text = f"(float[4,64] x) => (float[4,64] y) {{ {nodes} }}"
    # what float16 holds, so that rounding the input is no part of it
    x = np.rint(normal(4, 64) * scale).astype(np.float16).astype(np.float32)
    (expected,) = run(build(text, **constants), x=x)
    model = half(text, **constants).model
    kept = [n for n in model.graph if n.op_type in ("Pow", "Mul", "ReduceMean", "Sqrt", "Sin")]
    assert kept and all(node.outputs[0].dtype == ir.DataType.FLOAT for node in kept)
    (got,) = run(model, x=x)
    # measured 0; float16 all through gives inf, NaN or noise
    assert np.abs(got - expected).max() < 5e-6


def test_a_mask_stays_finite_and_masks():
    text = """(float[2,8] x, bool[2,8] keep) => (float[2,8] y) {
        m = Where(keep, zero, low) s = Add(x, m) t = Add(s, m) y = Softmax(t) }"""
    constants = {"zero": np.float32(0), "low": np.finfo(np.float32).min}
    keep = np.array([[True] * 3 + [False] * 5, [False] * 8])
    result = half(text, **constants)
    assert dtype(result, "low") == F16
    (got,) = run(result.model, x=normal(2, 8), keep=keep)
    assert np.isfinite(got).all()
    assert (got[0, 3:] == 0).all()


def test_weights_beyond_the_range_stay_float32():
    weight, x = normal(64, 64), normal(5, 64, seed=1)
    weight[0, 0] = 70000
    text = "(float[n,64] x) => (float[n,64] y) { y = MatMul(x, W) }"
    result = half(text, W=weight)
    assert result.skipped[0].name == "W" and dtype(result, "W") == ir.DataType.FLOAT
    got = run(result.model, x=x)[0]
    assert np.allclose(got, x @ weight, rtol=1e-6, atol=1e-5)  # measured 0 to 0.3 of that


def test_subgraphs_stay_float32():
    text = """(bool c, float[n,64] x) => (float[n,64] y) {
        h = MatMul(x, W)
        y = If (c) <then_branch = t () => (float[n,64] p) { p = MatMul(h, V) },
                    else_branch = e () => (float[n,64] q) { q = Neg(h) }> }"""
    weights, x = {"W": normal(64, 64), "V": normal(64, 64, seed=1)}, normal(5, 64, seed=2)
    result = half(text, **weights)
    assert (dtype(result, "W"), dtype(result, "V")) == (F16, ir.DataType.FLOAT)
    assert [skip.name for skip in result.skipped] == ["V"]
    for c in (True, False):
        (expected,) = run(build(text, **weights), c=np.array(c), x=x)
        (got,) = run(result.model, c=np.array(c), x=x)
        assert np.abs(got - expected).max() < 2e-3 * np.abs(expected).max()  # measured 2.6e-4


def test_filled_constants_take_the_type():
    text = """(float[n,8] x) => (float[n,8] y) {
        s = Shape(x) f = ConstantOfShape<value = float[1] {2.5}>(s) y = Add(x, f) }"""
    (got,) = run(half(text).model, x=np.ones((3, 8), np.float32))
    assert (got == 3.5).all()
