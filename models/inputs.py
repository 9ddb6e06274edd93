"""A run of a model: on the inputs that are derived for it, or on a batch of data."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ffmerge.errors import InputError, first_line
from ffmerge.models.derive import input_specs, not_derived, probe
from ffmerge.models.probe import Array


class StopForward(Exception):
    """What a hook raises when nothing that comes after it in the pass is needed."""


def to_tensors(arrays: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Return arrays as tensors on the model's device, floats in the model's dtype."""
    first = next(model.parameters())
    tensors = {}
    for name, array in arrays.items():
        if isinstance(array, np.ndarray) and not (array.flags.writeable and array.flags.carray):
            # of a file that is mapped PyTorch takes no other, and columns of positions a model's
            # view does not
            array = array.copy()
        tensor = torch.as_tensor(array)
        if tensor.is_floating_point():
            tensor = tensor.to(first.dtype)
        tensors[name] = tensor.to(getattr(model, "device", first.device))  # a package is on meta
    return tensors


def example_inputs(model: nn.Module) -> dict[str, Tensor]:
    """Return the probe's inputs of three rows, on the model's device, without padding.

    A mask would have to be looked at, which a model on the meta device cannot do.
    """
    recipe = probe(model, input_specs(model))
    drawn = recipe.draw(1)
    for spec in recipe.inputs:
        if spec.kind == "mask" and spec.dtype == "int64":
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
        raise InputError(_not_taken(model, batch, error)) from error


def _not_taken(model: Any, batch: Mapping[str, Array], error: BaseException) -> str:
    """Say that a model does not run on a batch, and where that is so, what the batch lacks."""
    given = [(name, array.shape) for name, array in batch.items() if name != "labels"]
    shapes = ", ".join(f"{name} {tuple(shape)}" for name, shape in given)
    said = f"{type(model).__name__} does not take this data ({shapes}): {first_line(error)}"
    writes = "decoder_input_ids" in inspect.signature(model.forward).parameters
    if writes and {"labels", "decoder_input_ids"}.isdisjoint(batch):
        said += "; it writes text, and the data has none for it to write (--target-column)"
    return said


def main_output(output: Mapping[str, Any]) -> Tensor:
    """Return what a model is for: its logits, else the first output of more than one dimension.

    That leaves out the loss, which comes first where a model is told what it should foretell. The
    parameters of a distribution, a tuple, stand side by side in the last dimension.

    Raises:
        InputError: there is none.
    """
    if "logits" in output:
        logits: Tensor = output["logits"]
        return logits
    for value in output.values():
        if isinstance(value, tuple) and all(isinstance(part, Tensor) for part in value):
            value = torch.stack(value, -1)
        if isinstance(value, Tensor) and value.ndim > 1:
            return value
    raise InputError("the model gives no output of more than one dimension to compare.")


def refused(model: Any, inputs: Mapping[str, Any], error: BaseException) -> str:
    """Say that a model does not run on inputs that were derived for it."""
    shapes = ", ".join(f"{name} {tuple(array.shape)}" for name, array in inputs.items())
    return (
        f"{type(model).__name__} does not run on the inputs derived for it ({shapes}; "
        f"{first_line(error)}): {not_derived(model)}"
    )


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
