"""Ties as a contract: written into the model, and checked in whatever the model became."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from ffmerge.errors import InputError
from ffmerge.files import restored
from ffmerge.models.record import Tie
from ffmerge.passes.graph.tensors import Copies, Stored, find_copies, is_op, stored

KEY = "ffmerge.ties"
# Nodes that hide a weight: a quantizer looks for initializers, and what it does not see it
# leaves in float (docs/architecture.md).
VIEWS = ("Transpose", "Identity", "Cast", "Reshape")


@dataclass(frozen=True)
class TieCheck:
    """Whether the tie named ``group`` holds; if not, ``reason`` names what breaks it."""

    group: str
    ok: bool
    reason: str = ""


def write_ties(model: ir.Model, ties: Sequence[Tie]) -> None:
    """Record the ties in the model's metadata under ``ffmerge.ties``; none, no record."""
    if ties:
        model.metadata_props[KEY] = json.dumps([tie.to_json() for tie in ties], ensure_ascii=False)
    else:
        model.metadata_props.pop(KEY, None)


def read_ties(model: ir.Model) -> tuple[Tie, ...]:
    """Return the ties recorded in the model's metadata.

    Raises:
        InputError: there is a record, but it is not a list of ties.
    """
    try:
        return tuple(restored(Tie, tie) for tie in json.loads(model.metadata_props.get(KEY, "[]")))
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"the model's metadata {KEY!r} is not a list of ties: {error!r}."
        ) from error


def join_ties(ties: Iterable[Tie]) -> tuple[Tie, ...]:
    """Return ties no two of which have a member in common; the first one's name stays."""
    joined: list[Tie] = []
    for tie in ties:
        touching, apart = [], []
        for other in joined:
            if set(other.members) & set(tie.members):
                touching.append(other)
            else:
                apart.append(other)
        index = joined.index(touching[0]) if touching else len(joined)
        apart.insert(index, _joined([*touching, tie]))
        joined = apart
    return tuple(joined)


def _joined(ties: Sequence[Tie]) -> Tie:
    members = dict.fromkeys(member for tie in ties for member in tie.members)
    places: Counter[str] = Counter()
    for tie in ties:
        places.update(tie.places)
    return Tie(ties[0].name, tuple(members), dict(places))


def check_ties(model: ir.Model, ties: Sequence[Tie], file: str = "") -> list[TieCheck]:
    """Check each tie: stored once, under one of its names, and read directly in every place.

    A tie holds when exactly one of its members is an initializer, no other stored tensor has
    its bytes or their transpose, no node of ``VIEWS`` reads it, and it is used at least once
    per member, uses in subgraphs and behind a DequantizeLinear counted; where the tie says how
    many of its places are in this ``file`` of several, that often.
    """
    if not ties:
        return []
    items = stored(model)
    copies = find_copies([item.tensor for item in items])
    return [_check(tie, tie.places_in(file), model, items, copies) for tie in ties]


def _check(
    tie: Tie, wanted: int, model: ir.Model, items: Sequence[Stored], copies: Sequence[Copies]
) -> TieCheck:
    holders = [name for name in tie.members if name in model.graph.initializers]
    if not holders:
        reason = f"none of its {len(tie.members)} names is an initializer"
        return TieCheck(tie.name, False, reason)
    if len(holders) > 1:
        reason = f"stored {len(holders)} times: initializers {', '.join(holders)}"
        return TieCheck(tie.name, False, reason)
    weight = model.graph.initializers[holders[0]]
    for broken in (_stored_again(weight, items, copies), _hidden(weight), _unused(weight, wanted)):
        if broken:
            return TieCheck(tie.name, False, f"{weight.name} {broken}")
    return TieCheck(tie.name, True)


def _stored_again(
    weight: ir.Value, items: Sequence[Stored], copies: Sequence[Copies]
) -> str | None:
    for group in copies:
        alike = [items[i] for i in (group.first, *group.identical, *group.transposed)]
        others = [item.name for item in alike if item.value is not weight]
        if len(others) < len(alike):
            return f"is stored again, as it is or transposed, as {', '.join(others)}"
    return None


def _hidden(weight: ir.Value) -> str | None:
    hiding = [node for node in weight.consumers() if is_op(node, *VIEWS)]
    if not hiding:
        return None
    where = f"{hiding[0].op_type} node {hiding[0].name}"
    if len(hiding) > 1:
        where += f" and {len(hiding) - 1} more"
    return f"is hidden behind {where}; quantizers do not see it"


def _unused(weight: ir.Value, wanted: int) -> str | None:
    nodes = []
    for value in (weight, *_dequantized(weight)):
        for use in value.uses():
            if not is_op(use.node, "DequantizeLinear"):
                nodes.append(str(use.node.name))
    if len(nodes) >= wanted:
        return None
    listed = ", ".join(nodes) or "none"
    return f"stands for {wanted} places but is used {len(nodes)} times: {listed}"


def _dequantized(weight: ir.Value) -> Iterator[ir.Value]:
    for node, index in weight.uses():
        if is_op(node, "DequantizeLinear") and index == 0:
            yield node.outputs[0]
