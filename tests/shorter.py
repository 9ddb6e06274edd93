"""Tiny models whose layers can be dropped, and what is left of one without some of them."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from tiny import bert, gpt2
from tiny_wider import GATED, SEQ2SEQ, seeded, t5
from torch import nn

D, F = 32, 64  # of BERT, GPT-2 and ViT here


def _swin() -> Any:
    return seeded(
        "SwinForImageClassification", "SwinConfig", image_size=32, patch_size=2, embed_dim=16,
        depths=[4, 3], num_heads=[2, 4], window_size=4, num_labels=3,
    )  # fmt: skip


# layers that return a tensor, and a tuple; Conv1D; gate and up apart, and fused; no biases
MODELS: dict[str, Callable[[], Any]] = {
    "bert": lambda: bert(D, F, 4),
    "gpt2": lambda: gpt2(D, F, 4),
    "llama": lambda: GATED["llama"](4),
    "phi3": lambda: GATED["phi3"](4),
    "t5": lambda: t5(4, 3, feed_forward_proj="gated-gelu"),
    "marian": lambda: SEQ2SEQ["marian"](3, 4),
    "swin": _swin,
}


# where the layers of each stack are
BLOCKS = {
    "bert": ["bert.encoder.layer"], "gpt2": ["transformer.h"], "llama": ["model.layers"],
    "t5": ["encoder.block", "decoder.block"],
    "marian": ["model.encoder.layers", "model.decoder.layers"],
    "swin": ["swin.encoder.layers.0.blocks"],
}  # fmt: skip


def state_of(model: Any) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict(keep_vars=False).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def shorter(model: Any, lists: list[str], start: int, length: int) -> Any:
    """Return a copy of the model that has no layers ``start`` to ``start + length - 1``."""
    other = copy.deepcopy(model)
    for path in lists:
        blocks = other.get_submodule(path)
        left = [b for i, b in enumerate(blocks) if not start <= i < start + length]
        if start == 0 and "block" in lists[0].split("."):  # T5: the first makes the positions' bias
            a, b = blocks[0].layer[0].SelfAttention, left[0].layer[0].SelfAttention
            b.relative_attention_bias, b.has_relative_attention_bias = a.relative_attention_bias, 1
        owner, _, attribute = path.rpartition(".")
        setattr(other.get_submodule(owner), attribute, nn.ModuleList(left))
    return other
