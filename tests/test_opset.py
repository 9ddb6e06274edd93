"""Another opset: the same results and the same weights, or a refusal that says why."""

import json

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphs import build, normal, run
from tiny import vit

import ffmerge.__main__ as command_line
from ffmerge.config import ExportConfig, MergeConfig, ShareConfig
from ffmerge.errors import InputError
from ffmerge.exporter.package import export
from ffmerge.passes.graph import opset as converting
from ffmerge.passes.graph.audit import audit
from ffmerge.passes.graph.opset import to_opset
from ffmerge.passes.graph.run import share_file
from ffmerge.passes.weights.merge import merge_

TEXT = """(float[2,64] x) => (float[2,64] y) {
    a = MatMul(x, W)  b = Relu(a)  c = MatMul(b, V)  axes = Constant<value_ints=[1]>()
    m = ReduceMean(c, axes)  y = Add(c, m)}"""
GELU = "(float[4] x) => (float[4] z) {y = Mish(x) z = Gelu(y)}"
SPLIT = "(float[4] x) => (float[2] p, float[2] q) {p, q = Split<axis=0, num_outputs=2>(x)}"


@pytest.mark.parametrize("target", [15, 17, 18, 21, 24])
def test_a_file_goes_to_another_opset(tmp_path, target):
    w = normal(64, 64)
    model = build(TEXT, W=w, V=w)
    model.metadata_props["labels"] = "kept"
    ir.save(model, tmp_path / "in.onnx", external_data="d")
    share_file(tmp_path / "in.onnx", tmp_path / "out.onnx", ShareConfig(opset=target))
    after = onnx.load(tmp_path / "out.onnx")
    assert [o.version for o in after.opset_import] == [target]
    assert {p.key: p.value for p in after.metadata_props} == {"labels": "kept"}
    onnx.checker.check_model(str(tmp_path / "out.onnx"), full_check=True)
    assert [t.name for t in after.graph.initializer if t.dims == [64, 64]] == ["W"]
    assert (tmp_path / "out.onnx_data").stat().st_size == w.nbytes
    x = normal(2, 64, seed=1)
    before = run(str(tmp_path / "in.onnx"), x=x)
    for one, other in zip(before, run(str(tmp_path / "out.onnx"), x=x), strict=True):
        assert np.abs(one - other).max() < 1e-6 * np.abs(one).max()  # measured 0


def test_weights_are_not_read(monkeypatch):
    model = build(TEXT, W=normal(64, 64), V=normal(64, 64))

    def never():
        raise AssertionError("read")

    lazy = ir.LazyTensor(never, ir.DataType.FLOAT, ir.Shape((64, 64)), name="W")
    model.graph.initializers["W"].const_value = lazy
    assert to_opset(model, 17).graph.initializers["W"].const_value is lazy
    assert model.graph.initializers["W"].const_value is lazy


@pytest.mark.parametrize(
    ("text", "target", "reason"),
    [
        (GELU, 17, "^opset 17 has no Gelu, which came with opset 20: give that or a later one.$"),
        (SPLIT, 17, "^the model has no form in opset 17: No Adapter From Version 18 for Split.$"),
        (TEXT, 99, "is not one of 7 to"),
        (TEXT, 3, "is not one of 7 to"),
    ],
)
def test_what_cannot_be_converted_is_refused(tmp_path, text, target, reason):
    weights = {n: normal(64, 64) for n in "WV" if n in text}
    ir.save(build(text, **weights), tmp_path / "in.onnx")
    with pytest.raises(InputError, match=reason) as caught:
        share_file(tmp_path / "in.onnx", tmp_path / "out.onnx", ShareConfig(opset=target))
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["in.onnx"]


def test_what_the_converter_leaves_wrong_is_refused(monkeypatch):
    """A converter that only changes the number: Split has no num_outputs at 17."""

    def number(proto, target):
        proto.opset_import[0].version = target
        return proto

    monkeypatch.setattr(converting.onnx.version_converter, "convert_version", number)
    with pytest.raises(InputError, match=r"Split node n0 has \['num_outputs'\]"):
        to_opset(build(SPLIT), 17)


def test_a_package_below_what_pytorch_writes(tmp_path):
    model = vit(64, 256)
    images = {"pixel_values": normal(4, 3, 16, 16)}
    merge_(model, images, MergeConfig(window=(1, 4), method="permute"))
    package = export(model, tmp_path / "p", ExportConfig(opset=17))
    assert package.manifest.opset == 17 and audit(package.path).ok
    tied = json.loads(ir.load(tmp_path / "p" / "model.onnx").metadata_props["ffmerge.ties"])
    assert [tie["name"] for tie in tied] == [tie.name for tie in package.manifest.ties] != []
    import torch

    with torch.no_grad():
        expected = model(torch.from_numpy(images["pixel_values"])).logits.numpy()
    (got,) = run(str(tmp_path / "p" / "model.onnx"), **images)
    assert np.abs(got - expected).max() < 4e-6  # measured 4.0e-7
    with pytest.raises(InputError, match=r"^opset 13 has no LayerNormalization, .* opset 17"):
        export(model, tmp_path / "q", ExportConfig(opset=13))
    assert not (tmp_path / "q").exists()


def test_the_command_line(tmp_path, monkeypatch, capsys):
    ir.save(build(TEXT, W=normal(64, 64), V=normal(64, 64)), tmp_path / "in.onnx")
    for target, code in (("17", 0), ("3", 2)):
        line = ["share", str(tmp_path / "in.onnx"), str(tmp_path / f"{target}.onnx")]
        monkeypatch.setattr("sys.argv", ["ffmerge", *line, "--opset", target])
        with pytest.raises(SystemExit) as ended:
            command_line.main()
        assert (ended.value.code or 0) == code
    assert capsys.readouterr().err.startswith("ffmerge: opset 3 is not one of")
    assert ir.load(tmp_path / "17.onnx").opset_imports[""] == 17
    assert not (tmp_path / "3.onnx").exists()
