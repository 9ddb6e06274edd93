"""Weights that are numbers: NaN and infinities are refused before anything is made of them."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ffmerge.errors import InputError


def check_weights(model: Any, what: object = "the model") -> None:
    """Raise InputError, with its name, if a parameter of a model holds NaN or an infinity.

    Those on the meta device hold nothing.
    """
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
