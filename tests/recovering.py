"""Tiny merged models, the rows on which they are recovered, and by how much parameters differ."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny import bert, gpt2, vit
from tiny_wider import GATED, SEQ2SEQ, seeded

from ffmerge.config import MergeConfig, RecoverConfig
from ffmerge.models.examples import from_arrays
from ffmerge.passes.weights.merge import merge_
from ffmerge.passes.weights.recover import clone_sharing_parameters, recover_

Arrays = dict[str, np.ndarray]


def _clip() -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
             "num_attention_heads": 4}  # fmt: skip
    return seeded(
        "CLIPModel", "CLIPConfig", vision_config={**sizes, "image_size": 16, "patch_size": 4},
        text_config={**sizes, "vocab_size": 60, "max_position_embeddings": 20, "bos_token_id": 0,
                     "eos_token_id": 1},
    )  # fmt: skip


MODELS = {
    "vit": lambda: vit(32, 64, 3),
    "gpt2": lambda: gpt2(32, 64, 3),
    "bert": lambda: bert(32, 64, 3),
    "llama": lambda: GATED["llama"](3),
    "marian": lambda: SEQ2SEQ["marian"](3, 3),
    "clip": _clip,
}


def rows_of(model: Any, rows: int = 48, seed: int = 0) -> Arrays:
    """Rows of a model's inputs; text is padded on the right by up to five of its nine tokens."""
    generator = np.random.default_rng(seed)
    ids = generator.integers(3, 60, (rows, 9))
    mask = (np.arange(9) < generator.integers(4, 10, (rows, 1))).astype(int)
    arrays: Arrays = {}
    if hasattr(model.config, "image_size") or hasattr(model.config, "vision_config"):
        arrays["pixel_values"] = generator.standard_normal((rows, 3, 16, 16)).astype("f")
    if model.main_input_name == "input_ids":
        arrays |= {"input_ids": np.where(mask, ids, 2), "attention_mask": mask}
    if model.config.is_encoder_decoder:
        arrays["decoder_input_ids"] = generator.integers(3, 60, (rows, 5))
    return arrays


def merged_pair(make: Any, layers: tuple[int, int] = (0, 2)) -> tuple[Any, Any]:
    """Return a model merged by its mean, and the original around the same other Parameters."""
    model = make()
    original = clone_sharing_parameters(model)
    towers = ("text_model", "vision_model") if "CLIP" in type(model).__name__ else ()
    merge_(model, None, MergeConfig(window=layers, method="average", stacks=towers))
    return model, original


def recover(model: Any, original: Any, arrays: Arrays, folder: Path | None = None, **settings: Any):
    settings = {"steps": 4, "batch_size": 8, **settings}
    return recover_(model, original, from_arrays(arrays), RecoverConfig(**settings), folder=folder)


def values_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Return the largest relative difference of a parameter, by its norm."""
    assert a.keys() == b.keys()
    return max(float((a[n] - b[n]).norm() / b[n].norm().clamp(min=1e-12)) for n in a)
