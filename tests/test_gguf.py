"""A GGUF file loads as the model that was packed, and becomes an ordinary checkpoint."""

import importlib.util
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ffmerge.errors import InputError
from ffmerge.models import checkpoint
from ffmerge.models.data import read
from ffmerge.models.source import resolve

_SIZES = {
    "vocab_size": 8, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 40,
}  # fmt: skip
_WORDS = ["<unk>", "<s>", "</s>", "▁one", "▁two", "▁three", "e", "n"]


@pytest.fixture
def llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**_SIZES, rms_norm_eps=1e-5)).eval()


def _turned(weight: np.ndarray, heads: int) -> np.ndarray:
    """Return query or key rows as llama.cpp stores them: halves of a head interleaved."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


def write(model: Any, file: Path, packed: bool = False) -> Path:
    """Write a Llama as llama.cpp does; ``packed`` stores the down projections in 8 bits."""
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_block_count(2)
    writer.add_context_length(40)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(8)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(_WORDS)
    writer.add_token_scores([float(-i) for i in range(8)])
    writer.add_token_types([2, 3, 3, 1, 1, 1, 1, 1])
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for name, parameter in model.state_dict().items():
        value = parameter.numpy()
        path = name.removesuffix(".weight")
        if path in whole:
            stored = whole[path]
        else:
            _, _, layer, part = path.split(".", 3)
            stored = f"blk.{layer}.{names[part]}"
            if part.endswith("q_proj"):
                value = _turned(value, 2)
            if part.endswith("k_proj"):
                value = _turned(value, 1)
        if packed and stored.endswith("ffn_down"):
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{stored}.weight", gguf.quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(f"{stored}.weight", np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.parametrize("packed", [False, True])
def test_a_gguf_file_gives_the_model_that_was_packed(
    llama: Any, packed: bool, tmp_path: Path
) -> None:
    file = write(llama, tmp_path / "model.gguf", packed)
    ids = torch.arange(8)[None]
    for source in (file, tmp_path):  # a path, and a folder with one such file
        found = checkpoint.load(source)
        assert found.dtype == torch.float32
        assert getattr(found, "hf_quantizer", None) is None
        assert type(found.model.layers[0].mlp.down_proj) is torch.nn.Linear
        bound = 2e-3 if packed else 1e-5  # eight bits; measured 5e-4 and 1e-7
        assert (found(ids).logits - llama(ids).logits).abs().max() < bound
    checkpoint.save(found, tmp_path / "plain", resolve(file))
    again = LlamaForCausalLM.from_pretrained(tmp_path / "plain").eval()
    assert torch.equal(again(ids).logits, found(ids).logits)
    assert not list((tmp_path / "plain").glob("*.gguf"))
    (tmp_path / "text.txt").write_text("one\nen\n")
    (batch,) = read(str(tmp_path / "text.txt"), tmp_path / "plain", "text-generation").batches(2)
    assert batch["attention_mask"].all()  # its tokenizer travels


def test_what_is_no_gguf_or_several_is_one_sentence(llama: Any, tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF nothing")
    with pytest.raises(InputError, match=r"bad\.gguf cannot be read as \.gguf") as caught:
        checkpoint.load(tmp_path / "bad.gguf")
    assert len(str(caught.value).splitlines()) == 1
    (tmp_path / "other.gguf").write_bytes(b"")
    with pytest.raises(InputError, match="holds 2"):
        checkpoint.load(tmp_path)


def test_without_gguf_the_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    without = lambda name, *more: None if name == "gguf" else found(name, *more)  # noqa: E731
    monkeypatch.setattr("ffmerge.models.gguf_file.find_spec", without)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match="pip install gguf"):
        checkpoint.load(tmp_path / "model.gguf")
