"""A model whose weights leave memory as they are read, where they are pages of a file.

The exporter runs models inside :func:`read_once` when it holds much else, and calls
:func:`give_back_weights` before what reads none.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from ffmerge.models.pages import give_back

# of the weights, from pass to pass: what leaves takes 0.2 ns a byte to go and come back, and a
# model is read whole when it is loaded, with less beside it
_STAYS = 0.5


def give_back_weights(model: nn.Module) -> None:
    """Give back the pages of all weights of ``model``."""
    for parameter in model.parameters():
        give_back(*_where(parameter))


def give_back_weight(weight: Tensor) -> None:
    """Give back the pages of one weight."""
    give_back(*_where(weight))


@contextmanager
def read_once(model: nn.Module) -> Iterator[None]:
    """Have half of the weights, the last ones, leave memory when their module has run.

    So a pass of ``model`` needs that much less. No other thread may write to weights inside.
    """
    stay = _STAYS * sum(parameter.nbytes for parameter in model.parameters())
    held, leave = 0, dict[int, tuple[int, int]]()
    for parameter in model.parameters():
        held += parameter.nbytes
        if held > stay:  # found here, as inside a weight may give the address of a wider one
            leave[id(parameter)] = _where(parameter)

    def after(module: nn.Module, given: Any, output: Any) -> None:
        for parameter in module._parameters.values():
            if id(parameter) in leave:
                give_back(*leave[id(parameter)])

    hook = register_module_forward_hook(after)
    try:
        yield
    finally:
        hook.remove()


def _where(weight: Tensor) -> tuple[int, int]:
    """Return the first address of a weight and the one behind it."""
    if weight.device.type != "cpu" or not weight.is_contiguous():
        return 0, 0
    return weight.data_ptr(), weight.data_ptr() + weight.nbytes
