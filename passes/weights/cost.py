"""What statistics cost, told before they are collected: docs/scale.md has the model."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import torch

from ffmerge.files import size_text
from ffmerge.models.sublayer import FeedForward

PAIRS = 2 << 30  # bytes of cross products that a search holds at a time, on a processor
BATCH = 1 << 30  # bytes of what goes through the sublayers at a time
_COPIES = 3  # of each signal: as it was seen, at the positions that count, centred
_PROBE = 768  # side of the matrices by which the rate is measured: some hundredths of a second


@dataclass(frozen=True)
class Cost:
    """Products that statistics take: ``flops`` for each position, ``bytes`` of their results."""

    pairs: int
    flops: int
    bytes: int

    def text(self, tokens: int, device: torch.device) -> str:
        """Return it in words for so many positions; the passes of the model come on top."""
        flops = self.flops * tokens
        seconds = flops / rate(device)
        return (
            f"{self.pairs} pairs, {flops / 1e12:.3g} TFLOP, about {seconds:.0f} s, "
            f"{size_text(self.bytes)}"
        )


def cost_of(pairs: Iterable[tuple[FeedForward, FeedForward]]) -> Cost:
    """Return what the pairs cost, and of each layer among them the products of its inputs."""
    wanted = {(a.stack, a.layer, b.layer): (a, b) for a, b in pairs}
    layers = {(m.stack, m.layer): m for pair in wanted.values() for m in pair}
    crossed = sum((3 if a.gated else 1) * a.d_ff * b.d_ff for a, b in wanted.values())
    own = sum(m.d_model**2 for m in layers.values())
    return Cost(len(wanted), 2 * (crossed + own), 4 * crossed + 8 * own)


def room(device: torch.device) -> int:
    """Return the bytes of cross products to hold at a time: half of what a GPU has free."""
    return torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else PAIRS


def width_of(members: Sequence[FeedForward]) -> int:
    """Return the bytes that one position takes while its signals are counted."""
    numbers = sum(2 * m.d_model + (5 if m.gated else 2) * m.d_ff for m in members)
    return 4 * _COPIES * numbers


@cache
def rate(device: torch.device) -> float:
    """Return the flops a second of a product of two float32 matrices, from a short probe."""
    a = torch.ones(_PROBE, _PROBE, device=device)
    a @ a
    times = []
    for _ in range(3):
        began = time.perf_counter()
        float((a @ a)[0, 0])  # on a GPU the product is waited for
        times.append(time.perf_counter() - began)
    return float(2 * _PROBE**3 / min(times))
