"""float16 inside, float32 outside, and one cast where float16 will not do."""

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from graphs import build, normal, ops, run
from onnx.reference import ReferenceEvaluator

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
        a = MatMul(x, W) b = Sin(a) c = Cos(b) y = MatMul(c, W) z = Add(y, c) }"""
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
        y = MatMul(x, W) z = Sin(W) }"""
    weight, x = normal(64, 64), normal(64, 64, seed=1)
    expected = run(build(text, W=weight), x=x)
    result = half(text, ties=[Tie("W", ("W", "V"))], W=weight)
    assert result.bytes_after == 4 * 64 * 64
    (skip,) = result.skipped
    assert (skip.name, skip.reason) == ("W", "FLOAT: Sin node n1 reads it in float32")
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


COUNTS = {
    "sizes": """s = Shape(x) f = Cast<to = 1>(s) h = Mul(f, half) i = Cast<to = 7>(h)
        y = Expand(one, i)""",
    "positions": """n = Cast<to = 1>(x) m = Add(n, one) c = Less(n, m) y = Cast<to = 1>(c)""",
    "constants": """h = Mul(area, aspect) i = Cast<to = 7>(h) g = Shape(x) k = Mul(i, g)
        y = Cast<to = 1>(k)""",
}


@pytest.mark.parametrize("kind", COUNTS)
def test_what_counts_is_exact_beyond_what_float16_counts(kind):
    """As of sizes for Reshape and Resize, of causal masks, of the square root of an area."""
    size = 2 * 2051  # float16 knows 2,048, 2,050 and 2,052
    text = f"(int64[n] x) => (float[m] y) {{ {COUNTS[kind]} }}"
    constants = {"half": np.float32(0.5), "one": np.float32(1), "area": np.float32(999)}
    constants["aspect"] = np.float32(2.5)  # 2497.5 together
    constants = {name: value for name, value in constants.items() if name in COUNTS[kind]}
    x = np.arange(size)
    (expected,) = run(build(text, **constants), x=x)
    model = ir.to_proto(half(text, **constants).model)
    (got,) = ReferenceEvaluator(model).run(None, {"x": x})  # rounds where ONNX Runtime may not
    assert np.array_equal(got, expected)


def test_between_float32_nodes_no_island_is_made_for_a_kilobyte():
    """A vector of 256 is cast for its reader, which stays float32; one of more is halved."""
    for size, made in ((256, ir.DataType.FLOAT), (512, F16)):
        text = f"""(float[n,{size}] x) => (float[n,{size}] y) {{
            s = Sin(x) m = Mul(s, w) y = Sin(m) }}"""
        model = half(text, w=normal(size)).model
        (mul,) = [node for node in model.graph if node.op_type == "Mul"]
        assert mul.outputs[0].dtype == made


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


BRANCHES = """(bool c, float[n,64] x) => (float[n,64] y) {
    h = MatMul(x, W)
    y = If (c) <then_branch = t () => (float[n,64] p) { p = MatMul(h, V) },
                else_branch = e () => (float[n,64] q) { r = MatMul(h, U) q = Sin(r) }> }"""
LOOP = """(float[n,64] x) => (float[n,64] y, float[k,n,64] each) {
    trips = Constant<value = int64 {3}>() go = Constant<value = bool {1}>()
    y, each = Loop (trips, go, x) <body = b (int64 i, bool on, float[n,64] s) =>
        (bool on_, float[n,64] s_, float[n,64] scan) {
            on_ = Identity(on) a = MatMul(s, W) s_ = Tanh(a) scan = MatMul(s_, V) }> }"""
SCAN = """(float[5,64] x) => (float[64] y, float[5,64] each) {
    zero = Constant<value = float[1] {0}>() shape = Constant<value = int64[1] {64}>()
    start = Expand(zero, shape)
    y, each = Scan <num_scan_inputs = 1, body = b (float[64] s, float[64] r) =>
        (float[64] s_, float[64] o) { a = MatMul(r, W) t = Add(s, a) s_ = Tanh(t)
            o = MatMul(s_, V) }> (start, x) }"""


@pytest.mark.parametrize("text", [BRANCHES, LOOP, SCAN], ids=["If", "Loop", "Scan"])
def test_weights_of_branches_and_bodies_are_halved(text):
    drawn = {"W": 0, "V": 1, "U": 2}
    weights = {name: normal(64, 64, seed=seed) / 8 for name, seed in drawn.items() if name in text}
    if text is not BRANCHES:
        weights.pop("U", None)
    result = half(text, **weights)
    assert not result.skipped
    assert all(dtype(result, name) == F16 for name in weights)
    onnx.checker.check_model(ir.to_proto(result.model), full_check=True)
    feeds = {"x": normal(5, 64, seed=3)}
    for c in (True, False):
        if text is BRANCHES:
            feeds["c"] = np.array(c)
        expected, got = run(build(text, **weights), **feeds), run(result.model, **feeds)
        for one, other in zip(expected, got, strict=True):
            assert np.abs(one - other).max() < 4e-3 * np.abs(one).max()


@pytest.mark.parametrize(
    ("nodes", "outputs"),
    [
        ("y, mean = LayerNormalization<axis = -1>(p, g, b)", "float[n,1] mean"),
        ("y = Relu(p) i = NonMaxSuppression(boxes, scores)", "int64[k,3] i"),
        ("y = Relu(p) e = EyeLike<dtype = 1>(p)", "float[n,64] e"),
        ("y = Relu(p) q, s, z = DynamicQuantizeLinear(p)", "uint8[n,64] q"),
        ("y = Relu(p) r = Bernoulli<seed = 1.0>(u)", "float[n,64] r"),
        ("y = Relu(p) c = BitCast<to = 6>(p)", "int32[n,64] c"),
        ("s = SplitToSequence<axis = 0>(p) y = SequenceAt(s, zero)", None),
    ],
    ids=lambda value: value.split("= ")[-1].split("(")[0] if value and "=" in value else "",
)
def test_what_has_no_float16_form_is_float32_and_loads(nodes, outputs):
    """Types that a schema ties to float32, and sequences, whose elements have one."""
    extra = f", {outputs}" if outputs else ""
    inputs = "float[n,64] x, float[n,64] u, float[1,6,4] boxes, float[1,1,6] scores"
    text = f"({inputs}) => (float[m,64] y{extra}) {{ p = MatMul(x, W) {nodes} }}"
    weights = {"W": normal(64, 64), "g": np.ones(64, "f"), "b": np.zeros(64, "f"), "zero": 0}
    weights = {name: np.asarray(value) for name, value in weights.items() if f"{name}" in nodes}
    weights["W"] = normal(64, 64)
    opset = 26 if "BitCast" in nodes else 20
    result = half(text, opset, **weights)
    assert dtype(result, "W") == F16
    feeds = {"x": normal(3, 64, seed=1), "u": normal(3, 64, seed=2) * 0 + 0.5}
    feeds |= {"boxes": normal(1, 6, 4), "scores": normal(1, 1, 6)}
    expected = run(build(text, opset, **weights), **feeds)[0]
    got = run(result.model, **feeds)[0]
    assert np.abs(got - expected).max() < 4e-3 * np.abs(expected).max()


def test_blocked_nodes_pin_no_weight_that_they_do_not_read():
    """Squeeze and excite: a mean, two small convolutions, a gate; only the mean is float32."""
    text = """(float[n,8,4,4] x) => (float[n,8,4,4] y) {
        m = ReduceMean(x, axes) a = Conv(m, W) r = Relu(a) e = Conv(r, V) g = Exp(e)
        y = Mul(x, g) }"""
    weights = {"W": normal(64, 8, 1, 1), "V": normal(8, 64, 1, 1, seed=1) / 8}
    result = half(text, 18, axes=np.array([2, 3]), **weights)
    assert not result.skipped and dtype(result, "W") == dtype(result, "V") == F16
    relu = next(node for node in result.model.graph if node.op_type == "Relu")
    assert relu.outputs[0].dtype == F16


def test_filled_constants_take_the_type():
    text = """(float[n,8] x) => (float[n,8] y) {
        s = Shape(x) f = ConstantOfShape<value = float[1] {2.5}>(s) y = Add(x, f) }"""
    (got,) = run(half(text).model, x=np.ones((3, 8), np.float32))
    assert (got == 3.5).all()


def test_what_lies_behind_a_fused_operator_is_halved_too(tmp_path):
    """As in a file that ONNX Runtime's optimizer wrote: ONNX knows no type behind its operators."""
    text = """(float[n,s,64] x) => (float[n,s,64] y) {
        a = MatMul(x, W) g = com.microsoft.BiasGelu(a, b)
        l, m, i, r = com.microsoft.SkipLayerNormalization(g, x, gamma, beta)
        y = MatMul(l, V) }"""
    header = '<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]> g '
    weights = {"W": normal(64, 64), "V": normal(64, 64, seed=1), "b": normal(64, seed=2)}
    weights |= {"gamma": normal(64, seed=3), "beta": normal(64, seed=4)}
    proto = onnx.parser.parse_model(header + text)
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    x = normal(2, 3, 64, seed=5)
    (expected,) = run(ir.from_proto(proto), x=x)
    result = share_model(ir.from_proto(proto), dtype="fp16")
    assert not result.skipped and all(dtype(result, name) == F16 for name in weights)
    (got,) = run(result.model, x=x)
    assert np.abs(got - expected).max() < 4e-3 * np.abs(expected).max()  # measured 1.0e-3
