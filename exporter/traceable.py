"""Code of models that PyTorch cannot trace as it stands, said in a way that it can.

:func:`traceable` is around the forward pass of every whole graph. While a program is exported

- one position of each row, chosen by its id, is read by its number, as the classifiers of
  encoder-decoders choose it: they check that all rows have equally many of that id, select by a
  mask, and take the last;
- a mask of attention that hides nothing is none, as it is when nothing is exported;
- a mask by a function of the model's own, as of windows that reach both ways, is computed for all
  places at once, not by ``vmap``;
- the parameters of a distribution are not checked: that would be to look at values.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.overrides import TorchFunctionMode
from transformers import masking_utils

_SKIPS, _MAPS = "_ignore_bidirectional_mask_sdpa", "_vmap_expansion_sdpa"


@contextmanager
def traceable() -> Iterator[None]:
    """Replace what cannot be traced while a program is exported; otherwise nothing is."""
    if not torch.compiler.is_exporting():
        yield
        return
    with ExitStack() as stack:
        checked = Distribution._validate_args
        stack.callback(Distribution.set_default_validate_args, checked)
        Distribution.set_default_validate_args(False)
        if hasattr(masking_utils, _SKIPS):  # not in transformers 4
            stack.enter_context(patch.object(masking_utils, _SKIPS, _hides_nothing))
        if hasattr(masking_utils, _MAPS):
            stack.enter_context(patch.object(masking_utils, _MAPS, _at_once))
        stack.enter_context(_LastOfRow())
        yield


def _hides_nothing(
    padding_mask: Tensor | None, kv_length: int, local_attention_size: int | None = None
) -> bool:
    return padding_mask is None and local_attention_size is None


def _at_once(mask_function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the mask of rows, heads, queries and keys, each a vector of numbers."""

    def mask(*places: Tensor) -> Tensor:
        apart = masking_utils._non_vmap_expansion_sdpa(*places)
        return mask_function(*apart).expand([each.shape[0] for each in places])

    return mask


class _LastOfRow(TorchFunctionMode):
    """Takes ``states[mask, :]`` to be the last position of every row that the mask marks."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.unique_consecutive or func is Tensor.unique_consecutive:
            return args[0][:1]  # the check has to see one number
        if func is Tensor.__getitem__ and _selects_by_mask(*args):
            states, (mask, _) = args
            order = torch.arange(1, mask.shape[1] + 1, device=mask.device)
            last = (mask * order).argmax(-1)
            return states.gather(1, last[:, None, None].expand(-1, 1, states.shape[-1]))[:, 0]
        return func(*args, **(kwargs or {}))


def _selects_by_mask(states: Tensor, index: Any) -> bool:
    """Tell whether an index is a mask over rows and positions, and all of each state."""
    if not isinstance(index, tuple) or len(index) != 2 or index[1] != slice(None):
        return False
    mask = index[0]
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        return False
    return mask.ndim == 2 and states.ndim == 3
