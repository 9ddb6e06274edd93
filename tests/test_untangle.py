"""No Transpose, Identity or Cast between an initializer and its consumers; results unchanged."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphs import GEMM, build, names, normal, ops, run

from ffmerge.passes.graph import untangle as untangle_module
from ffmerge.passes.graph.untangle import UntanglePass


def untangle(model):
    transform = UntanglePass()
    result = transform(model)
    return result.modified, transform.skipped


def check_unchanged(before, after, atol=0.0):
    assert len(before) == len(after)
    for one, other in zip(before, after, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        np.testing.assert_allclose(other, one, rtol=0, atol=atol)


@pytest.mark.parametrize("rows", [64, 256])  # 4,096 and 16,384 elements: around the 8,192 limit
def test_equal_transposes_of_one_weight_become_the_weight(rows):
    w = normal(rows, 64)
    model = build(
        f"""(float[2,64] x) => (float[2,{rows}] a, float[2,{rows}] b, float[2,{rows}] c) {{
        t0 = Transpose<perm=[1,0]>(W)  a = MatMul(x, t0)
        t1 = Transpose<perm=[1,0]>(W)  p = Relu(x)  b = MatMul(p, t1)
        t2 = Transpose(W)  q = Neg(x)  c = MatMul(q, t2)}}""",
        W=w,
    )
    before = run(model, x=normal(2, 64, seed=1))
    assert untangle(model) == (True, [])
    assert ops(model) == {"MatMul": 3, "Relu": 1, "Neg": 1}
    assert names(model) == ["W"]
    tensor = model.graph.initializers["W"].const_value
    assert np.array_equal(tensor.numpy(), w.T)
    assert tensor.tobytes() == w.T.tobytes(order="C")
    check_unchanged(before, run(model, x=normal(2, 64, seed=1)))
    assert untangle(model) == (False, [])


def test_a_chain_folds_in_bfloat16():
    model = build(
        """(float[2,8] x) => (float[2,16] y) {
        i = Identity(W)  c = Cast<to=16>(i)  t = Transpose<perm=[1,0]>(c)
        h = Cast<to=16>(x)  z = MatMul(h, t)  y = Cast<to=1>(z)}""",
        W=normal(16, 8),
    )
    assert untangle(model) == (True, [])
    assert ops(model) == {"Cast": 2, "MatMul": 1}
    tensor = model.graph.initializers["W"].const_value
    expected = normal(16, 8).astype("bfloat16").T
    assert tensor.numpy().dtype == expected.dtype and list(tensor.shape) == [8, 16]
    assert tensor.tobytes() == expected.tobytes(order="C")


def test_the_folded_weight_is_computed_when_read():
    model = build(
        "(float[2,8] x) => (float[2,16] y) {t = Transpose(W) y = MatMul(x, t)}", W=normal(16, 8)
    )
    untangle(model)
    tensor = model.graph.initializers["W"].const_value
    assert tensor.numpy() is not tensor.numpy()  # nothing is kept beside the original


@pytest.mark.parametrize("shape", ["2", "2,3", "2,3,4"])
def test_a_tied_head_reads_the_raw_embedding(shape):
    """Gather and Transpose -> MatMul of one weight, x of rank 2, 3 and 4."""
    model = build(
        f"""(int64[{shape}] ids) => (float[{shape},100] y) {{
        x = Gather(W, ids)  h = Relu(x)  t = Transpose<perm=[1,0]>(W)  z = MatMul(h, t)
        y = Add(z, b)}}""",
        W=normal(100, 64),
        b=normal(100, seed=1),
    )
    rank = len(shape.split(",")) + 1
    model.graph.node("n1").outputs[0].shape = _dynamic(rank)
    ids = np.random.default_rng(2).integers(0, 100, [int(s) for s in shape.split(",")])
    before = run(model, ids=ids)
    assert untangle(model) == (True, [])
    counted = ops(model)
    assert "Transpose" not in counted and "MatMul" not in counted and counted["Gemm"] == 1
    assert counted["Reshape"] == (0 if rank == 2 else 2)
    assert len(model.graph.initializers["W"].uses()) == 2
    check_unchanged(before, run(model, ids=ids), GEMM)
    assert untangle(model) == (False, [])


def _dynamic(rank):
    return ir.Shape([None] * (rank - 1) + [64])


def test_two_dynamic_dimensions_and_an_empty_batch():
    model = build(
        """(float[batch,length,64] x, int64[2] i) => (float[batch,length,100] y, float[2,64] e) {
        e = Gather(W, i)  t = Transpose(W)  y = MatMul(x, t)}""",
        W=normal(100, 64),
    )
    for batch in (3, 0):
        feeds = {"x": normal(batch, 5, 64), "i": np.array([1, 2])}
        before = run(model, **feeds)
        copy = model.clone()
        assert untangle(copy) == (True, [])
        check_unchanged(before, run(copy, **feeds), GEMM)


def test_a_gemm_flips_its_flag():
    model = build(
        """(float[2,64] x, int64[2] i) => (float[2,64] y, float[2,64] z, float[2,64] e) {
        e = Gather(W, i)  t = Transpose(W)
        y = Gemm(x, t, b)  z = Gemm<transB=1, alpha=0.5>(x, t, b)}""",
        W=normal(64, 64),
        b=normal(64, seed=1),
    )
    feeds = {"x": normal(2, 64, seed=3), "i": np.array([0, 5])}
    before = run(model, **feeds)
    assert untangle(model) == (True, [])
    assert ops(model) == {"Gather": 1, "Gemm": 2}
    check_unchanged(before, run(model, **feeds), GEMM)


def test_a_use_in_a_branch_is_untangled_too():
    model = build(
        """(bool c, float[2,64] x) => (float[2,64] y) {
        y = If(c) <
          then_branch = yes () => (float[2,64] a) {t = Transpose(W) a = MatMul(x, t)},
          else_branch = no () => (float[2,64] b) {
            s = Transpose(W) r = MatMul(x, s) b = Neg(r)}>}""",
        W=normal(64, 64),
    )
    feeds = [{"c": np.array(c), "x": normal(2, 64, seed=1)} for c in (True, False)]
    before = [run(model, **f) for f in feeds]
    assert untangle(model) == (True, [])
    assert ops(model) == {"If": 1, "MatMul": 2, "Neg": 1}
    for one, f in zip(before, feeds, strict=True):
        check_unchanged(one, run(model, **f))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        # the rank of z is not written down
        (
            """(float[2,3,64] x, int64[2] i) => (float[2,3,64] y, float[2,64] e) {
            e = Gather(W, i)  t = Transpose(W)  z = Relu(x)  y = MatMul(z, t)}""",
            "rank 2 or more; it is not known",
        ),
        (
            """(float[64] x, int64[2] i) => (float[64] y, float[2,64] e) {
            e = Gather(W, i)  t = Transpose(W)  y = MatMul(x, t)}""",
            "rank 2 or more; it is 1",
        ),
        (
            """(float[64,64] x, int64[2] i) => (float[64,64] y, float[2,64] e) {
            e = Gather(W, i)  t = Transpose(W)  y = MatMul(t, x)}""",
            "MatMul node n2 cannot read it transposed",
        ),
        (
            """(float[64,64] x) => (float[64,64] y, float[64,64] t) {
            t = Transpose(W)  y = MatMul(x, t)}""",
            "gives graph output t",
        ),
        (
            """(float[64,64] x) => (float[64,64] y, float[64,64] W) {
            t = Transpose(W)  y = MatMul(x, t)}""",
            "graph output",
        ),
        (
            """(float[64,64] x, float[64,64] W) => (float[64,64] y) {
            t = Transpose(W)  y = MatMul(x, t)}""",
            "graph input: a caller may replace it",
        ),
        (
            """(double[64,64] x) => (double[64,64] y) {
            t = Cast<to=11>(W)  y = MatMul(x, t)}""",
            "would take 16384 bytes more",
        ),
        (
            """(int64[64,64] x) => (int64[64,64] y) {
            t = Cast<to=7>(W)  y = Add(x, t)}""",
            "may round differently",
        ),
    ],
)
def test_what_stays_has_a_reason(text, reason):
    model = build(text, W=normal(64, 64))
    before = ops(model)
    modified, skipped = untangle(model)
    assert not modified and ops(model) == before
    assert [skip.name for skip in skipped] == ["W"]
    assert reason in skipped[0].reason


def test_an_old_opset_has_no_gemm_without_bias():
    text = """(float[2,64] x, int64[2] i) => (float[2,64] y, float[2,64] e) {
        e = Gather(W, i)  t = Transpose(W)  y = MatMul(x, t)}"""
    _, skipped = untangle(build(text, opset=10, W=normal(64, 64)))
    assert "opset 11" in skipped[0].reason


def test_int4_is_left_alone():
    codes = [1, -2, 3, 4, 5, 6, 7, -8] * 256  # 1,024 bytes; less is not named
    packed = onnx.helper.make_tensor("W", onnx.TensorProto.INT4, [1024, 2], codes)
    model = build(
        "() => (float[2,1024] y) {t = Transpose(W) y = Cast<to=1>(t)}", opset=21, W=packed
    )
    modified, skipped = untangle(model)
    assert not modified and "INT4" in skipped[0].reason


def test_wide_casts_that_stay_become_one():
    model = build(
        """(float[2,64] x) => (float[2,64] y) {
        a = Cast<to=1>(W)  p = MatMul(x, a)  b = Cast<to=1>(W)  y = MatMul(p, b)}""",
        W=normal(64, 64, dtype=np.float16),
    )
    before = run(model, x=normal(2, 64, seed=1))
    modified, skipped = untangle(model)
    assert modified and ops(model) == {"Cast": 1, "MatMul": 2} and len(skipped) == 1
    check_unchanged(before, run(model, x=normal(2, 64, seed=1)))


def test_casts_round_as_the_runtime_does():
    """Halfway cases, overflow, subnormals and NaN from float32 to float16, against the runtime."""
    special = np.array(
        [1 + 2**-11, 1 + 3 * 2**-11, 65520, 1e30, -1e30, 6e-8, 2e-8, np.inf, 0.0, -0.0]
    )
    for to in (10, 16):
        model = build(
            f"""(float[10] x) => (float[10] y) {{
            c = Cast<to={to}>(W)  d = Cast<to=1>(c)  y = Add(x, d)}}""",
            W=special.astype(np.float32),
        )
        zero = np.zeros(10, np.float32)
        before = run(model, x=zero)
        untangle(model)
        assert ops(model)["Cast"] == 1
        assert np.array_equal(run(model, x=zero)[0], before[0], equal_nan=True)


def test_many_readers_of_one_number_are_looked_at_a_few_times(monkeypatch):
    """Each step does all that it can: the looks grow with the readers, not with their square."""
    looks = []
    effect = untangle_module._effect
    monkeypatch.setattr(untangle_module, "_effect", lambda *both: looks.append(1) or effect(*both))
    casts = " ".join(f"c{n} = Cast<to=1>(W) y{n} = Neg(c{n})" for n in range(40))
    outputs = ", ".join(f"float[2] y{n}" for n in range(40))
    model = build(f"() => (int64[2] w, {outputs}) {{ w = Neg(W) {casts} }}", W=np.array([3, 4]))
    before = run(model)
    assert untangle(model)[0]
    assert ops(model) == {"Neg": 41, "Cast": 1}
    check_unchanged(before, run(model))
    assert len(looks) <= 2 * 40  # measured 41; a pair at a time they were 820
