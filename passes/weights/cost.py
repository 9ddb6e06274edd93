"""What statistics cost, known before they are collected: docs/scale.md has the model."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ffmerge.files import size_text
from ffmerge.models.examples import Examples
from ffmerge.models.inputs import StopForward, forward
from ffmerge.models.sublayer import FeedForward
from ffmerge.passes.weights.activations import Stacks, hooked

PAIRS = 2 << 30  # bytes of cross products that a search holds at a time, on a processor
BATCH = 1 << 30  # bytes of what goes through the sublayers at a time
_COPIES = 3  # of each activation: as it was seen, at the positions that count, centred

MemberPair = tuple[FeedForward, FeedForward]


def cost_of(pairs: Sequence[MemberPair]) -> tuple[int, int]:
    """Return the flops of each position, and the bytes of what is summed up.

    Products of the features of each pair, and of each layer's inputs with themselves.
    """
    features = inputs = 0
    for a, b in _distinct(pairs):
        features += a.d_ff * b.d_ff * (3 if a.gated else 1)
    for member in dict.fromkeys(member for pair in pairs for member in pair):
        inputs += member.d_model**2
    return 2 * (features + inputs), 4 * features + 8 * inputs


def cost_text(pairs: Sequence[MemberPair], tokens: int) -> str:
    """Return it in words for so many positions; the passes of the model come on top."""
    flops, size = cost_of(pairs)
    return f"{len(_distinct(pairs))} pairs, {flops * tokens / 1e12:.3g} TFLOP, {size_text(size)}"


def room(device: torch.device) -> int:
    """Return the bytes of cross products to hold at a time: half of what a GPU has free."""
    return torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else PAIRS


def rows_at_a_time(model: Any, examples: Examples, most: int, stacks: Stacks) -> int:
    """Return how many rows go through the model at a time: few, where what is watched is large."""
    row = {name: array[:1] for name, array in next(examples.longest().batches(most)).items()}
    lengths: dict[str, int] = {}

    def measure(path: str, _: Any, args: Any, out: Tensor) -> None:
        lengths[path] = out.numel() // out.shape[-1]
        raise StopForward

    size = 0
    for members in stacks.values():
        path = members[0].output
        with hooked(model, [path], measure), torch.no_grad():
            forward(model, row)
        size += lengths[path] * _position_bytes(members)
    return min(most, max(1, BATCH // size))


def _position_bytes(members: Sequence[FeedForward]) -> int:
    """Return the bytes that one position takes while its activations are summed up."""
    numbers = 0
    for member in members:
        hidden = 5 if member.gated else 2
        numbers += 2 * member.d_model + hidden * member.d_ff
    return 4 * _COPIES * numbers


def _distinct(pairs: Sequence[MemberPair]) -> list[MemberPair]:
    return [*dict.fromkeys(pairs)]
