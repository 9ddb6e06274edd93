"""Whole sublayers dropped one by one, attention too, where the output turns least (FinerCut).

``run.py`` calls :func:`chosen`, and measures within :func:`without`. After arXiv 2405.18218: what
is dropped next is that without which the model's outputs turn least from the original's. There all
that are left are tried at each step, here those ``TRIED`` that were best at the last.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from ffmerge.models.find import find
from ffmerge.models.inputs import main_output
from ffmerge.models.sublayer import block_of
from ffmerge.passes.weights.activations import hooked
from ffmerge.passes.weights.widths import parameters_of

TRIED = 12  # sublayers at each step but the first
Batch = Mapping[str, np.ndarray]


def sublayers(model: nn.Module) -> dict[str, int]:
    """Return the last map of every feed-forward and attention sublayer, and what goes with it."""
    members = find(model)
    found = {member.output: parameters_of(model, member) for member in members}
    attention: dict[str, list[tuple[str, nn.Module]]] = {}
    for path, module in model.named_modules():
        parts = path.split(".")
        within = [place for place, part in enumerate(parts) if "att" in part]
        if isinstance(module, nn.Linear) and within and block_of(model, path):
            attention.setdefault(".".join(parts[: within[0] + 1]), []).append((path, module))
    for maps in attention.values():
        last = maps[-1][0]
        found[last] = sum(p.numel() for _, module in maps for p in module.parameters())
    return found


@contextmanager
def without(model: nn.Module, paths: Iterable[str]) -> Iterator[None]:
    """Let the sublayers whose last maps these are add nothing, for the length of the block."""

    def nothing(path: str, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        return torch.zeros_like(out)

    with hooked(model, paths, nothing):
        yield


def chosen(model: nn.Module, batches: Sequence[Batch], remove: int) -> tuple[list[str], int]:
    """Return which sublayers are dropped to be rid of so many parameters, and how many that are."""
    left, expected = sublayers(model), _outputs(model, batches)
    dropped: list[str] = []
    gone = 0

    def turned(path: str) -> float:
        with without(model, [*dropped, path]):
            found = _outputs(model, batches)
        return float((1 - nn.functional.cosine_similarity(found, expected, dim=-1)).mean())

    tried = [*left]
    while gone < remove:
        angles = {path: turned(path) for path in tried}
        tried = sorted(angles, key=angles.__getitem__)
        best, tried = tried[0], tried[1 : 1 + TRIED]
        dropped.append(best)
        gone += left[best]
    return dropped, gone


def _outputs(model: nn.Module, batches: Sequence[Batch]) -> Tensor:
    """Return the output vectors of all positions that count."""
    found = []
    for batch in batches:
        inputs = {name: torch.as_tensor(array) for name, array in batch.items()}
        with torch.no_grad():
            out = main_output(model(**inputs))
        mask = inputs.get("attention_mask", torch.ones(out.shape[:2]))
        found.append(out[mask != 0])
    return torch.cat(found)
