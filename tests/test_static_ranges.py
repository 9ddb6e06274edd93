"""Static int8 takes its ranges from rows of data, which are checked first."""

import numpy as np
import onnx_ir as ir
import pytest
from graphs import build, normal, ops, run
from lowered import GEMMS, TWO, array, relative

from ffmerge.config import QuantizeConfig, ShareConfig
from ffmerge.errors import InputError
from ffmerge.passes.graph.calibration import Seen
from ffmerge.passes.graph.run import share_file, share_model


def test_static_ranges_are_those_of_the_calibration_batches():
    weight = normal(64, 64)
    batches = [{"x": normal(5, 64, seed=s)} for s in (1, 2)]
    config = QuantizeConfig(calibration=batches)
    result = share_model(build(GEMMS, W=weight, c=normal(64, seed=1)), (), "int8-static", config)
    every = np.stack([batch["x"] for batch in batches])
    step = (every.max() - every.min()) / 255
    assert np.isclose(array(result.model, "x/scale"), step, rtol=1e-6)
    assert array(result.model, "x/zero") == np.rint(-every.min() / step)
    reads = [n.inputs[0].name for n in result.model.graph if n.op_type == "DequantizeLinear"]
    assert reads.count("W") == 1 and len(reads) == 3  # W, and what two products read
    assert [skip.name for skip in result.skipped] == ["c", "c"]
    with pytest.raises(InputError, match="calibration"):
        share_model(build(TWO, W=weight), dtype="int8-static")


FOUR = """(float[n,64] x, float[n,64] z) => (float[n,64] y, float[n,n] s, float[n,64] r) {
    y = MatMul(x, W) t = Transpose(x) u = Relu(z) s = MatMul(u, t) r = MatMul(z, W) }"""


def test_what_8_bits_lose_is_read_in_float32_and_what_reads_it_too():
    """One of 5,120 elements is a thousand times the others: by hand, what 8 bits lose."""
    weight, x, z = normal(64, 64), normal(80, 64, seed=1), normal(80, 64, seed=2)
    x[3, 5] = 1000
    exact = x.astype(np.float64)
    step = (exact.max() - exact.min()) / 255
    lost = np.sqrt(np.mean(np.square(np.rint(exact / step) * step - exact)) / np.mean(exact**2))
    assert lost == pytest.approx(
        float(Seen().joined(x[:4]).joined(x[4:]).lost(8)), rel=0.3
    )  # measured 0.24
    model = build(FOUR, W=weight)
    config = QuantizeConfig(calibration=[{"x": x[:4], "z": z[:4]}, {"x": x[4:], "z": z[4:]}])
    result = share_model(model, (), "int8-static", config)
    left = {skip.name: skip.reason for skip in result.skipped}
    assert set(left) == {"x", "t"} and left["x"].startswith("float32: in 8 bits it is 8")
    codes = {n.inputs[0].name for n in result.model.graph if n.op_type == "QuantizeLinear"}
    assert codes == {"z"}  # u would be, but the other factor of its product is not
    y, s, r = run(result.model, x=x, z=z)
    assert relative(y, x @ weight) < 0.02  # measured 0.0065: its weight has 8 bits
    assert relative(s, np.maximum(z, 0) @ x.T) < 1e-5  # measured 0
    assert relative(r, z @ weight) < 0.03  # measured 0.014


def test_16_bits_are_read_and_given():
    """For an NPU, whose products have nothing else."""
    batch = {"x": normal(10, 64, seed=1)}
    config = QuantizeConfig(calibration=[batch], activations=16)
    model = build(TWO, W=normal(64, 64))
    model.opset_imports[""] = 21
    graph = share_model(model, (), "int8-static", config).model.graph
    codes = {node.inputs[0].name for node in graph if node.op_type == "QuantizeLinear"}
    assert codes == {"x", "h", "t"}  # nothing reads y


@pytest.mark.parametrize("batch", ["n", "4"])
def test_share_takes_static_ranges_from_rows(batch, tmp_path):
    """As many rows at a time as the graph takes; ten rows leave two of a fixed four over."""
    text = TWO.replace("[n,64]", f"[{batch},64]")
    ir.save(build(text, W=normal(64, 64)), tmp_path / "in.onnx")
    x = normal(10, 64, seed=2)
    x[:8] = np.clip(x[:8], -2, 2)
    np.savez(tmp_path / "rows.npz", x=x, unused=np.zeros(10))
    config = ShareConfig(dtype="int8-static", data=tmp_path / "rows.npz")
    result = share_file(tmp_path / "in.onnx", tmp_path / "out.onnx", config)
    seen = x if batch == "n" else x[:8]
    step = (seen.max() - seen.min()) / 255
    assert np.isclose(array(result.model, "x/scale"), step, rtol=1e-6)
    assert ops(result.model)["QuantizeLinear"] == 2  # what two products read
    got, expected = (run(str(tmp_path / f), x=seen[:4])[0] for f in ("out.onnx", "in.onnx"))
    assert relative(got, expected) < 0.03  # measured 0.014


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"y": normal(4, 64)}, "has no input 'x' of the graph"),
        ({"x": normal(4, 63)}, "the calibration data does not fit the model"),
        ({"x": normal(3, 64)}, "has 3 rows, the graph takes 4 at a time"),
        ({"x": normal(4, 64), "z": normal(5)}, "must have one common length"),
    ],
)
def test_calibration_data_that_does_not_fit_is_told(arrays, reason, tmp_path):
    text = TWO.replace("float[n,64] x", "float[4,64] x")
    ir.save(build(text, W=normal(64, 64)), tmp_path / "in.onnx")
    np.savez(tmp_path / "rows.npz", **arrays)
    config = ShareConfig(dtype="int8-static", data=tmp_path / "rows.npz")
    with pytest.raises(InputError, match=reason) as caught:
        share_file(tmp_path / "in.onnx", tmp_path / "out.onnx", config)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.onnx").exists()


def test_static_int8_without_data_is_refused_at_once(tmp_path):
    with pytest.raises(InputError, match="give --data"):
        share_file(tmp_path / "none.onnx", tmp_path / "out.onnx", ShareConfig(dtype="int8-static"))
    config = ShareConfig(dtype="int8-static", data=tmp_path / "rows.txt")
    ir.save(build(TWO, W=normal(64, 64)), tmp_path / "in.onnx")
    with pytest.raises(InputError, match="is not an"):
        share_file(tmp_path / "in.onnx", tmp_path / "out.onnx", config)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_calibration_that_is_not_finite_is_refused(value: float) -> None:
    """Min and max pass over NaN: the range would be that of all other rows."""
    rows = normal(5, 64)
    rows[3, 2] = value
    config = QuantizeConfig(calibration=({"x": normal(5, 64)}, {"x": rows}))
    with pytest.raises(InputError, match="the calibration data is not finite: x holds"):
        share_model(build(TWO, W=normal(64, 64)), (), "int8-static", config)


def test_what_a_weight_makes_infinite_is_not_quantized() -> None:
    """Its scale would be infinite, and all that is read of it no number."""
    text = "(float[n,64] x) => (float[n,64] y) { h = MatMul(x, W) z = Add(h, c) y = MatMul(z, V) }"
    bias = np.zeros(64, np.float32)
    bias[5] = np.inf
    model = build(text, W=normal(64, 64), V=normal(64, 64, seed=1), c=bias)
    config = QuantizeConfig(calibration=({"x": normal(5, 64)},))
    result = share_model(model, (), "int8-static", config)
    left = {skip.name: skip.reason for skip in result.skipped}
    assert left == {"z": "float32: on the data it is not finite"}
    lowered = result.model
    scales = [v for name, v in lowered.graph.initializers.items() if name.endswith("/scale")]
    assert scales and all(np.isfinite(v.const_value.numpy()).all() for v in scales)
