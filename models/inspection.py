"""What a model holds, what was done to it, and what tying k of its sublayers would remove.

``ffmerge inspect`` and :func:`ffmerge.inspect` ask for it before anything is merged. Of a path no
weights are needed: the model is built on the meta device and its data flow followed. A model that
is given is run, and each sublayer proved.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ffmerge.errors import InputError
from ffmerge.models.checkpoint import load, skeleton
from ffmerge.models.dataflow import NeedsWeights
from ffmerge.models.find import survey
from ffmerge.models.finite import check_has_weights
from ffmerge.models.notebook import Table, html_of
from ffmerge.models.prove import proven
from ffmerge.models.record import MergeRecord, merge_record
from ffmerge.models.source import resolve
from ffmerge.models.sublayer import FeedForward, LeftAlone, stacks


@dataclass(frozen=True)
class Removable:
    """What k layers of a stack sharing one sublayer removes: k - 1 sublayers."""

    stack: str
    k: int
    parameters: int
    fraction: float


@dataclass(frozen=True, repr=False)
class Inspection:
    """The feed-forward stacks of a model, and what only looks like a sublayer.

    ``proved`` is None where there were no weights to run. ``sizes`` are the parameters of each
    sublayer, by path. ``distinct`` counts, by stack, the sublayers with weights of their own: fewer
    than are run means that they are shared. ``record`` is what a merge did to it before: there is
    nothing ``removable`` then, because it is not tied twice.
    """

    model_type: str
    parameters: int
    stacks: dict[str, tuple[FeedForward, ...]]
    sizes: dict[str, int]
    distinct: dict[str, int]
    proved: bool | None
    removable: tuple[Removable, ...]
    left_alone: tuple[LeftAlone, ...]
    record: MergeRecord | None = None

    def runs(self, stack: str) -> int:
        """Return how many sublayers of a stack one forward pass runs."""
        return sum(member.runs for member in self.stacks[stack])

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "model_type": self.model_type,
            "parameters": self.parameters,
            "proved": self.proved,
            "stacks": [self._stack_to_json(name) for name in self.stacks],
            "merge": self.record.to_json() if self.record else None,
            "removable": [vars(each) for each in self.removable],
            "left_alone": [vars(part) for part in self.left_alone],
        }

    def _stack_to_json(self, name: str) -> dict[str, Any]:
        members = self.stacks[name]
        sublayers = []
        for member in members:
            size = self.sizes[member.path]
            sublayer = {"index": member.layer, "path": member.path, "d_ff": member.d_ff}
            sublayers.append({**sublayer, "parameters": size})
        return {
            "name": name,
            "layers": len(members),
            "d_model": members[0].d_model,
            "d_ff": max(member.d_ff for member in members),
            "gated": members[0].gated,
            "runs": self.runs(name),
            "distinct": self.distinct[name],
            "shared": self.distinct[name] < self.runs(name),
            "sublayers": sublayers,
        }

    def tables(self) -> list[Table]:
        """Return what the terminal and a notebook show."""
        columns = ("stack", "layers", "runs", "distinct", "d_model", "d_ff", "gated")
        rows = []
        for name, members in self.stacks.items():
            first = members[0]
            counts = (len(members), self.runs(name), self.distinct[name])
            widths = _span(member.d_ff for member in members)
            sizes = _span(self.sizes[member.path] for member in members)
            rows.append((name, *counts, first.d_model, widths, first.gated, sizes))
        title = f"{self.model_type}: {self.parameters:,} parameters"
        if self.record:
            title += f", method {self.record.method}"
        tables: list[Table] = [(title, (*columns, "parameters each"), rows)]
        removed = []
        for each in self.removable:
            removed.append((each.stack, each.k, f"{each.parameters:,}", f"{each.fraction:.2%}"))
        if removed:
            heads = ("stack", "k", "parameters", "of all")
            tables.append(("Tying k layers removes", heads, removed))
        if self.left_alone:
            left = [(part.path, part.reason) for part in self.left_alone]
            tables.append(("Left alone", ("part", "why"), left))
        return tables

    def __repr__(self) -> str:
        layers = ", ".join(f"{name} of {len(members)}" for name, members in self.stacks.items())
        return f"<Inspection: {self.model_type}, {self.parameters:,} parameters, stacks {layers}>"

    def _repr_html_(self) -> str:
        return html_of(self.tables())


def inspect(model: str | Path | nn.Module, trust_remote_code: bool = False) -> Inspection:
    """Return the feed-forward stacks of a model or checkpoint, and what tying removes.

    A path or hub id is read on the meta device: only its ``config.json`` is needed. Code that
    comes with it is run only with ``trust_remote_code``.

    Raises:
        InputError: the model cannot be read, or has nothing that looks like a feed-forward
            sublayer.
    """
    network, found, left = _surveyed(model, trust_remote_code)
    has_weights = network.device.type != "meta"
    if not found and not left:
        raise InputError(
            f"no feed-forward sublayer found in {type(network).__name__}: nothing can be merged."
        )
    by_name = stacks(found)
    sizes = {member.path: _size(network, member) for member in found}
    distinct = {}
    for name, members in by_name.items():
        first_weights = {id(network.get_parameter(m.weights[0].name)) for m in members}
        distinct[name] = len(first_weights)
    total, record = sum(p.numel() for p in network.parameters()), merge_record(network.config)
    return Inspection(
        model_type=network.config.model_type,
        parameters=total,
        stacks=by_name,
        sizes=sizes,
        distinct=distinct,
        proved=True if has_weights else None,
        removable=() if record else _removable(by_name, sizes, distinct, total),
        left_alone=left,
        record=record,
    )


def _surveyed(
    model: str | Path | nn.Module, trust_remote_code: bool
) -> tuple[Any, tuple[FeedForward, ...], tuple[LeftAlone, ...]]:
    """Return the network, its sublayers, and what is left alone.

    Code that has to look at values is followed with the weights, if they are there.
    """
    if isinstance(model, nn.Module):
        check_has_weights(model)
        if next(model.parameters()).is_meta:
            return model, *survey(model)
        return model, *proven(model)
    network = skeleton(model, trust_remote_code)
    try:
        return network, *survey(network)
    except NeedsWeights:
        if not any(resolve(model, weights=False).glob("*.safetensors")):
            raise
    network = load(model, trust_remote_code)
    return network, *proven(network)


def _size(network: nn.Module, member: FeedForward) -> int:
    return sum(network.get_parameter(weight.name).numel() for weight in member.weights)


def _span(numbers: Iterable[int]) -> str:
    """Return numbers in words: the one that all are, or the least to the most."""
    least, *more = sorted(set(numbers))
    return f"{least:,} to {more[-1]:,}" if more else f"{least:,}"


def _removable(
    by_name: Mapping[str, Sequence[FeedForward]],
    sizes: Mapping[str, int],
    distinct: Mapping[str, int],
    total: int,
) -> tuple[Removable, ...]:
    """Return what sharing removes, for every k; only sublayers of one size can share."""
    removable = []
    for name, members in by_name.items():
        size, alike = Counter(sizes[member.path] for member in members).most_common(1)[0]
        for k in range(2, min(distinct[name], alike) + 1):
            removed = (k - 1) * size
            removable.append(Removable(name, k, removed, removed / total))
    return tuple(removable)
