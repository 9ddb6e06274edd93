"""Which sublayers are narrowed as one: those that a merge has share their weights.

``narrow.py`` asks for them and has them refused that it cannot narrow, before it begins.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ffmerge.errors import InputError
from ffmerge.models import ties
from ffmerge.models.offload import device_of
from ffmerge.models.record import merge_record
from ffmerge.models.sublayer import FeedForward
from ffmerge.models.ties import Unit


def units_of(model: Any, members: Sequence[FeedForward]) -> dict[FeedForward, Unit]:
    """Return by member all that use its weights.

    Raises:
        InputError: a member is run often, shares in a way that no merge has recorded, has a part
            that no width is known for, or is not all there.
    """
    units = {member: unit for unit in ties.units(model, members) for member in unit}
    _check_ties(model, units)
    for member in members:
        last = len(member.inputs)
        if any(part in ("down", "up") or (at, part) == (last, "scale") for at, part in member.keys):
            raise InputError(
                f"layer {member.layer} of {member.stack!r} has a part of its own that is not "
                "narrowed: merge by permute, average or calibrated."
            )
        if member.runs > 1:
            raise InputError(
                f"stack {member.stack!r} is shared already: one sublayer is run {member.runs} "
                "times, and only one that runs once is narrowed."
            )
    if device_of(model) != next(model.parameters()).device:
        raise InputError("narrow runs all batches side by side: leave out --offload.")
    return units


def _check_ties(model: Any, units: Mapping[FeedForward, Unit]) -> None:
    """Refuse weights that are shared in another way than a merge has recorded."""
    merged = _merged(model, units)
    unit_of = {path: unit for member, unit in units.items() for path in member.maps}
    for tie in ties.ties(model):
        touched = {unit_of.get(name.rpartition(".")[0], ()) for name in tie.members}
        if touched != {()} and not (len(touched) == 1 and touched <= merged):
            raise InputError(
                f"{tie.members[-1]} is shared with another layer already: it is not narrowed."
            )


def _merged(model: Any, units: Mapping[FeedForward, Unit]) -> set[Unit]:
    """Return the units that are groups of the merge that is recorded."""
    record = merge_record(model.config)
    if record is None:
        return set()
    groups = {(group.stack, group.layers) for group in record.groups}
    found = set()
    for unit in units.values():
        if (unit[0].stack, tuple(member.layer for member in unit)) in groups:
            found.add(unit)
    return found
