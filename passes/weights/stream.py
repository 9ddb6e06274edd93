"""What the output of a sublayer is added to: the stream of a residual connection.

``narrow.py`` has a sublayer make up for what the stream misses by then, and weighs positions where
the sum is normalized. No architecture is known by name. Of the modules of the sublayer's block
one is looked for that is given an x before the sublayer puts out y, so that x + y is seen later:
the normalization before the sublayer, or its first map where the normalization comes after the sum.
Where a block adds up more at once, as attention and sublayer side by side, there is none.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ffmerge.models.dataflow import run_example
from ffmerge.models.sublayer import FeedForward, block_of
from ffmerge.passes.weights.activations import hooked

_SAME = 1e-5  # of the largest, in float32; measured 0
_SAME_HALF = 1e-2  # in 16 bits

Call = tuple[str, Tensor]  # a module by its path, and what it was given or put out


@dataclass(frozen=True)
class Stream:
    """What the output of a sublayer is added to.

    The module ``given`` it, and whether the sum is ``normalized`` before anything else reads it:
    what that is divided by, a position's error is divided by too.
    """

    given: str
    normalized: bool = False


def streams(model: Any, members: Sequence[FeedForward]) -> dict[FeedForward, Stream]:
    """Return by sublayer its stream, for those that have one."""
    given: list[Call] = []
    put_out: list[Call] = []  # of the same modules, in the same order

    def keep(path: str, _: Any, args: Any, out: Any) -> None:
        first = out[0] if isinstance(out, tuple) else out
        if args and isinstance(args[0], Tensor) and isinstance(first, Tensor):
            given.append((path, args[0].clone()))
            put_out.append((path, first.clone()))

    with hooked(model, [path for path, _ in model.named_modules()], keep):
        run_example(model)
    found = {}
    paths = [path for path, _ in given]
    for member in members:
        at = paths.index(member.output)
        block = _block(model, member)
        before = _in_block(block, given[:at])
        after = given[at + 1 :], put_out[at + 1 :]
        stream = _given_stream(before, put_out[at][1], [*after[0], *after[1]])
        if stream is not None:
            path, total = stream
            found[member] = Stream(path, _normalized(block, total, *after))
    return found


def _block(model: Any, member: FeedForward) -> str:
    """Return the path of the block around a sublayer."""
    block = block_of(model, member.output)
    assert block is not None  # a sublayer is found in a repeated block only
    return f"{block[0]}.{block[1]}"


def _in_block(block: str, calls: Sequence[Call]) -> list[Call]:
    """Return the calls of modules of a block that are called once, the last first."""
    paths = [path for path, _ in calls]
    found = []
    for path, given in reversed(calls):
        if path.startswith(f"{block}.") and paths.count(path) == 1:
            found.append((path, given))
    return found


def _given_stream(before: Iterable[Call], out: Tensor, after: Sequence[Call]) -> Call | None:
    """Return which module is given x before, so that x + ``out`` is seen after, and that sum."""
    for path, x in before:
        if x.shape[-1] != out.shape[-1] or x.numel() != out.numel():
            continue
        total = x.reshape(out.shape) + out
        if any(_same(total, z) for _, z in after):
            return path, total
    return None


def _normalized(block: str, total: Tensor, given: Sequence[Call], put_out: Sequence[Call]) -> bool:
    """Tell whether a block puts out what a module of it makes of the sum, and not the sum."""
    whole = next((z for path, z in put_out if path == block), None)
    if whole is None or _same(whole, total):
        return False
    for (path, x), (_, z) in zip(given, put_out, strict=True):
        if path.startswith(f"{block}.") and _same(x, total) and _same(z, whole):
            return True
    return False


def _same(one: Tensor, other: Tensor) -> bool:
    """Tell whether two tensors hold the same numbers, up to rounding."""
    if one.numel() != other.numel():
        return False
    bound = _SAME if one.dtype in (torch.float32, torch.float64) else _SAME_HALF
    off = (one.flatten() - other.flatten()).abs().max()
    return bool(off <= bound * one.abs().max())
