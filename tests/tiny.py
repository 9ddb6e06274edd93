"""Tiny seeded models: every family, feed-forward weights above and below 8,192 elements."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    ViTConfig,
    ViTForImageClassification,
)

from ffmerge.models.find import find

# (d, f): 64 x 256 = 16,384 elements is above the exporter's folding limit, 32 x 64 below
ABOVE, BELOW = (64, 256), (32, 64)


def vit(d: int = 64, f: int = 256, layers: int = 6) -> Any:
    config = ViTConfig(
        hidden_size=d, intermediate_size=f, num_hidden_layers=layers, num_attention_heads=4,
        image_size=16, patch_size=4, num_labels=7,
    )  # fmt: skip
    return _seeded(ViTForImageClassification, config)


def gpt2(d: int = 64, f: int = 256, layers: int = 6) -> Any:
    config = GPT2Config(
        n_embd=d, n_inner=f, n_layer=layers, n_head=4, vocab_size=97, n_positions=64,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return _seeded(GPT2LMHeadModel, config)


def bert(d: int = 64, f: int = 256, layers: int = 6) -> Any:
    config = BertConfig(
        hidden_size=d, intermediate_size=f, num_hidden_layers=layers, num_attention_heads=4,
        vocab_size=97, max_position_embeddings=64, num_labels=3,
    )  # fmt: skip
    return _seeded(BertForSequenceClassification, config)


def _seeded(model_class: Any, config: Any) -> Any:
    """Random weights, biases and norms perturbed, so that a wrong tie or bias shows."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn(parameter.shape, generator=generator) * 0.05
    return model


FAMILIES: dict[str, Callable[..., Any]] = {"vit": vit, "gpt2": gpt2, "bert": bert}


def permute_neurons(model: Any, source: int, target: int) -> None:
    """Make layer ``target`` a copy of layer ``source`` with its hidden neurons shuffled."""
    sublayers = find(model)
    order = torch.randperm(sublayers[source].d_ff, generator=torch.Generator().manual_seed(3))
    for a, b in zip(sublayers[source].weights, sublayers[target].weights, strict=True):
        value = model.get_parameter(a.name).detach().clone()
        model.get_parameter(b.name).data = a.reordered(value, order)
