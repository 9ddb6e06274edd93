"""What a feed-forward sublayer is, in one model: its place, its maps and its weights by name.

``models/find.py`` makes these, ``models/prove.py`` tries them; merging, tying and saving are given
them. A feed-forward sublayer maps d -> f by one linear map (two when gated), applies elementwise
functions, and maps f -> d by another.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Weight:
    """A parameter of a sublayer and which of its axes counts hidden neurons (None: no axis).

    A fused gate and up projection holds the neurons of both, one ``block`` after the other.
    """

    name: str
    neurons: int | None
    blocks: int = 1

    def reordered(self, values: Tensor, order: Tensor) -> Tensor:
        """Return ``values`` with hidden neuron ``order[j]`` in place j, in every block.

        Those that ``order`` does not name are left out.
        """
        if self.neurons is None:
            return values
        width = values.shape[self.neurons] // self.blocks
        index = torch.cat([order + block * width for block in range(self.blocks)])
        return values.index_select(self.neurons, index.to(values.device))

    def filled(self, values: Tensor, width: int) -> Tensor:
        """Return ``values`` with neurons of zeros behind those of every block, ``width`` in all."""
        if self.neurons is None:
            return values
        blocks = []
        for block in values.chunk(self.blocks, self.neurons):
            shape = [*block.shape]
            shape[self.neurons] = width - shape[self.neurons]
            blocks += [block, block.new_zeros(shape)]
        return torch.cat(blocks, self.neurons)


@dataclass(frozen=True)
class FeedForward:
    """One feed-forward sublayer.

    ``path`` is the smallest module that holds all its linear maps. ``inputs`` are the modules
    d -> f in the order the model calls them, ``output`` is the module f -> d. ``weights`` has
    the same order in every layer of a stack, so members of a group match position by position.
    ``reads`` are the model inputs it depends on: they tell a decoder from an encoder, and text
    from images. ``runs`` is how often one forward pass runs it: 12 times in a 12-layer ALBERT.
    """

    stack: str
    layer: int
    path: str
    inputs: tuple[str, ...]
    output: str
    d_model: int
    d_ff: int
    weights: tuple[Weight, ...]
    reads: tuple[str, ...]
    runs: int

    @property
    def maps(self) -> tuple[str, ...]:
        """The linear maps in the order of the data: d -> f, then f -> d."""
        return (*self.inputs, self.output)

    @property
    def keys(self) -> tuple[tuple[int, str], ...]:
        """Number of the map and name in it of each of ``weights``: the same in every layer."""
        keys = []
        for weight in self.weights:
            path, _, part = weight.name.rpartition(".")
            keys.append((self.maps.index(path), part))
        return tuple(keys)

    @property
    def gated(self) -> bool:
        """True when two maps d -> f are multiplied (SwiGLU, GeGLU), also if they are fused."""
        return len(self.inputs) > 1 or self.weights[0].blocks > 1


@dataclass(frozen=True)
class LeftAlone:
    """What looks like a feed-forward part of a repeated block and cannot be merged, and why."""

    path: str
    reason: str


def stacks(sublayers: Sequence[FeedForward]) -> dict[str, tuple[FeedForward, ...]]:
    """Return the sublayers by stack, each in layer order."""
    found: dict[str, list[FeedForward]] = {}
    for sublayer in sublayers:
        found.setdefault(sublayer.stack, []).append(sublayer)
    by_layer = attrgetter("layer")
    return {name: tuple(sorted(members, key=by_layer)) for name, members in found.items()}


def block_of(model: nn.Module, path: str) -> tuple[str, int] | None:
    """Return the innermost list of equal blocks around a module and its block's number.

    T5 lists the unlike sublayers of a block as well: that list repeats nothing.
    """
    parts = path.split(".")
    for end in range(len(parts) - 1, 0, -1):
        owner = model.get_submodule(".".join(parts[:end]))
        blocks = isinstance(owner, (nn.ModuleList, nn.Sequential)) and parts[end].isdigit()
        if blocks and len({type(block) for block in owner.children()}) == 1:
            return ".".join(parts[:end]), int(parts[end])
    return None
