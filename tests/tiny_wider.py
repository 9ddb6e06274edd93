"""Tiny seeded models with gated sublayers, and with an encoder and a decoder."""

from collections.abc import Callable
from typing import Any

import torch
import transformers

_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
_TOKENS = {"vocab_size": 61, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
_SEQ2SEQ = {
    "d_model": 32, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 40, **_TOKENS,
    "decoder_start_token_id": 2,
}  # fmt: skip
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, **_TOKENS, "decoder_start_token_id": 2}


def seeded(model: str, config: str, **settings: Any) -> Any:
    """Return a model of transformers with random weights, biases and norms perturbed.

    What a model computes (Marian's positions) is left as it is: no checkpoint holds it.
    """
    torch.manual_seed(0)
    made = getattr(transformers, model)(getattr(transformers, config)(**settings)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (p for p in made.parameters() if p.requires_grad):
            parameter += torch.randn(parameter.shape, generator=generator) * 0.05
    return made


def _language(model: str, config: str, **more: Any) -> Callable[..., Any]:
    return lambda layers=4: seeded(
        model, config, num_hidden_layers=layers, **_SIZES, **_TOKENS, **more
    )


# two maps (Llama), fused gate and up (Phi-3, GLM, ModernBERT)
GATED: dict[str, Callable[..., Any]] = {
    "llama": _language("LlamaForCausalLM", "LlamaConfig"),
    "phi3": _language("Phi3ForCausalLM", "Phi3Config"),
    "glm": _language("GlmForCausalLM", "GlmConfig", num_key_value_heads=2, head_dim=8),
    "modernbert": _language(
        "ModernBertForMaskedLM", "ModernBertConfig", cls_token_id=3, sep_token_id=4
    ),
}


def _both(model: str, config: str, **more: Any) -> Callable[..., Any]:
    return lambda encoder=4, decoder=4: seeded(
        model, config, encoder_layers=encoder, decoder_layers=decoder, **_SEQ2SEQ, **more
    )


def relu_bert(layers: int = 3) -> Any:
    return seeded(
        "BertForSequenceClassification", "BertConfig", hidden_size=16, intermediate_size=24,
        num_hidden_layers=layers, num_attention_heads=2, vocab_size=61, hidden_act="relu",
    )  # fmt: skip


def t5(encoder: int = 4, decoder: int = 4, **more: Any) -> Any:
    return seeded(
        "T5ForConditionalGeneration", "T5Config", num_layers=encoder, num_decoder_layers=decoder,
        **_T5, **more,
    )  # fmt: skip


SEQ2SEQ: dict[str, Callable[..., Any]] = {
    "t5": t5,
    "bart": _both("BartForConditionalGeneration", "BartConfig"),
    "marian": _both("MarianMTModel", "MarianConfig", decoder_vocab_size=61),
}
