"""Weights that are there, and numbers: all else is refused before anything is made of them."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ffmerge.errors import InputError

PACKAGE = "served_from"  # attribute of a model whose forward pass is a package: its folder


def check_has_weights(model: Any, what: object = "the model") -> None:
    """Raise InputError at what is no model of PyTorch: a path, or what ``load_package`` made."""
    if not isinstance(model, nn.Module):
        raise InputError(
            f"{what} is {model!r}, and no model of PyTorch: open the checkpoint with ffmerge.load, "
            "and give what that returns."
        )
    folder = getattr(model, PACKAGE, None)
    if folder is not None:
        raise InputError(
            f"{what} is the package {folder}, which runs graphs and has no weights in PyTorch: "
            "load the checkpoint that it was exported from with ffmerge.load, and give that."
        )


def check_weights(model: Any, what: object = "the model") -> None:
    """Raise InputError if a model is a package, or, with its name, a parameter is not finite.

    Parameters on the meta device hold nothing.
    """
    check_has_weights(model, what)
    for name, parameter in model.named_parameters():
        if not is_finite(parameter):
            raise InputError(
                f"{what} has weights that are NaN or infinite, in {name}: take another one."
            )


def check_merged(method: str, tensors: Iterable[Mapping[Any, Tensor]]) -> None:
    """Raise InputError if a method has made weights that are not finite."""
    for each in tensors:
        for tensor in each.values():
            if not is_finite(tensor):
                raise InputError(
                    f"method {method!r} gives NaN or infinite weights here: take another method."
                )


def is_finite(tensor: Tensor) -> bool:
    """Tell whether all values of a tensor are finite, without a copy of it."""
    if tensor.device.type == "meta" or not tensor.is_floating_point() or not tensor.numel():
        return True
    values = tensor.detach()
    if values.element_size() == 1:  # float8 has no order of its own
        values = values.float()
    low, high = torch.aminmax(values)  # NaN if any is
    return bool(torch.isfinite(low) & torch.isfinite(high))
