"""Whole models in fewer bits stay close and tied; what other tools make of some of them."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import tiny
import torch
from graphs import build, normal, ops, run
from lowered import LOWER, TWO, decoded, lower, relative
from onnxruntime.quantization import quantize_dynamic
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from transformers import (
    BertConfig,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    MixtralConfig,
    MixtralForCausalLM,
)

from ffmerge.config import ExportConfig, MergeConfig
from ffmerge.exporter.graphs import graphs
from ffmerge.exporter.package import export
from ffmerge.exporter.torch_onnx import to_onnx
from ffmerge.models import tasks
from ffmerge.passes.graph.audit import audit
from ffmerge.passes.graph.contract import read_ties
from ffmerge.passes.graph.read import read_model
from ffmerge.passes.graph.run import share_model
from ffmerge.passes.weights import precision
from ffmerge.passes.weights.merge import merge_
from ffmerge.runtime_tests.validate import validate


@pytest.mark.slow
def test_gpt2_whose_gemms_the_int4_quantizer_leaves_in_float():
    model = to_onnx(*graphs(tiny.gpt2(), "text-generation"), 20)[0].model
    gemms = ops(model)["Gemm"]
    theirs = MatMulNBitsQuantizer(ir.to_proto(model), block_size=32, is_symmetric=True)
    theirs.process()
    assert ops(ir.from_proto(theirs.model.model))["Gemm"] >= gemms - 1
    result = share_model(model, dtype="int4")
    assert (ops(result.model)["Gemm"], ops(result.model)["MatMulNBits"]) == (0, gemms)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_experts_have_a_scale_for_each_row(dtype: str, tmp_path: Path) -> None:
    """In float64: PyTorch's exporter writes a GatherND, and one row takes no other's digits."""
    config = MixtralConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=97, num_local_experts=4, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = MixtralForCausalLM(config).eval()
    experts = model.model.layers[0].mlp.experts
    with torch.no_grad():
        experts.gate_up_proj[:, 5] *= 1000
        experts.down_proj[2, 7] *= 1000
    package = export(model, tmp_path / "package", ExportConfig(dtype=dtype))
    graph = read_model(package.path / "model.onnx").graph
    for name in ("gate_up_proj", "down_proj"):
        weight = getattr(experts, name).detach().numpy().astype(np.float64)
        stored = graph.initializers[f"model.layers.0.mlp.experts.{name}"]
        scale = graph.initializers[f"model.layers.0.mlp.experts.{name}/scale"].const_value.numpy()
        assert {node.op_type for node in stored.consumers()} == {"Gather"}
        steps = np.abs(weight).max(-1, keepdims=True) / 127
        off = stored.const_value.numpy() * scale.astype(np.float64) - weight
        assert (np.abs(off) / steps).max() < 0.501  # measured 0.49998
    more = precision.bytes_of(model, dtype) / package.manifest.bytes_unique - 1
    assert abs(more) < 0.02  # measured 0.0022, 0.0025; was -0.6: the experts were float32
    if dtype == "int8":
        assert validate(package.path).ok


@pytest.mark.parametrize("tied", [True, False])
def test_a_weight_of_encoder_and_decoder_is_stored_once_in_int8(tied, tmp_path):
    """Rows in the one and blocks in the other were two copies, and no check saw it."""
    sizes = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1,
        "num_attention_heads": 4, "vocab_size": 97, "max_position_embeddings": 64,
    }  # fmt: skip
    config = EncoderDecoderConfig.from_encoder_decoder_configs(
        BertConfig(**sizes), BertConfig(**sizes, is_decoder=True, add_cross_attention=True)
    )
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 1, 0, 2
    model = EncoderDecoderModel(config).eval()
    if tied:
        encoder, decoder = model.encoder.encoder.layer[0], model.decoder.bert.encoder.layer[0]
        decoder.intermediate.dense.weight = encoder.intermediate.dense.weight
    manifest = export(model, tmp_path / "package", ExportConfig(dtype="int8")).manifest
    stored = [tensor.name for tensor in manifest.tensors]
    assert len(stored) == len(set(stored))
    assert manifest.int8["decoder_model.onnx"] == "blocks"
    assert manifest.int8["encoder_model.onnx"] == ("blocks" if tied else "rows")


def test_stock_export_that_quantize_dynamic_cannot_read(tmp_path):
    program = torch.onnx.export(
        tiny.vit(), (torch.zeros(1, 3, 16, 16),), dynamo=True, verbose=False, opset_version=20
    )
    program.save(tmp_path / "stock.onnx")
    with pytest.raises(Exception, match="ShapeInferenceError"):
        quantize_dynamic(tmp_path / "stock.onnx", tmp_path / "ort.onnx")
    x = normal(1, 3, 16, 16)
    expected = run(str(tmp_path / "stock.onnx"), pixel_values=x)[0]
    result = share_model(ir.load(tmp_path / "stock.onnx"), dtype="int8")
    assert relative(run(result.model, pixel_values=x)[0], expected) < 0.05  # measured 0.0093


@functools.cache
def exported(family):
    """Return the graph of a merged model as bytes, inputs, and what it computes."""
    model = family()
    merge_(model, None, MergeConfig(window=(1, 3), method="average"))
    (plan,) = graphs(model, tasks.base(tasks.infer(model)))
    graph = to_onnx(plan, 20)[0].model
    feeds = plan.probe.draw(1)
    return ir.to_proto(graph).SerializeToString(), feeds, run(graph, **feeds)[0].ravel()


@pytest.mark.parametrize("precision", [*LOWER, "fp16"])
def test_families_are_whole_and_close(family, precision, tmp_path):
    proto, feeds, expected = exported(family)
    model = ir.from_proto(onnx.ModelProto.FromString(proto))
    before = read_ties(model)
    result = lower(model, precision, feeds)
    assert len(before) >= 4 and result.ties == before
    ir.save(result.model, tmp_path / "m.onnx")
    assert audit(tmp_path / "m.onnx").ok
    listed = {skip.name for skip in result.skipped}
    for node in ir.traversal.RecursiveGraphIterator(result.model.graph):
        if node.op_type in ("MatMul", "Gemm", "Conv", "Gather"):
            for value in node.inputs[: 1 if node.op_type == "Gather" else 2]:
                if value.const_value is not None and value.const_value.dtype == ir.DataType.FLOAT:
                    known = value.name in listed or value.name == "hadamard"
                    assert known or value.name.endswith("/scale")
    got = run(result.model, **feeds)[0].ravel()
    if precision in ("int4", "q4f16"):  # what float32 computes with the values that are stored
        expected = run(
            decoded(ir.from_proto(onnx.ModelProto.FromString(proto)), result.model), **feeds
        )[0].ravel()
    cosine = got @ expected / np.linalg.norm(got) / np.linalg.norm(expected)
    # measured from 0.9999988 in fp16, 0.9996 by blocks, and 0.9994 in other 8 bits, on x86 without
    # VNNI, where codes that it saturates gave 0.924
    bounds = {"fp16": 0.99999, "int8-dynamic": 0.995, "int8-static": 0.995}
    assert cosine > bounds.get(precision, 0.997)


SEEDED = """
import hashlib, sys
sys.path.insert(0, "tests")
import onnx_ir as ir
from graphs import build, normal
from lowered import GEMMS, LOWER, lower
for precision in [*LOWER, "fp16"]:
    model = build(GEMMS, W=normal(64, 64), c=normal(64))
    model = lower(model, precision, {"x": normal(5, 64)}).model
    print(hashlib.sha256(ir.to_proto(model).SerializeToString()).hexdigest())
"""


@pytest.mark.slow
def test_result_does_not_depend_on_the_hash_seed():
    outputs = {
        subprocess.run(
            [sys.executable, "-c", SEEDED], env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True,
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(outputs) == 1


@pytest.mark.parametrize("dtype", ["fp16", "int8", "int4", "q4f16"])
def test_package_of_a_lower_dtype_validates(dtype, tmp_path):
    model = tiny.vit(128, 512)
    merge_(model, None, MergeConfig(window=(1, 4), method="average"))
    package = export(model, tmp_path / "out", ExportConfig(dtype=dtype))
    assert package.manifest.dtype == dtype
    assert validate(package.path).ok
    assert audit(package.path).ok
    per_weight = {"fp16": 2.0, "int8": 1.0, "int4": 0.5 + 4 / 32, "q4f16": 0.5 + 2 / 32}[dtype]
    assert package.manifest.bytes_unique < 1.1 * per_weight * package.manifest.parameters


def test_share_command_takes_a_dtype(tmp_path):
    ir.save(build(TWO, W=normal(64, 64)), tmp_path / "in.onnx")
    command = [sys.executable, "-m", "ffmerge", "share", "in.onnx"]

    def call(*more):
        return subprocess.run([*command, *more], cwd=tmp_path, capture_output=True, text=True)

    done = call("out.onnx", "--dtype", "int4", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["bytes_unique"] == 64 * 32 + 64 * 2 * 4
    assert call("other.onnx", "--dtype", "int5").returncode == 2
    np.savez(tmp_path / "rows.npz", x=normal(5, 64))
    done = call("static.onnx", "--dtype", "int8-static", "--data", "rows.npz", "--json")
    assert done.returncode == 0, done.stderr
    assert ops(ir.load(tmp_path / "static.onnx"))["QuantizeLinear"] == 2
