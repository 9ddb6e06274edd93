"""The inputs of a model, read from its configuration, and a run on them or on a batch of data."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ffmerge.errors import InputError
from ffmerge.models.probe import Array, InputSpec, Probe

# Batch sizes and lengths on which a package is compared with PyTorch.
_CASES = ((1, 7), (3, 5), (8, 11))
_IMAGE_SIZE = 224  # convolutional models name none: any will do
_SAMPLES = 400  # of sound for one length of text: convolutions shorten it before the layers


class StopForward(Exception):
    """What a hook raises when nothing that comes after it in the pass is needed."""


def input_specs(model: Any) -> tuple[InputSpec, ...]:
    """Return the inputs of a transformers model with optimum's names and dynamic dimensions.

    Which there are is read from the signature of ``forward``, their sizes from the configuration.

    Raises:
        InputError: the model takes nothing of a kind ffmerge knows.
    """
    accepted = inspect.signature(model.forward).parameters
    config = model.config
    text = config.get_text_config()
    vision = getattr(config, "vision_config", config)
    specs: list[InputSpec] = []
    if "pixel_values" in accepted:
        height, width = _pair(getattr(vision, "image_size", _IMAGE_SIZE))
        image = ("batch_size", getattr(vision, "num_channels", 3), height, width)
        specs.append(InputSpec("pixel_values", "float32", image))
    if "input_features" in accepted:
        frames = 2 * config.max_source_positions
        sound = ("batch_size", int(config.num_mel_bins), int(frames))
        specs.append(InputSpec("input_features", "float32", sound))
    if "input_values" in accepted:
        specs.append(InputSpec("input_values", "float32", ("batch_size", "samples")))
    shape = ("batch_size", "sequence_length")
    if "input_ids" in accepted:
        specs.append(InputSpec("input_ids", "int64", shape, "integer", text.vocab_size))
        specs.append(InputSpec("attention_mask", "int64", shape, "mask"))
    kinds = getattr(config, "type_vocab_size", 0)
    if "token_type_ids" in accepted and kinds > 1:
        specs.append(InputSpec("token_type_ids", "int64", shape, "integer", kinds))
    if config.is_encoder_decoder:
        behind = ("batch_size", "decoder_sequence_length")
        vocabulary = getattr(config, "decoder_vocab_size", None) or text.vocab_size
        specs.append(InputSpec("decoder_input_ids", "int64", behind, "integer", vocabulary))
    if not specs:
        raise InputError(
            f"{type(model).__name__} takes no images, sound or text that is known here."
        )
    return tuple(specs)


def probe(model: Any) -> Probe:
    """Return the fixed inputs on which ``model`` and its package are compared."""
    specs = input_specs(model)
    longest = getattr(model.config, "max_position_embeddings", None) or 0
    if longest <= 0:  # XLNet has -1: no bound
        longest = _CASES[-1][1]
    dynamic = {dimension for spec in specs for dimension in spec.shape}
    cases = []
    for rows, length in _CASES:
        sizes = {
            "batch_size": rows,
            "sequence_length": min(length, longest),
            "decoder_sequence_length": length - 2,
            "samples": length * _SAMPLES,
        }
        cases.append({name: size for name, size in sizes.items() if name in dynamic})
    return Probe(specs, tuple(cases))


def to_tensors(arrays: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Return arrays as tensors on the model's device, floats in the model's dtype."""
    first = next(model.parameters())
    tensors = {}
    for name, array in arrays.items():
        tensor = torch.as_tensor(array)
        if tensor.is_floating_point():
            tensor = tensor.to(first.dtype)
        tensors[name] = tensor.to(first.device)
    return tensors


def example_inputs(model: nn.Module) -> dict[str, Tensor]:
    """Return the probe's inputs of three rows, on the model's device, without padding.

    A mask would have to be looked at, which a model on the meta device cannot do.
    """
    recipe = probe(model)
    drawn = recipe.draw(1)
    for spec in recipe.inputs:
        if spec.kind == "mask":
            del drawn[spec.name]
    return to_tensors(drawn, model)


def forward(model: Any, batch: Mapping[str, Array], **options: Any) -> Any:
    """Return the model's output for a batch; ``options`` go to the model as they are.

    None if a hook raises :class:`StopForward`. Labels are left out, unless an encoder-decoder has
    to make the decoder's input of them.

    Raises:
        InputError: the model does not take these arrays.
    """
    inputs = dict(batch)
    labels = inputs.pop("labels", None)
    if "use_cache" in inspect.signature(model.forward).parameters:
        options = {"use_cache": False, **options}  # keys and values of a batch are never read
    makes_decoder_input = model.config.is_encoder_decoder and "decoder_input_ids" not in batch
    if makes_decoder_input and labels is not None and labels.ndim == 2:
        inputs["labels"] = labels
    try:
        return model(**{**to_tensors(inputs, model), **options})
    except StopForward:
        return None
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        shapes = ", ".join(f"{name} {tuple(array.shape)}" for name, array in inputs.items())
        raise InputError(
            f"{type(model).__name__} does not take this data ({shapes}): "
            f"{str(error).splitlines()[0]}"
        ) from error


@contextmanager
def unchunked(model: Any) -> Iterator[None]:
    """Let feed-forward sublayers take any length at once: in chunks they take multiples only."""
    name = "chunk_size_feed_forward"
    chunked = []
    for module in model.modules():
        size = getattr(module, name, 0)
        if size:
            chunked.append((module, size))
            setattr(module, name, 0)
    try:
        yield
    finally:
        for module, size in chunked:
            setattr(module, name, size)


def _pair(size: Any) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    height, width = size
    return int(height), int(width)
