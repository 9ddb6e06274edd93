"""Equal bytes are one place in the data file, and every reader reads them."""

import os
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphs import build, normal, run
from onnx import helper

from ffmerge.errors import InputError
from ffmerge.passes.graph import write
from ffmerge.passes.graph.read import read_model
from ffmerge.passes.graph.tensors import rewritten, values_of
from ffmerge.passes.graph.write import write_models

W = normal(64, 48)
TWO = """(float[2,64] x) => (float[2,48] y, float[48,64] z) {
    y = MatMul(x, A)  z = Relu(B)}"""


def places(path: Path) -> dict[str, tuple[int, int]]:
    """Return offset and length of each external initializer."""
    found = {}
    for tensor in onnx.load(path, load_external_data=False).graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if entries:
            found[tensor.name] = (int(entries["offset"]), int(entries["length"]))
    return found


def test_two_names_and_shapes_at_one_place(tmp_path):
    """The same bytes as [64, 48] and as [48, 64]: onnx, onnx_ir and ONNX Runtime read both."""
    path = tmp_path / "m.onnx"
    write_models({path: build(TWO, A=W, B=W.reshape(48, 64))}, tmp_path / "d")
    assert places(path) == {"A": (0, W.nbytes), "B": (0, W.nbytes)}
    assert (tmp_path / "d").read_bytes() == W.tobytes()
    onnx.checker.check_model(str(path))
    for tensor in onnx.load(path).graph.initializer:
        shape = (64, 48) if tensor.name == "A" else (48, 64)
        assert np.array_equal(onnx.numpy_helper.to_array(tensor), W.reshape(shape))
    for model in (ir.load(path), read_model(path)):
        initializers = model.graph.initializers
        assert np.array_equal(initializers["A"].const_value.numpy(), W)
        assert np.array_equal(initializers["B"].const_value.numpy(), W.reshape(48, 64))
    x = normal(2, 64, seed=1)
    y, z = run(str(path), x=x)
    assert np.allclose(y, x @ W, rtol=1e-6, atol=1e-5)  # measured 0
    assert np.array_equal(z, np.maximum(W, 0).reshape(48, 64))


def test_graphs_of_one_package_share_the_file(tmp_path):
    """A tensor of another type with the same bytes too; one that differs late has its own."""
    late = W.copy()
    late[-2, 7] += 1
    text = "(float[2,64] x) => (float[2,48] y, int32[64,48] b) {y = MatMul(x, A) b = Neg(I)}"
    models = {
        tmp_path / "one.onnx": build(TWO, A=W, B=W.T.copy()),
        tmp_path / "two.onnx": build(text, A=late, I=W.view(np.int32)),
    }
    written = write_models(models, tmp_path / "d")
    assert written == (tmp_path / "one.onnx", tmp_path / "two.onnx", tmp_path / "d")
    assert (tmp_path / "d").stat().st_size == 3 * W.nbytes
    assert places(tmp_path / "two.onnx")["I"] == places(tmp_path / "one.onnx")["A"]
    x = normal(2, 64, seed=1)
    assert np.array_equal(run(str(tmp_path / "two.onnx"), x=x)[1], -W.view(np.int32))
    (y, _) = run(str(tmp_path / "two.onnx"), x=x)
    assert np.allclose(y, x @ late, rtol=1e-6, atol=1e-5)  # measured 0


def test_a_collision_of_samples_is_not_an_equality(tmp_path, monkeypatch):
    monkeypatch.setattr(write, "_sample", lambda array: b"same")
    late = W.copy()
    late[-2, 7] += 1
    write_models({tmp_path / "m.onnx": build(TWO, A=W, B=late.reshape(48, 64))}, tmp_path / "d")
    assert (tmp_path / "d").read_bytes() == W.tobytes() + late.tobytes()


@pytest.mark.parametrize("broken", [None, OSError(18, "Invalid cross-device link"), 0])
def test_unchanged_tensors_are_copied_by_the_kernel_or_written(tmp_path, monkeypatch, broken):
    write_models({tmp_path / "m.onnx": build(TWO, A=W, B=W.T.copy())}, tmp_path / "d")
    kernel, calls = os.copy_file_range, []

    def copy(*arguments):
        calls.append(arguments)
        if isinstance(broken, OSError):
            raise broken
        return (
            kernel(*arguments[:2], min(arguments[2], 5000), *arguments[3:]) if broken is None else 0
        )

    monkeypatch.setattr(os, "copy_file_range", copy)
    write_models({tmp_path / "n.onnx": read_model(tmp_path / "m.onnx")}, tmp_path / "e")
    assert (tmp_path / "e").read_bytes() == W.tobytes() + W.T.tobytes()
    # 12,288 bytes, at most 5,000 at a time, and a last call that finds nothing left
    assert len(calls) == (2 if broken is not None else 8)


@pytest.mark.parametrize("dtype", ["INT4", "UINT4", "FLOAT8E4M3FN", "BFLOAT16", "BOOL", "FLOAT16"])
def test_every_width_keeps_its_bytes(tmp_path, dtype):
    kind = getattr(onnx.TensorProto, dtype)
    raw = normal(1001, 4).astype(np.float32) > 0
    one = helper.make_tensor("", kind, raw.shape, raw.astype(np.float32).reshape(-1))
    model = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 21}), ir_version=10)
    for name in "AB":
        tensor = ir.serde.deserialize_tensor(one)
        tensor.name = name
        model.graph.register_initializer(ir.Value(name=name, const_value=tensor))
    write_models({tmp_path / "m.onnx": model}, tmp_path / "d")
    before = ir.serde.deserialize_tensor(one)
    assert (tmp_path / "d").read_bytes() == before.tobytes()
    loaded = ir.load(tmp_path / "m.onnx").graph.initializers
    for name in "AB":
        assert np.array_equal(loaded[name].const_value.numpy(), before.numpy())


def test_large_tensors_start_a_page_and_small_ones_stay_in_the_graph(tmp_path):
    text = "() => (float[300,1000] a, float[99] b, float[9] c, float[300,1000] d) {"
    text += "a = Relu(A) b = Relu(B) c = Relu(C) d = Relu(D)}"
    weights = {
        "B": normal(99),
        "A": normal(300, 1000),
        "C": normal(9),
        "D": normal(300, 1000, seed=1),
    }
    write_models({tmp_path / "m.onnx": build(text, **weights)}, tmp_path / "d")
    found = places(tmp_path / "m.onnx")
    assert set(found) == {"A", "B", "D"} and all(found[n][0] % 4096 == 0 for n in "AD")
    for value, name in zip(run(str(tmp_path / "m.onnx")), "ABCD", strict=True):
        assert np.array_equal(value, np.maximum(weights[name], 0))


def test_lazy_tensors_are_computed_once_and_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("ffmerge.passes.graph.tensors.CHUNK", 1000)
    calls = []

    def turn(values):
        calls.append(1)
        return values.T

    model = build(TWO, A=W, B=W.reshape(48, 64))
    value = model.graph.initializers["B"]
    value.const_value = rewritten(ir.tensor(W, name="B"), turn, ir.DataType.FLOAT, (48, 64))
    lazy = value.const_value
    write_models({tmp_path / "m.onnx": model}, tmp_path / "d")
    assert (tmp_path / "d").read_bytes() == W.tobytes() + W.T.tobytes()
    assert len(calls) == 1 and value.const_value is lazy  # the model is what it was


def test_an_external_constant_in_a_function_is_embedded(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "data").write_bytes(W.tobytes())
    constant = helper.make_node("Constant", [], ["c"], value=onnx.numpy_helper.from_array(W, "c"))
    tensor = constant.attribute[0].t
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="data")
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("f", 1)]
    body = [constant, helper.make_node("MatMul", ["x", "c"], ["y"])]
    function = helper.make_function("f", "F", ["x"], ["y"], body, opsets[:1])
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("F", ["x"], ["y"], domain="f")], "g",
        [value("x", 1, [2, 64])], [value("y", 1, [2, 48])],
    )  # fmt: skip
    proto = helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=10)
    (tmp_path / "in" / "m.onnx").write_bytes(proto.SerializeToString())
    write_models({tmp_path / "m.onnx": read_model(tmp_path / "in" / "m.onnx")}, tmp_path / "d")
    x = normal(2, 64, seed=1)
    (y,) = run(str(tmp_path / "m.onnx"), x=x)
    assert np.allclose(y, x @ W, rtol=1e-6, atol=1e-5)  # measured 0


def test_one_file_of_more_than_two_gigabytes_is_refused(tmp_path):
    model = build(TWO, A=W, B=W.reshape(48, 64))

    def never():
        raise AssertionError("computed before the refusal")

    shape = ir.Shape((1 << 15, 1 << 14))
    model.graph.initializers["B"].const_value = ir.LazyTensor(never, ir.DataType.FLOAT, shape)
    with pytest.raises(InputError, match="larger than 2 GB"):
        write_models({tmp_path / "m.onnx": model})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("failing", ["one.onnx", "two.onnx", "d"])
def test_a_failure_leaves_nothing(tmp_path, monkeypatch, failing):
    replace = os.replace

    def full(one, other):
        if Path(other).name == failing:
            raise OSError(28, "No space left on device")
        replace(one, other)

    monkeypatch.setattr(write.os, "replace", full)
    models = {tmp_path / n: build(TWO, A=W, B=W.T.copy()) for n in ("one.onnx", "two.onnx")}
    with pytest.raises(InputError, match="No space left on device"):
        write_models(models, tmp_path / "d")
    assert not list(tmp_path.iterdir())
    (tmp_path / "d").write_bytes(b"mine")
    with pytest.raises(InputError, match="exists already"):
        write_models(models, tmp_path / "d")
    with pytest.raises(InputError, match="not in one folder"):
        write_models(models, tmp_path / "sub" / "d")
    assert (tmp_path / "d").read_bytes() == b"mine"


def test_a_graph_never_stands_without_its_data(tmp_path, monkeypatch):
    replace, order = os.replace, []
    monkeypatch.setattr(write.os, "replace", lambda a, b: (order.append(b.name), replace(a, b)))
    models = {tmp_path / n: build(TWO, A=W, B=W.T.copy()) for n in ("one.onnx", "two.onnx")}
    write_models(models, tmp_path / "d")
    assert order[0] == "d" and set(order) == {"d", "one.onnx", "two.onnx"}


def test_the_computed_values_are_those_of_the_source(tmp_path):
    """A transposed external weight is a view of the mapped file until it is written."""
    path = tmp_path / "m.onnx"
    write_models({path: build(TWO, A=W, B=W.T.copy())}, tmp_path / "d")
    tensor = read_model(path).graph.initializers["A"].const_value
    turned = rewritten(tensor, np.transpose, tensor.dtype, (48, 64))
    assert not values_of(turned).flags.owndata and np.array_equal(values_of(turned), W.T)
