"""Which sublayers a merge may tie: the stacks that are asked for, and the windows of their layers.

``merge_`` asks for the stacks and for the choices of each search; the search tries the choices.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ffmerge.config import MergeConfig
from ffmerge.errors import InputError
from ffmerge.models.prove import proven
from ffmerge.models.record import ALREADY, merge_record
from ffmerge.models.sublayer import FeedForward, stacks

NARROW = "narrow"  # the method whose budget is met by widths, and that takes what is merged, too
Members = tuple[FeedForward, ...]
Choice = tuple[Members, ...]  # what one candidate would tie, group by group
Stacks = Mapping[str, Members]


def find_stacks(model: Any, config: MergeConfig) -> dict[str, Members]:
    """Return the sublayers to choose from by stack, each proved to be one.

    Raises:
        InputError: the model has none, or not the stacks that are asked for.
    """
    record = merge_record(model.config)
    if record and (config.method != NARROW or record.narrowed):
        raise InputError(ALREADY)
    found, left = proven(model)
    by_name = stacks(found)
    if not by_name:
        why = [f"{part.path} is left alone: {part.reason}" for part in left]
        why.append("no feed-forward sublayer is found in it")
        raise InputError(f"{type(model).__name__} cannot be merged: {why[0]}.")
    together = model.config.is_encoder_decoder or config.method == NARROW
    names = _names(config)
    if not names and len(by_name) > 1 and not together:
        raise InputError(
            f"the model has several stacks ({', '.join(by_name)}): choose by --stack, which may "
            "be given several times."
        )
    for name in names:
        if name not in by_name:
            raise InputError(f"no stack {name!r} in the model: it has {', '.join(by_name)}.")
    return {name: by_name[name] for name in names or by_name}


def _names(config: MergeConfig) -> tuple[str, ...]:
    """Return the stacks that are asked for, by themselves or by their windows."""
    if not isinstance(config.window, Mapping):
        return config.stacks
    if config.stacks and set(config.stacks) != set(config.window):
        raise InputError("give a window for each of the stacks, or one for all of them.")
    return config.stacks or tuple(config.window)


def windows(by_stack: Stacks, config: MergeConfig) -> list[Choice]:
    """Return what to try in these stacks: the given windows, or all of k layers, in all alike.

    Raises:
        InputError: a window or k does not fit the stacks.
    """
    if config.window is None:
        layers = _spans(by_stack, config.k or 0)
    else:
        layers = [[_given(name, found, config.window) for name, found in by_stack.items()]]
    choices = []
    for spans in layers:
        choice = []
        for members, span in zip(by_stack.values(), spans, strict=True):
            choice.append(tuple(member for member in members if member.layer in span))
        if all(map(_of_one_shape, choice)):
            choices.append(tuple(choice))
    if not choices:
        raise InputError("no window holds sublayers of one size: they cannot share weights.")
    return choices


def shape_key(sublayer: FeedForward) -> tuple[Any, ...]:
    """Return what must be equal in sublayers that are to share weights."""
    weights = [(weight.neurons, weight.blocks) for weight in sublayer.weights]
    return (sublayer.d_model, sublayer.d_ff, *weights)


def _of_one_shape(members: Members) -> bool:
    return len({shape_key(member) for member in members}) == 1


def _given(name: str, members: Members, window: Any) -> Sequence[int]:
    """Return the layers of the window that is given for all stacks, or for this one."""
    first, last = window[name] if isinstance(window, Mapping) else window
    layers = [member.layer for member in members]
    if first not in layers or last not in layers or last <= first:
        where = f"stack {name!r} has layers {layers[0]} to {layers[-1]}"
        raise InputError(f"window {first}-{last} is out of range: {where}.")
    return range(first, last + 1)


def _spans(by_stack: Stacks, k: int) -> list[list[Sequence[int]]]:
    """Return every k layers in a row that all stacks have, once for each stack."""
    for name, members in by_stack.items():
        size, runs = len(members), members[0].runs
        if size == 1 and runs > 1:
            raise InputError(f"stack {name!r} is shared already: one sublayer is run {runs} times.")
        if not 2 <= k <= size:
            raise InputError(
                f"k = {k} does not fit: stack {name!r} has {size} layers, so k is 2 to {size}."
            )
    layers = [{member.layer for member in members} for members in by_stack.values()]
    common = sorted(set.intersection(*layers))
    return [[common[i : i + k]] * len(by_stack) for i in range(len(common) - k + 1)]
