"""What a model holds and what tying k of its feed-forward sublayers would remove."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ffmerge.errors import InputError
from ffmerge.models.checkpoint import skeleton
from ffmerge.models.feedforward import FeedForward, find, prove, stacks


@dataclass(frozen=True)
class Removable:
    """What k layers of a stack sharing one sublayer removes: k - 1 sublayers."""

    stack: str
    k: int
    parameters: int
    fraction: float


@dataclass(frozen=True)
class Inspection:
    """The feed-forward stacks of a model; ``proved`` is None where there were no weights to run."""

    model_type: str
    parameters: int
    stacks: dict[str, tuple[FeedForward, ...]]
    sizes: dict[str, int]
    proved: bool | None
    removable: tuple[Removable, ...]

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
                    "sublayers": [
                        {"index": m.layer, "path": m.path, "parameters": self.sizes[m.path]}
                        for m in members
                    ],
                }
                for name, members in self.stacks.items()
            ],
            "removable": [vars(r) for r in self.removable],
        }


def inspect(model: str | Path | nn.Module, trust_remote_code: bool = False) -> Inspection:
    """Return the feed-forward stacks of a model or checkpoint, and what tying removes.

    A path or hub id is read on the meta device: only its ``config.json`` is needed. Code that
    comes with it is run only with ``trust_remote_code``.

    Raises:
        InputError: the model cannot be read, or has no feed-forward sublayer.
    """
    network: Any = model if isinstance(model, nn.Module) else skeleton(model, trust_remote_code)
    found = find(network)
    if not found:
        raise InputError(
            f"no feed-forward sublayer found in {type(network).__name__}: nothing can be merged."
        )
    total = sum(p.numel() for p in network.parameters())
    sizes = {f.path: sum(network.get_parameter(w.name).numel() for w in f.weights) for f in found}
    proved = None if network.device.type == "meta" else all(prove(network, found))
    removable = [
        Removable(
            name, k, (k - 1) * sizes[members[0].path], (k - 1) * sizes[members[0].path] / total
        )
        for name, members in stacks(found).items()
        for k in range(2, _distinct(network, members) + 1)
    ]
    return Inspection(
        network.config.model_type, total, stacks(found), sizes, proved, tuple(removable)
    )


def _distinct(model: nn.Module, members: tuple[FeedForward, ...]) -> int:
    """Return how many of the sublayers have weights of their own."""
    return len({id(model.get_parameter(m.weights[0].name)) for m in members})
