"""What a model holds and what tying k of its feed-forward sublayers would remove."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ffmerge.errors import InputError
from ffmerge.models.checkpoint import skeleton
from ffmerge.models.find import survey
from ffmerge.models.prove import proven
from ffmerge.models.sublayer import FeedForward, LeftAlone, stacks


@dataclass(frozen=True)
class Removable:
    """What k layers of a stack sharing one sublayer removes: k - 1 sublayers."""

    stack: str
    k: int
    parameters: int
    fraction: float


@dataclass(frozen=True)
class Inspection:
    """The feed-forward stacks of a model, and what only looks like a sublayer.

    ``proved`` is None where there were no weights to run. ``distinct`` counts, by stack, the
    sublayers with weights of their own: fewer than are run means that they are shared.
    """

    model_type: str
    parameters: int
    stacks: dict[str, tuple[FeedForward, ...]]
    sizes: dict[str, int]
    distinct: dict[str, int]
    proved: bool | None
    removable: tuple[Removable, ...]
    left_alone: tuple[LeftAlone, ...]

    def runs(self, stack: str) -> int:
        """Return how many sublayers of a stack one forward pass runs."""
        return sum(member.runs for member in self.stacks[stack])

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "model_type": self.model_type,
            "parameters": self.parameters,
            "proved": self.proved,
            "stacks": [
                {
                    "name": name,
                    "layers": len(members),
                    "d_model": members[0].d_model,
                    "d_ff": members[0].d_ff,
                    "gated": members[0].gated,
                    "runs": self.runs(name),
                    "distinct": self.distinct[name],
                    "shared": self.distinct[name] < self.runs(name),
                    "sublayers": [
                        {"index": m.layer, "path": m.path, "parameters": self.sizes[m.path]}
                        for m in members
                    ],
                }
                for name, members in self.stacks.items()
            ],
            "removable": [vars(r) for r in self.removable],
            "left_alone": [vars(part) for part in self.left_alone],
        }


def inspect(model: str | Path | nn.Module, trust_remote_code: bool = False) -> Inspection:
    """Return the feed-forward stacks of a model or checkpoint, and what tying removes.

    A path or hub id is read on the meta device: only its ``config.json`` is needed. Code that
    comes with it is run only with ``trust_remote_code``.

    Raises:
        InputError: the model cannot be read, or has nothing that looks like a feed-forward
            sublayer.
    """
    network: Any = model if isinstance(model, nn.Module) else skeleton(model, trust_remote_code)
    bare = network.device.type == "meta"
    found, left = survey(network) if bare else proven(network)
    if not found and not left:
        raise InputError(
            f"no feed-forward sublayer found in {type(network).__name__}: nothing can be merged."
        )
    total = sum(p.numel() for p in network.parameters())
    sizes = {f.path: sum(network.get_parameter(w.name).numel() for w in f.weights) for f in found}
    by_name = stacks(found)
    distinct = {
        name: len({id(network.get_parameter(m.weights[0].name)) for m in members})
        for name, members in by_name.items()
    }
    removable = []
    for name, members in by_name.items():
        size, alike = Counter(sizes[m.path] for m in members).most_common(1)[0]
        for k in range(2, min(distinct[name], alike) + 1):
            removable.append(Removable(name, k, (k - 1) * size, (k - 1) * size / total))
    kind, proved = network.config.model_type, None if bare else True
    return Inspection(kind, total, by_name, sizes, distinct, proved, tuple(removable), left)
