"""Rows drawn for a tiny model, and what goes through it on them."""

from typing import Any

import numpy as np
import torch

from ffmerge.models.find import find
from ffmerge.models.sublayer import FeedForward

Arrays = dict[str, np.ndarray]
Parameters = dict[str, torch.Tensor]


def data_of(model: Any, rows: int = 24, seed: int = 1) -> Arrays:
    generator = np.random.default_rng(seed)
    if model.main_input_name == "pixel_values":
        size = model.config.image_size
        return {"pixel_values": generator.standard_normal((rows, 3, size, size)).astype("f")}
    ids = {"input_ids": generator.integers(3, 61, (rows, 9))}
    if model.config.is_encoder_decoder:
        ids["decoder_input_ids"] = generator.integers(3, 61, (rows, 7))
    return ids


def labelled(model: Any, rows: int = 24) -> Arrays:
    generator = np.random.default_rng(1)
    if model.main_input_name == "pixel_values":
        return {
            "pixel_values": generator.standard_normal((rows, 3, 16, 16)).astype(np.float32),
            "labels": generator.integers(0, 7, rows),
        }
    ids = generator.integers(1, 61, (rows, 9))
    if "Sequence" in type(model).__name__:
        return {"input_ids": ids, "labels": generator.integers(0, 3, rows)}
    return {"input_ids": ids}


def pairs_of_texts(rows: int = 12) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(2)
    labels = generator.integers(3, 61, (rows, 7))
    labels[::3, 5:] = -100
    mask = np.ones((rows, 6), int)
    mask[1::3, 4:] = 0
    return {
        "input_ids": generator.integers(3, 61, (rows, 6)), "attention_mask": mask, "labels": labels,
    }  # fmt: skip


def outputs_of(model: Any, data: Arrays) -> torch.Tensor:
    options = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    with torch.no_grad():
        return model(**{k: torch.from_numpy(x) for k, x in data.items()}, **options).logits.double()


def own_of(model: Any, member: FeedForward) -> Parameters:
    """Return all parameters of a sublayer by number of the map and part."""
    return {
        f"{number} {part}": parameter.detach().double()
        for number, path in enumerate(member.maps)
        for part, parameter in model.get_submodule(path).named_parameters()
    }


def seen_in(model: Any, data: Arrays) -> list[dict[str, np.ndarray]]:
    """Return of each sublayer what its maps take and give, (tokens, width) in float64."""
    seen: list[dict[str, np.ndarray]] = [{} for _ in find(model)]
    handles = []

    def keep(found: dict[str, np.ndarray], key: str, args: Any, out: torch.Tensor) -> None:
        found[f"{key} in"], found[f"{key} out"] = (
            x.detach().flatten(0, 1).double().numpy() for x in (args[0], out)
        )

    for found, member in zip(seen, find(model), strict=True):
        for key, path in enumerate(member.maps):
            hook = model.get_submodule(path).register_forward_hook
            handles.append(hook(lambda m, a, out, f=found, k=key: keep(f, str(k), a, out)))
    outputs_of(model, data)
    for handle in handles:
        handle.remove()
    return seen
