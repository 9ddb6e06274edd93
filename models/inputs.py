"""The inputs of a model, read from its configuration: for tracing, exporting and comparing."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ffmerge.errors import InputError
from ffmerge.models.probe import InputSpec, Probe

# Batch sizes and lengths on which a package is compared with PyTorch.
_CASES = ((1, 7), (3, 5), (8, 11))
_IMAGE_SIZE = 224  # convolutional models name none: any will do


def input_specs(model: Any) -> tuple[InputSpec, ...]:
    """Return the inputs of a transformers model with optimum's names and dynamic dimensions.

    Raises:
        InputError: the model's main input is of a kind ffmerge does not know.
    """
    config = model.config
    if model.main_input_name == "pixel_values":
        height, width = _pair(getattr(config, "image_size", _IMAGE_SIZE))
        image = ("batch_size", int(config.num_channels), height, width)
        return (InputSpec("pixel_values", "float32", image),)
    if model.main_input_name == "input_ids" and not config.is_encoder_decoder:
        shape = ("batch_size", "sequence_length")
        ids = InputSpec("input_ids", "int64", shape, high=config.vocab_size)
        mask = InputSpec("attention_mask", "int64", shape, mask=True)
        kinds = getattr(config, "type_vocab_size", 0)
        types = (InputSpec("token_type_ids", "int64", shape, high=kinds),) if kinds > 1 else ()
        return (ids, mask, *types)
    raise InputError(
        f"{type(model).__name__} takes {model.main_input_name!r}: only image encoders "
        "(pixel_values) and single-stack text models (input_ids) are served."
    )


def probe(model: Any) -> Probe:
    """Return the fixed inputs on which ``model`` and its package are compared."""
    specs = input_specs(model)
    longest = getattr(model.config, "max_position_embeddings", None) or _CASES[-1][1]
    sizes = [{"batch_size": b, "sequence_length": min(s, longest)} for b, s in _CASES]
    dynamic = {d for spec in specs for d in spec.shape if isinstance(d, str)}
    return Probe(specs, tuple({k: v for k, v in case.items() if k in dynamic} for case in sizes))


def to_tensors(arrays: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Return arrays as tensors on the model's device, floats in the model's dtype."""
    at = next(model.parameters())
    tensors = {name: torch.as_tensor(array) for name, array in arrays.items()}
    return {
        name: t.to(at.device, at.dtype if t.is_floating_point() else t.dtype)
        for name, t in tensors.items()
    }


def example_inputs(model: nn.Module) -> dict[str, Tensor]:
    """Return the probe's inputs of three rows, on the model's device, without padding.

    A mask would have to be looked at, which a model on the meta device cannot do.
    """
    recipe = probe(model)
    masks = {spec.name for spec in recipe.inputs if spec.mask}
    return to_tensors({k: v for k, v in recipe.draw(1).items() if k not in masks}, model)


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
