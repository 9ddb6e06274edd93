"""Sharing reaches functions, branches' outputs, nested bodies, and ranks nobody wrote down."""

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from graphs import GEMM, build, names, normal, ops, run

from ffmerge.passes.graph.audit import audit
from ffmerge.passes.graph.run import share_model


def same(before, after, atol=0.0):
    for one, other in zip(before, after, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        np.testing.assert_allclose(other, one, rtol=0, atol=atol)


@pytest.mark.parametrize("allow", ["", "<allowzero=0>"])
def test_equal_reshapes_are_stored(allow):
    """Written three ways; 0 keeps a dimension, -1 is worked out."""
    model = build(
        f"""(float[2,6] x) => (float[2,4] a, float[2,4] b, float[2,4] c) {{
        r = Reshape{allow}(W, S)  a = MatMul(x, r)  s = Reshape{allow}(W, T)  p = Relu(x)
        b = MatMul(p, s)  t = Reshape{allow}(W, U)  q = Neg(x)  c = MatMul(q, t)}}""",
        W=normal(6, 2, 2), S=np.array([6, 4]), T=np.array([0, 4]), U=np.array([0, -1]),
    )  # fmt: skip
    before = run(model, x=normal(2, 6, seed=1))
    assert share_model(model).skipped == ()
    assert names(model) == ["W"] and "Reshape" not in ops(model)
    same(before, run(model, x=normal(2, 6, seed=1)))


def test_equal_reshapes_of_a_weight_used_otherwise_are_one(tmp_path):
    text = """(float[2,64] x) => (float[2,4] a, float[2,4] b, float[64,2,2] c) {
        r = Reshape(W, S)  a = MatMul(x, r)  s = Reshape(W, T)  p = Relu(x)
        b = MatMul(p, s)  c = Neg(W)}"""
    model = build(text, W=normal(64, 2, 2), S=np.array([64, 4]), T=np.array([64, -1]))
    before = run(model, x=normal(2, 64, seed=1))
    (skip,) = share_model(model).skipped
    assert ops(model)["Reshape"] == 1 and "used" not in skip.reason and "stays" in skip.reason
    same(before, run(model, x=normal(2, 64, seed=1)))


def test_a_reshape_to_a_computed_shape_stays():
    model = build(
        "(float[8,32] x) => (float[8,32] y) {s = Shape(x)  r = Reshape(W, s)  y = Add(x, r)}",
        W=normal(32, 8),
    )
    (skip,) = share_model(model).skipped
    assert "its shape is not known here" in skip.reason and ops(model)["Reshape"] == 1
    empty = build(
        "(float[2,0] x) => (float[2,0] y) {r = Reshape<allowzero=1>(W, S)  y = Add(x, r)}",
        W=np.zeros((0, 2), np.float32), S=np.array([2, 0]),
    )  # fmt: skip
    share_model(empty)
    assert run(empty, x=np.zeros((2, 0), np.float32))[0].shape == (2, 0)


def test_equal_dequantizations_are_one():
    """ONNX Runtime quantizes x where a scale has one reader, 0.9 % off: numpy is the judge."""
    quantized = np.arange(1024).reshape(32, 32).astype(np.int8)
    scale = np.abs(normal(32)) / 99
    model = build(
        """(float[2,32] x) => (float[2,32] y) {
        a = DequantizeLinear<axis=1>(W, s, z)  p = MatMul(x, a)
        b = DequantizeLinear<axis=1>(V, t, z)  q = MatMul(p, b)
        c = DequantizeLinear<axis=0>(W, s, z)  y = MatMul(q, c)}""",
        W=quantized, V=quantized, s=scale, t=scale, z=np.zeros(32, np.int8),
    )  # fmt: skip
    assert share_model(model).skipped == ()  # the way quantized weights are read
    assert ops(model) == {"DequantizeLinear": 2, "MatMul": 3} and names(model) == ["W", "s", "z"]
    x, wide = normal(2, 32, seed=1), scale.astype(np.float64)
    exact = x @ (quantized * wide) @ (quantized * wide) @ (quantized * wide[:, None])
    np.testing.assert_allclose(run(model, x=x)[0], exact, rtol=0, atol=3e-4)  # seen 7e-5 of 151


NESTED = """(bool c, bool d, float[2,64] x) => (float[2,64] y, float[64,64] w) {
    z = MatMul(x, W)
    y, w = If(c) <
      then_branch = yes () => (float[2,64] a, float[64,64] V1) {
        V1 = Constant<value = float[1] {0}>()
        a = If(d) <
          then_branch = yy () => (float[2,64] e) {t1 = Transpose(W)  e = MatMul(z, t1)},
          else_branch = yn () => (float[2,64] f) {t2 = Transpose(W)  g = MatMul(z, t2)  f = Neg(g)}
        >},
      else_branch = no () => (float[2,64] b, float[64,64] V2) {
        V2 = Constant<value = float[1] {0}>()  b = MatMul(z, V2)}>}"""


def test_branches_two_deep_and_what_they_return():
    w = normal(64, 64)
    model = build_unchecked(NESTED, W=w)
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.op_type == "Constant":
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(w.copy()))
    feeds = [
        {"c": np.array(c), "d": np.array(d), "x": normal(2, 64, seed=1)}
        for c in (True, False) for d in (True, False)
    ]  # fmt: skip
    before = [run(model, **feed) for feed in feeds]
    result = share_model(model)
    assert result.bytes_after == w.nbytes + sum(
        v.const_value.nbytes for v in model.graph.initializers.values() if v.name != "W"
    )
    assert names(model)[0] == "W" and result.bytes_after < w.nbytes + 100
    assert "Transpose" not in ops(model) and "Constant" not in ops(model)
    for feed, one in zip(feeds, before, strict=True):
        same(one, run(model, **feed), GEMM)
    once = ir.to_proto(model).SerializeToString()
    assert ir.to_proto(share_model(model).model).SerializeToString() == once


def build_unchecked(text, **weights):
    """The checker would refuse the placeholders' shapes."""
    header = '<ir_version: 10, opset_import: ["": 20]> g '
    proto = onnx.parser.parse_model(header + text)
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return ir.from_proto(proto)


def test_equal_nodes_of_two_branches_become_one_of_the_main_graph():
    model = build(
        """(bool c, float[2,64] x) => (float[2,64] y) {
        y = If(c) <
          then_branch = yes () => (float[2,64] a) {k = Cast<to=1>(W) a = MatMul(x, k)},
          else_branch = no () => (float[2,64] b) {
            l = Cast<to=1>(W) r = MatMul(x, l) b = Neg(r)}>}""",
        W=normal(64, 64, dtype=np.float16),
    )
    feeds = [{"c": np.array(c), "x": normal(2, 64, seed=1)} for c in (True, False)]
    before = [run(model, **f) for f in feeds]
    share_model(model)
    assert ops(model)["Cast"] == 1 and [n.op_type for n in model.graph] == ["Cast", "If"]
    for feed, one in zip(feeds, before, strict=True):
        same(one, run(model, **feed))


def test_different_reshapes_stay_apart():
    model = build(
        """(float[6,6] x, float[4,4] z) => (float[6,4] a, float[4,6] b) {
        r = Reshape(W, S)  a = MatMul(x, r)  s = Reshape(W, T)  b = MatMul(z, s)}""",
        W=normal(24), S=np.array([6, 4]), T=np.array([4, 6]),
    )  # fmt: skip
    feeds = {"x": normal(6, 6, seed=1), "z": normal(4, 4, seed=2)}
    before = run(model, **feeds)
    share_model(model)
    assert ops(model)["Reshape"] == 2
    same(before, run(model, **feeds))


def test_equal_nodes_stay_where_what_they_read_is_known():
    """The shape is worked out in the outer branch, so the Reshapes cannot leave it."""
    model = build(
        """(bool c, bool d, float[3,4] x) => (float[3,4] y) {
        y = If(c) <
          then_branch = yes () => (float[3,4] a) {
            s = Shape(x)
            a = If(d) <
              then_branch = yy () => (float[3,4] e) {k = Reshape(W, s)  e = Add(x, k)},
              else_branch = yn () => (float[3,4] f) {l = Reshape(W, s)  f = Sub(x, l)}>},
          else_branch = no () => (float[3,4] b) {b = Neg(x)}>}""",
        W=normal(12),
    )
    feeds = [
        {"c": np.array(c), "d": np.array(d), "x": normal(3, 4, seed=1)}
        for c in (True, False) for d in (True, False)
    ]  # fmt: skip
    before = [run(model, **feed) for feed in feeds]
    share_model(model)
    assert ops(model)["Reshape"] == 2
    for feed, one in zip(feeds, before, strict=True):
        same(one, run(model, **feed))


FUNCTIONS = """<ir_version: 10, opset_import: ["": 20, "f": 1]>
g (float[2,3] x) => (float[2,3] y) {a = f.outer(x)  b = Add(a, B)  c = f.plain(b)  y = f.inner(c)}
<domain: "f", opset_import: ["": 20, "f": 1]> inner (u) => (v) {
    k = Constant<value = float[3] {1, 2, 3}>()  v = Add(u, k)}
<domain: "f", opset_import: ["": 20, "f": 1]> outer (u) => (v) {w = f.inner(u)  v = f.plain(w)}
<domain: "f", opset_import: ["": 20, "f": 1]> plain (u) => (v) {v = Neg(u)}"""


def test_functions_that_hold_tensors_are_inlined_and_others_stay():
    proto = onnx.parser.parse_model(FUNCTIONS)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.float32([1, 2, 3]), "B"))
    model = ir.from_proto(proto)
    before = run(model, x=normal(2, 3))
    share_model(model)
    assert names(model) == ["B"] and len(model.graph.initializers["B"].uses()) == 3
    assert [key[1] for key in model.functions] == ["plain"]
    same(before, run(model, x=normal(2, 3)))


def test_a_rank_that_is_not_recorded_is_inferred_and_not_kept(tmp_path):
    model = build(
        """(float[b,3,64] x, int64[2] i) => (float[b,3,100] y, float[2,64] e) {
        e = Gather(W, i)  t = Transpose(W)  z = Relu(x)  s = Shape(z)  r = Reshape(z, s)
        y = MatMul(r, t)}""",
        W=normal(100, 64),
    )
    feeds = {"x": normal(2, 3, 64), "i": np.array([1, 2])}
    before = run(model, **feeds)
    assert share_model(model).skipped == () and ops(model)["Gemm"] == 1
    assert model.graph.node("n2").outputs[0].shape is None
    same(before, run(model, **feeds), GEMM)
    ir.save(model, tmp_path / "m.onnx")
    assert audit(tmp_path / "m.onnx").ok


def test_a_custom_operator_hides_the_rank():
    text = """<ir_version: 10, opset_import: ["": 20, "custom": 1]> g
        (float[2,64] x, int64[2] i) => (float[2,100] y, float[2,64] e) {
        e = Gather(W, i)  t = Transpose(W)  z = custom.Unknown(x)  y = MatMul(z, t)}"""
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(normal(100, 64), "W"))
    (skip,) = share_model(ir.from_proto(proto)).skipped
    assert "it is not known" in skip.reason
