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
        touching = [other for other in joined if set(other.members) & set(tie.members)]
        members = dict.fromkeys(m for t in (*touching, tie) for m in t.members)
        name = touching[0].name if touching else tie.name
        at = joined.index(touching[0]) if touching else len(joined)
        joined = [other for other in joined if other not in touching]
        places: Counter[str] = Counter()
        for each in (*touching, tie):
            places.update(each.places)
        joined.insert(at, Tie(name, tuple(members), dict(places)))
    return tuple(joined)


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
    def broken(reason: str) -> TieCheck:
        return TieCheck(tie.name, False, reason)

    holders = [name for name in tie.members if name in model.graph.initializers]
    if not holders:
        return broken(f"none of its {len(tie.members)} names is an initializer")
    if len(holders) > 1:
        return broken(f"stored {len(holders)} times: initializers {', '.join(holders)}")
    weight = model.graph.initializers[holders[0]]
    for group in copies:
        alike = [group.first, *group.identical, *group.transposed]
        if any(items[index].value is weight for index in alike):
            others = [items[index].name for index in alike if items[index].value is not weight]
            return broken(
                f"{weight.name} is stored again, as it is or transposed, as {', '.join(others)}"
            )
    hiding = [node for node in weight.consumers() if is_op(node, *VIEWS)]
    if hiding:
        first = f"{hiding[0].op_type} node {hiding[0].name}"
        more = f" and {len(hiding) - 1} more" if len(hiding) > 1 else ""
        return broken(f"{weight.name} is hidden behind {first}{more}; quantizers do not see it")
    uses = [use for value in (weight, *_dequantized(weight)) for use in value.uses()]
    uses = [use for use in uses if not is_op(use.node, "DequantizeLinear")]
    if len(uses) < wanted:
        nodes = ", ".join(str(use.node.name) for use in uses) or "none"
        places = f"stands for {wanted} places"
        return broken(f"{weight.name} {places} but is used {len(uses)} times: {nodes}")
    return TieCheck(tie.name, True)


def _dequantized(weight: ir.Value) -> Iterator[ir.Value]:
    for node, index in weight.uses():
        if is_op(node, "DequantizeLinear") and index == 0:
            yield node.outputs[0]
