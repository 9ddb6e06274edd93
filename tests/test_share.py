"""Equal tensors are stored once, whatever their size and type, and results stay the same."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphs import GEMM, TWO_LAYERS, build, names, normal, ops, run
from onnx import TensorProto, helper

from ffmerge.errors import TieError
from ffmerge.models.record import Tie
from ffmerge.passes.graph.run import share_model
from ffmerge.passes.graph.tensors import find_copies

CASES = {
    "scalar": np.array(2.5, np.float32),
    "vector": np.arange(5, dtype=np.float32),
    "int64": np.arange(6).reshape(2, 3),
    "bool": np.array([True, False, True]),
    "zeros": np.zeros((3, 2), np.float32),
    "bfloat16": normal(16, 16).astype("bfloat16"),
    "float8": normal(16, 16).astype("float8_e4m3fn"),
    "float16": normal(16, 16, dtype=np.float16),
    "large": normal(300, 40),
    "string": np.array(["a", "b\0", "b"], object),
    "int4": helper.make_tensor("", TensorProto.INT4, [3], [1, -2, 7]),
    "one row": normal(1, 9),
}


@pytest.mark.parametrize("case", CASES)
def test_identical_tensors_become_the_first(case):
    value = CASES[case]
    proto = value if isinstance(value, TensorProto) else onnx.numpy_helper.from_array(value)
    copies = []
    for name in "ABC":
        copy = TensorProto()
        copy.CopyFrom(proto)
        copy.name = name
        copies.append(copy)
    outputs = [helper.make_tensor_value_info(o, proto.data_type, proto.dims) for o in "pqr"]
    nodes = [
        helper.make_node("If", ["c"], [o], name=f"if_{o}", **_branches(w, proto))
        for o, w in zip("pqr", "ABC", strict=True)
    ]
    condition = helper.make_tensor_value_info("c", TensorProto.BOOL, [])
    graph = helper.make_graph(nodes, "g", [condition], outputs, copies)
    opsets = [helper.make_opsetid("", 21)]
    model = ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=10))
    size = model.graph.initializers["A"].const_value.nbytes
    runs = case not in ("bfloat16", "string", "int4")  # those ONNX Runtime's If gives numpy
    before = run(model, c=np.array(True)) if runs else []
    content = model.graph.initializers["A"].const_value.numpy().copy()
    result = share_model(model)
    assert names(model) == ["A"]
    assert np.array_equal(model.graph.initializers["A"].const_value.numpy(), content)
    assert all("Identity" in skip.reason for skip in result.skipped)  # those of the branches
    assert (result.bytes_before, result.bytes_after) == (3 * size, size)
    assert len(model.graph.initializers["A"].uses()) == 6
    after = run(model, c=np.array(True)) if runs else []
    for one, other in zip(before, after, strict=True):
        assert one.tobytes() == other.tobytes()


def _branches(weight, proto):
    """Both branches give the weight unchanged, by the one operator that takes every type."""

    def branch(name):
        out = helper.make_tensor_value_info(name, proto.data_type, proto.dims)
        node = helper.make_node("Identity", [weight], [name], name=f"node_{name}")
        return helper.make_graph([node], name, [], [out])

    return {"then_branch": branch(f"{weight}_yes"), "else_branch": branch(f"{weight}_no")}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (np.float32([0.0]), np.float32([-0.0])),
        (np.float32([1, 2]), np.float32([1, 3])),
        (np.int32([0, 0]), np.float32([0, 0])),
        (normal(4, 6), normal(4, 6).reshape(6, 4)),  # the same bytes in another shape
        (np.array([b"ab", b"c"], object), np.array([b"a", b"bc"], object)),
        (np.zeros((0, 2), np.float32), np.zeros((0, 2), np.float32)),  # nothing to save
    ],
)
def test_different_tensors_stay(one, other):
    a, b = (onnx.numpy_helper.from_array(v) for v in (one, other))
    outputs = [helper.make_tensor_value_info(o, t.data_type, None) for o, t in (("p", a), ("q", b))]
    nodes = [
        helper.make_node("Unsqueeze", [w, "axis"], [o], name=o) for w, o in (("A", "p"), ("B", "q"))
    ]
    a.name, b.name = "A", "B"
    axis = onnx.numpy_helper.from_array(np.array([0]), "axis")
    graph = helper.make_graph(nodes, "g", [], outputs, [a, b, axis])
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]))
    share_model(model)
    assert names(model) == ["A", "B", "axis"]


def test_weights_and_biases_of_two_layers():
    w, b = normal(64, 64), normal(64, seed=1)
    model = build(TWO_LAYERS, W1=w, B1=b, W2=w.copy(), B2=b.copy())
    feed = normal(2, 64, seed=2)
    before = run(model, x=feed)
    result = share_model(model)
    assert names(model) == ["W1", "B1"]
    assert (result.bytes_before, result.bytes_after) == (2 * (64 * 64 + 64) * 4, (64 * 64 + 64) * 4)
    assert np.array_equal(before, run(model, x=feed))


def test_a_transposed_copy_is_read_by_gemm():
    w = normal(32, 64)
    model = build(
        """(float[2,3,64] x) => (float[2,3,32] y, float[32,64] s) {
        y = MatMul(x, V)  s = Relu(W)}""",
        W=w,
        V=np.ascontiguousarray(w.T),
    )
    feed = normal(2, 3, 64, seed=1)
    before = run(model, x=feed)
    result = share_model(model)
    assert "V" not in names(model) and ops(model)["Gemm"] == 1 and result.skipped == ()
    after = run(model, x=feed)
    np.testing.assert_allclose(after[0], before[0], rtol=0, atol=GEMM)  # seen: 0.0
    assert np.array_equal(after[1], before[1])
    assert sum(v.const_value.nbytes for v in model.graph.initializers.values()) < w.nbytes + 64


def test_of_a_transposed_pair_the_one_that_can_go_goes():
    """The second, V, is read by Relu, so the first becomes Gemm's transposed V."""
    w = normal(32, 64)
    text = """(float[2,32] x) => (float[2,64] y, float[64,32] s) {y = MatMul(x, W)  s = Relu(V)}"""
    model = build(text, W=w, V=np.ascontiguousarray(w.T))
    before = run(model, x=normal(2, 32, seed=1))
    result = share_model(model)
    assert names(model) == ["V"] and result.skipped == ()
    after = run(model, x=normal(2, 32, seed=1))
    np.testing.assert_allclose(after[0], before[0], rtol=0, atol=GEMM)  # seen: 0.0
    both = "(float[2,32] x) => (float[2,32] y) {h = MatMul(x, W)  y = MatMul(h, V)}"
    model = build(both, W=w, V=np.ascontiguousarray(w.T))
    share_model(model, [Tie("V", ("V",))])
    assert names(model) == ["V"]  # the contract's name, though W comes first
    tied = build(text, W=w, V=np.ascontiguousarray(w.T))
    with pytest.raises(TieError, match="W is stored again, as it is or transposed, as V"):
        share_model(tied, [Tie("W", ("W",))])  # the contract's name is not given up for this


def test_a_transposed_pair_no_one_can_read_stays_with_a_reason():
    w = normal(32, 64)
    model = build(
        "() => (float[32,64] y, float[64,32] s) {y = Relu(W)  s = Relu(V)}", W=w, V=w.T.copy()
    )
    result = share_model(model)
    assert names(model) == ["W", "V"]
    assert [s.name for s in result.skipped] == ["V"]
    assert "the transpose of W, but Relu node n1" in result.skipped[0].reason


def test_copies_inside_branches_and_constants_are_found():
    w = normal(64, 64)
    text = """(bool c, float[2,64] x) => (float[2,64] y) {
        z = MatMul(x, W)
        y = If(c) <
          then_branch = yes () => (float[2,64] a) <float[64,64] V> {a = MatMul(z, V)},
          else_branch = no () => (float[2,64] b) <float[64,64] V> {r = MatMul(z, V) b = Neg(r)}>}"""
    plain = text.replace("<float[64,64] V>", "").replace("V)", "W)")
    model = build(plain, W=w)
    attributes = next(node for node in model.graph if node.op_type == "If").attributes
    inner = attributes["then_branch"].as_graph()
    copy = ir.Value(name="V", const_value=ir.tensor(w.copy(), name="V"))
    inner.register_initializer(copy)
    inner[0].replace_input_with(1, copy)
    inner = attributes["else_branch"].as_graph()
    constant = ir.node("Constant", [], {"value": ir.tensor(w.copy())}, name="k")
    constant.outputs[0].name = "V"  # the same inner name as in the other branch
    inner.insert_before(inner[0], constant)
    inner[1].replace_input_with(1, constant.outputs[0])
    feeds = [{"c": np.array(c), "x": normal(2, 64, seed=1)} for c in (True, False)]
    before = [run(model, **f) for f in feeds]
    result = share_model(model)
    assert names(model) == ["W"] and ops(model)["Constant"] == 0
    assert (result.bytes_before, result.bytes_after) == (3 * w.nbytes, w.nbytes)
    assert len(model.graph.initializers["W"].uses()) == 3
    for one, f in zip(before, feeds, strict=True):
        assert np.array_equal(one, run(model, **f))


def test_a_lifted_name_that_a_branch_uses_itself():
    """``v`` is a Constant of one branch and a computed value of the other."""
    model = build(
        """(bool c, float[3] x) => (float[3] y) {
        y = If(c) <
          then_branch = yes () => (float[3] a) {
            v = Constant<value = float[3] {1, 2, 3}>()  a = Add(x, v)},
          else_branch = no () => (float[3] b) {v = Neg(x)  b = Add(x, v)}>}"""
    )
    feeds = [{"c": np.array(c), "x": np.float32([5, 6, 7])} for c in (True, False)]
    share_model(model)
    onnx.checker.check_model(ir.to_proto(model))
    assert [run(model, **f)[0].tolist() for f in feeds] == [[6, 8, 10], [0, 0, 0]]


def test_graph_inputs_and_outputs_stay():
    w = normal(64, 64)
    text = """(float[2,64] x, float[64,64] IN) => (float[2,64] y, float[64,64] OUT) {
        a = MatMul(x, IN)  b = MatMul(a, OUT)  c = MatMul(b, W)  y = MatMul(c, V)}"""
    model = build(text, IN=w, OUT=w, W=w, V=w)
    before = run(model, x=normal(2, 64, seed=1))
    result = share_model(model)
    assert names(model) == ["IN", "OUT", "W"]
    assert {(s.name, s.reason.split(", but ")[1]) for s in result.skipped} == {
        ("IN", "a graph input: a caller may replace it"),
        ("OUT", "a graph output"),
    }
    assert all(
        np.array_equal(a, b)
        for a, b in zip(before, run(model, x=normal(2, 64, seed=1)), strict=True)
    )


def test_sharing_lets_more_be_untangled():
    """Casts of two copies become two of one weight, and then one."""
    half = normal(64, 64, dtype=np.float16)
    model = build(
        """(float[2,64] x) => (float[2,64] y) {
        a = Cast<to=1>(A)  p = MatMul(x, a)  b = Cast<to=1>(B)  y = MatMul(p, b)}""",
        A=half,
        B=half,
    )
    share_model(model)
    assert names(model) == ["A"] and ops(model) == {"Cast": 1, "MatMul": 2}


def test_sharing_twice_changes_nothing():
    w = normal(64, 64)
    text = """(float[2,3,64] x) => (float[2,3,64] y, float[64,64] s) {
        t = Transpose(W)  a = MatMul(x, V)  b = Relu(a)  y = MatMul(a, U)  s = Relu(t)}"""
    model = build(text, W=w, V=w.T.copy(), U=w)
    product = model.graph.node("n3").inputs[0]
    product.shape, product.dtype = ir.Shape([2, 3, 64]), ir.DataType.FLOAT
    first = share_model(model)
    once = ir.to_proto(model).SerializeToString()
    again = share_model(ir.from_proto(onnx.load_from_string(once)))
    assert ir.to_proto(again.model).SerializeToString() == once
    assert again.bytes_before == again.bytes_after == first.bytes_after
    assert ir.to_proto(share_model(first.model).model).SerializeToString() == once


def test_large_tensors_are_compared_in_blocks(monkeypatch):
    monkeypatch.setattr("ffmerge.passes.graph.tensors.CHUNK", 1000)
    w = normal(64, 64)
    late = w.copy()
    late[40, 7] += 1  # neither end, not in the first block
    text = """() => (float[64,64] a, float[64,64] b, float[64,64] c) {
        a = Relu(A)  b = Relu(B)  c = Relu(C)}"""
    model = build(text, A=w, B=late, C=w)
    share_model(model)
    assert names(model) == ["A", "B"]


def test_a_collision_of_samples_is_not_an_equality(monkeypatch):
    monkeypatch.setattr("ffmerge.passes.graph.tensors.SAMPLES", 2)
    weights = [np.float32([1, middle, 3]) for middle in (2, 9, 5, 9, 5)]
    text = "() => (float[3] a, float[3] b, float[3] c, float[3] d, float[3] e) {"
    text += " ".join(f"{name.lower()} = Relu({name})" for name in "ABCDE") + "}"
    model = build(text, **dict(zip("ABCDE", weights, strict=True)))
    share_model(model)
    assert names(model) == ["A", "B", "C"]


def test_many_that_differ_late_are_told_apart(monkeypatch):
    monkeypatch.setattr("ffmerge.passes.graph.tensors.CHUNK", 1000)
    weights = []
    for place in (5, 9, 5, 3, 9, 9, 5):
        w = np.zeros((40, 60), np.float32)
        w[place, place + 1] = 1  # off the diagonal, which is sampled
        weights.append(w)
    weights[2], weights[5] = weights[2].T.copy(), weights[5].T.copy()
    tensors = [ir.tensor(w) for w in weights]
    found = [(c.first, c.identical, c.transposed) for c in find_copies(tensors)]
    assert found == [(0, [6], [2]), (1, [4], [5])]
