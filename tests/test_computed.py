"""A weight that PyTorch computes from others in every pass is one weight in a package."""

from pathlib import Path
from typing import Any

import onnx
import onnx.numpy_helper
import pytest
import torch
from tiny_wider import seeded

import ffmerge
from ffmerge.config import ExportConfig
from ffmerge.exporter.package import export
from ffmerge.passes.weights import precision


def _wav2vec2() -> Any:
    """With positions from a convolution of a weight norm: most of what such a small one weighs."""
    return seeded(
        "Wav2Vec2Model", "Wav2Vec2Config", hidden_size=64, num_hidden_layers=1, vocab_size=40,
        num_attention_heads=2, intermediate_size=96, conv_dim=(32, 32), conv_stride=(5, 2),
        conv_kernel=(10, 3), num_feat_extract_layers=2, num_conv_pos_embeddings=32,
        num_conv_pos_embedding_groups=4,
    )  # fmt: skip


def test_a_weight_norm_is_not_computed_in_every_run(tmp_path: Path) -> None:
    model, sound = _wav2vec2(), torch.randn(2, 400)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        expected = model(sound)[0]
    export(model, tmp_path / "p")
    graph = onnx.load(tmp_path / "p" / "model.onnx").graph
    assert not any(node.op_type.startswith("Reduce") for node in graph.node)
    stored = {each.name: each for each in graph.initializer}
    weight = model.encoder.pos_conv_embed.conv.weight.detach().numpy()
    written = onnx.numpy_helper.to_array(stored["encoder.pos_conv_embed.conv.weight"])
    assert (written == weight).all()
    assert ffmerge.validate(tmp_path / "p").ok and ffmerge.audit(tmp_path / "p").ok
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    with torch.no_grad():
        assert torch.equal(model(sound)[0], expected)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_it_is_in_fewer_bits_as_foretold(dtype: str, tmp_path: Path) -> None:
    model, sound = _wav2vec2(), torch.randn(8, 400)
    made = export(model, tmp_path / "p", ExportConfig(dtype=dtype)).manifest
    more = precision.bytes_of(model, dtype) / made.bytes_unique - 1
    assert abs(more) < 0.03  # measured -0.013, 0.0006; -0.55 and -0.59 before
    found = ffmerge.load_package(tmp_path / "p")(input_values=sound)[0]
    with torch.no_grad():
        plain = model(sound)[0]
        with precision.rounded(model, dtype):
            rounded = model(sound)[0]
    off = (found - rounded).norm(dim=-1) / (found - plain).norm(dim=-1)
    assert float(off.median()) < 1e-3  # measured 2.2e-5, 3.3e-6; 0.17 and 0.026 before
