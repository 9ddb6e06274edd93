"""What a float32 model computes in bfloat16 is computed, on runtimes without kernels of it."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import torch
from torch import Tensor, nn
from transformers import FalconConfig, FalconForCausalLM

from ffmerge.exporter.bfloat16 import compute_in_float32
from ffmerge.exporter.package import export
from ffmerge.runtime_tests.parity import check_parity


class _Part(nn.Module):
    """Products, sums, moves and a comparison of numbers of 16 bits."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        narrow = x.bfloat16()
        scale = torch.full((4,), 0.3, dtype=torch.bfloat16)
        mixed = torch.cat([(narrow * scale).reshape(-1, 2), narrow.reshape(-1, 2) / 3], -1)
        return (mixed + 1).float(), mixed > 0.1


def test_every_rounding_is_pytorchs(tmp_path: Path) -> None:
    x = torch.tensor(np.random.default_rng(0).standard_normal((3, 4)), dtype=torch.float32)
    program = torch.onnx.export(
        _Part().eval(), (x,), dynamo=True, optimize=False, verbose=False, opset_version=20
    )
    assert program is not None
    model = program.model
    compute_in_float32(model)
    onnx.save(ir.to_proto(model), tmp_path / "model.onnx")
    session = ort.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    for got, expected in zip(found, _Part()(x), strict=True):
        np.testing.assert_array_equal(got, expected.numpy())


def test_falcon_with_position_biases_is_exported(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = FalconConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True,
        new_decoder_architecture=False, multi_query=False, parallel_attn=False, bias=True,
    )  # fmt: skip
    package = export(FalconForCausalLM(config).eval(), tmp_path / "package")
    outputs = check_parity(package.path, package.manifest)
    assert outputs and all(output.ok for output in outputs)
