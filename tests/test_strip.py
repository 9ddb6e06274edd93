"""Nothing in the written file tells where the model was made; what people wrote stays."""

import numpy as np
import onnx_ir as ir
from graphs import build, normal, run
from onnx import load_from_string
from onnxruntime.quantization import quantize_dynamic

from ffmerge.passes.graph.run import share_file, share_model
from ffmerge.passes.graph.strip import strip

SECRET = "/home/someone/model.py"
TRACE = f'File "{SECRET}", line 1, in forward'


def described():
    model = build(
        """(bool c, float[2,4] x) => (float[2,4] y) {
        z = MatMul(x, W)
        y = If(c) <then_branch = yes () => (float[2,4] a) {a = Relu(z)},
                   else_branch = no () => (float[2,4] b) {b = Neg(z)}>}""",
        W=normal(4, 4),
    )
    model.metadata_props.update({"ffmerge.ties": "[]", "labels": "cat", "pkg.torch.path": SECRET})
    model.producer_name, model.producer_version = "pytorch", "2.13"
    for graph in model.graphs():
        items = [graph, *graph, *graph.inputs, *graph.initializers.values()]
        for item in [*items, *(output for node in graph for output in node.outputs)]:
            item.metadata_props["pkg.torch.onnx.stack_trace"] = SECRET
            item.metadata_props["namespace"] = ": model/layers.0"
            item.metadata_props["unit"] = "m"
            item.doc_string = TRACE
    model.graph.doc_string = "Tells cats from dogs."
    return model


def test_what_exporters_wrote_for_themselves_goes_and_all_else_stays():
    model = described()
    feeds = {"c": np.array(True), "x": normal(2, 4, seed=1)}
    before = run(model, **feeds)
    assert SECRET.encode() in ir.to_proto(model).SerializeToString()
    strip(model)
    written = ir.to_proto(model).SerializeToString()
    assert SECRET.encode() not in written and b"namespace" not in written
    assert model.graph.doc_string == "Tells cats from dogs."
    assert all(item.metadata_props == {"unit": "m"} for item in (model.graph, *model.graph))
    assert model.metadata_props == {"ffmerge.ties": "[]", "labels": "cat"}
    assert (model.producer_name, model.producer_version) == ("ffmerge", None)
    assert np.array_equal(before, run(model, **feeds))
    strip(model)
    assert ir.to_proto(model).SerializeToString() == written


def test_initializers_have_no_value_info_but_outputs_keep_their_types():
    model = build(
        "(float[2,4] x) => (float[2,4] y, float[4,4] V) {z = MatMul(x, W) y = MatMul(z, V)}",
        W=normal(4, 4),
        V=normal(4, 4, seed=1),
    )
    share_model(model)
    proto = load_from_string(ir.to_proto(model).SerializeToString())
    assert "W" not in [info.name for info in proto.graph.value_info]
    assert [d.dim_value for d in proto.graph.output[1].type.tensor_type.shape.dim] == [4, 4]


def test_a_folded_weight_can_be_quantized(tmp_path):
    """With the exporter's value_info of the raw weight quantize_dynamic's inference fails."""
    model = build(
        "(float[2,64] x) => (float[2,10] y) {z = Relu(x) y = Gemm<transB=1>(z, W, b)}",
        W=normal(10, 64),
        b=normal(10),
    )
    ir.save(model, tmp_path / "in.onnx")
    share_file(tmp_path / "in.onnx", tmp_path / "out.onnx")
    feed = normal(2, 64, seed=1)
    quantize_dynamic(tmp_path / "out.onnx", tmp_path / "int8.onnx")
    before, after = (run(str(tmp_path / n), x=feed)[0] for n in ("in.onnx", "int8.onnx"))
    assert np.abs(before - after).max() < 0.05 * np.abs(before).max()  # seen: 0.0098
