"""A tie is one ``Parameter`` object that stands in several places of a model."""

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ffmerge.errors import InputError, TieError
from ffmerge.models.find import find
from ffmerge.models.modeling_ffmerge import give_own_
from ffmerge.models.record import Group, MergeRecord, Tie
from ffmerge.models.sublayer import FeedForward, stacks

Groups = Sequence[Sequence[FeedForward]]
Key = tuple[int, str]


def ties(model: nn.Module) -> tuple[Tie, ...]:
    """Return every parameter that stands under more than one name, in the model's own order."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return tuple(Tie(same[0], tuple(same)) for same in names.values() if len(same) > 1)


@dataclass(frozen=True)
class SharedWeights:
    """What takes the place of a group's weights.

    ``shared`` are the tensors that all members use, ``own`` those of each member, in the order of
    the members. Keys are those of :attr:`FeedForward.keys`: number of the map and part.
    """

    shared: Mapping[Key, Tensor]
    own: Sequence[Mapping[Key, Tensor]] = ()

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the parts that each member has for itself."""
        return tuple(sorted({part for own in self.own for _, part in own}))


def tie_(model: nn.Module, groups: Groups, sharings: Sequence[SharedWeights]) -> None:
    """Make the members of each group use one new Parameter per shared tensor, and their own."""
    for members, sharing in zip(groups, sharings, strict=True):
        needs_grad = model.get_parameter(members[0].weights[0].name).requires_grad
        common = {key: nn.Parameter(t, needs_grad) for key, t in sharing.shared.items()}
        for member, own in zip(members, sharing.own or [{}] * len(members), strict=True):
            for number, path in enumerate(member.maps):
                module = model.get_submodule(path)
                mine = {part: t for (at, part), t in own.items() if at == number}
                added = {part: t for part, t in mine.items() if getattr(module, part, None) is None}
                if added:
                    give_own_(module, added)
                for part in mine.keys() - added.keys():
                    setattr(module, part, nn.Parameter(mine[part], needs_grad))
                for (at, part), parameter in common.items():
                    if at == number:
                        setattr(module, part, parameter)


@contextmanager
def tied(model: nn.Module, groups: Groups, sharings: Sequence[SharedWeights]) -> Iterator[None]:
    """Tie as :func:`tie_` for the length of the block, then put the original modules back."""
    paths = [path for members in groups for member in members for path in member.maps]
    modules = [model.get_submodule(path) for path in paths]
    before = [(m.__class__, dict(vars(m)), dict(m._parameters)) for m in modules]
    tie_(model, groups, sharings)
    try:
        yield
    finally:
        for module, (kind, attributes, parameters) in zip(modules, before, strict=True):
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(attributes, _parameters=parameters)


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
        if weight.name.rpartition(".")[2] not in record.own
    ]


def maps_of(model: nn.Module, record: MergeRecord) -> dict[str, nn.Module]:
    """Return the maps of all groups as ``modeling_ffmerge.maps_of`` does, found by structure."""
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    return {
        f"{number}.{member.layer}.{place}": model.get_submodule(path)
        for number, group in enumerate(record.groups)
        for member in members_of(model, group)
        for place, path in enumerate(sorted(member.maps, key=order.__getitem__))
    }


def _place_(model: nn.Module, name: str, parameter: Any) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, parameter)
