"""A tie is one ``Parameter`` object that stands in several places of a model."""

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ffmerge.errors import InputError, TieError
from ffmerge.models.feedforward import FeedForward, find, stacks
from ffmerge.models.plan import Group, MergeRecord, Tie

Groups = Sequence[Sequence[FeedForward]]


def ties(model: nn.Module) -> tuple[Tie, ...]:
    """Return every parameter that stands under more than one name, in the model's own order."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return tuple(Tie(same[0], tuple(same)) for same in names.values() if len(same) > 1)


def tie_(model: nn.Module, groups: Groups, shared: Sequence[Sequence[Tensor]]) -> None:
    """Make the members of each group use one new Parameter per tensor, in ``weights`` order."""
    for members, tensors in zip(groups, shared, strict=True):
        for position, tensor in enumerate(tensors):
            first = model.get_parameter(members[0].weights[position].name)
            parameter = nn.Parameter(tensor, requires_grad=first.requires_grad)
            for member in members:
                _place_(model, member.weights[position].name, parameter)


@contextmanager
def tied(model: nn.Module, groups: Groups, shared: Sequence[Sequence[Tensor]]) -> Iterator[None]:
    """Tie as :func:`tie_` for the length of the block, then put the original Parameters back."""
    names = [weight.name for members in groups for member in members for weight in member.weights]
    originals = {name: model.get_parameter(name) for name in names}
    tie_(model, groups, shared)
    try:
        yield
    finally:
        for name, parameter in originals.items():
            _place_(model, name, parameter)


def members_of(model: nn.Module, group: Group) -> tuple[FeedForward, ...]:
    """Return the sublayers of a group, anchor first.

    Raises:
        InputError: the model has no such stack or layers.
    """
    by_stack = stacks(find(model))
    if group.stack not in by_stack:
        raise InputError(
            f"no stack {group.stack!r} in the model: it has {', '.join(by_stack) or 'none'}."
        )
    by_layer = {sublayer.layer: sublayer for sublayer in by_stack[group.stack]}
    missing = [layer for layer in group.layers if layer not in by_layer]
    if missing:
        raise InputError(
            f"layer {missing[0]} is out of range: stack {group.stack!r} has layers "
            f"{min(by_layer)} to {max(by_layer)}."
        )
    return tuple(by_layer[layer] for layer in group.layers)


def dropped_names(model: nn.Module, record: MergeRecord) -> set[str]:
    """Return the parameter names a merged checkpoint leaves out: all members but the anchor."""
    return {name for name, _ in _pairs(model, record)}


def retie_(model: nn.Module, record: MergeRecord) -> None:
    """Give every member of every recorded group its anchor's Parameter objects."""
    for name, source in _pairs(model, record):
        _place_(model, name, model.get_parameter(source))


def check(
    model: nn.Module, record: MergeRecord, same: Callable[[Any, Any], bool] = operator.is_
) -> None:
    """Raise TieError unless every recorded group shares its Parameter objects, or equal ones."""
    for name, source in _pairs(model, record):
        if not same(model.get_parameter(name), model.get_parameter(source)):
            raise TieError(
                f"{name} no longer shares the weights of {source}, as the merge recorded: merge "
                "again, use ffmerge.load, or take ffmerge out of config.json to have them apart."
            )


def _pairs(model: nn.Module, record: MergeRecord) -> list[tuple[str, str]]:
    """Return the name of every member's parameter with that of its anchor's."""
    return [
        (weight.name, source.name)
        for anchor, *others in (members_of(model, group) for group in record.groups)
        for member in others
        for weight, source in zip(member.weights, anchor.weights, strict=True)
    ]


def _place_(model: nn.Module, name: str, parameter: Any) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, parameter)
