"""What else a model of the same size could be: rivals that merging has to beat.

Each rival is put in place for the length of a block, measured, and taken out again.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn


@contextmanager
def dropped_layers(model: nn.Module, paths: Sequence[str]) -> Iterator[None]:
    """Let the blocks at ``paths`` pass on what they are given, for the length of the block."""

    def skip(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> Any:
        given = args[0] if args else kwargs["hidden_states"]
        return (given, *out[1:]) if isinstance(out, tuple) else given

    with ExitStack() as stack:
        for path in paths:
            hook = model.get_submodule(path).register_forward_hook(skip, with_kwargs=True)
            stack.callback(hook.remove)
        yield
