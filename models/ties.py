"""A tie is one ``Parameter`` object that stands in several places of a model.

A merge makes ties (:func:`tie_`), and tries them out while it searches (:func:`tied`). Saving
checks that they still hold and stores each once, loading makes them again: both find the sublayers
once, look up the members of each group (:func:`groups_of`) and pass these on. The exporter asks for
all ties of a model by name (:func:`ties`), whoever made them.
"""

import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

from torch import Tensor, nn

from ffmerge.errors import InputError, TieError
from ffmerge.models.modeling_ffmerge import fit_sizes_, give_own_
from ffmerge.models.record import MergeRecord, Tie
from ffmerge.models.sublayer import FeedForward, stacks

Groups = Sequence[Sequence[FeedForward]]  # the members of each, the anchor first
Unit = tuple[FeedForward, ...]  # a sublayer, or all that use the weights of one
Key = tuple[int, str]


def ties(model: nn.Module) -> tuple[Tie, ...]:
    """Return every parameter that stands under more than one name, in the model's own order."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return tuple(Tie(same[0], tuple(same)) for same in names.values() if len(same) > 1)


def units(model: nn.Module, sublayers: Sequence[FeedForward]) -> list[Unit]:
    """Return the sublayers in their order, those that use the same matrices together."""
    found: dict[tuple[int, ...], Unit] = {}
    for sublayer in sublayers:
        weights = tuple(id(model.get_submodule(path).weight) for path in sublayer.maps)
        found[weights] = (*found.get(weights, ()), sublayer)
    return [*found.values()]


@dataclass(frozen=True)
class SharedWeights:
    """What takes the place of a group's weights: what a merge method returns.

    ``shared`` are the tensors that all members use, ``own`` those of each member, in the order of
    the members. Keys are those of :attr:`FeedForward.keys`: number of the map and part. Where
    nothing is shared the members are narrowed: their own weights have fewer neurons, and a tensor
    that is there for several members was one before.
    """

    shared: Mapping[Key, Tensor]
    own: Sequence[Mapping[Key, Tensor]] = ()

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the parts that each member has for itself."""
        return tuple(sorted({part for _, part in chain.from_iterable(self.own)}))


def tie_(model: nn.Module, groups: Groups, sharings: Sequence[SharedWeights]) -> None:
    """Make the members of each group use one new Parameter per shared tensor, and their own."""
    made: dict[int, nn.Parameter] = {}
    for members, weights in zip(groups, sharings, strict=True):
        needs_grad = model.get_parameter(members[0].weights[0].name).requires_grad
        shared = {key: nn.Parameter(t, needs_grad) for key, t in weights.shared.items()}
        own = weights.own or [{}] * len(members)
        for member, tensors in zip(members, own, strict=True):
            for tensor in tensors.values():
                made.setdefault(id(tensor), nn.Parameter(tensor, needs_grad))
            _give_own_(model, member, tensors, made)
            for (number, part), parameter in shared.items():
                setattr(model.get_submodule(member.maps[number]), part, parameter)


def _give_own_(
    model: nn.Module,
    member: FeedForward,
    tensors: Mapping[Key, Tensor],
    made: Mapping[int, nn.Parameter],
) -> None:
    """Give the maps of one member its own tensors, also parts that their class does not have."""
    added: dict[str, dict[str, Tensor]] = {}
    for (number, part), tensor in tensors.items():
        path = member.maps[number]
        module = model.get_submodule(path)
        if getattr(module, part, None) is None:
            added.setdefault(path, {})[part] = tensor
        else:
            setattr(module, part, made[id(tensor)])
            fit_sizes_(module)
    for path, parts in added.items():
        give_own_(model.get_submodule(path), parts)


@contextmanager
def tied(model: nn.Module, groups: Groups, sharings: Sequence[SharedWeights]) -> Iterator[None]:
    """Tie as :func:`tie_` for the length of the block, then put the original modules back."""
    before = []
    for member in chain.from_iterable(groups):
        for path in member.maps:
            module = model.get_submodule(path)
            before.append((module, type(module), dict(vars(module)), dict(module._parameters)))
    tie_(model, groups, sharings)
    try:
        yield
    finally:
        for module, kind, attributes, parameters in before:
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(attributes, _parameters=parameters)


def groups_of(
    sublayers: Sequence[FeedForward], record: MergeRecord
) -> list[tuple[FeedForward, ...]]:
    """Return the sublayers of each group that was merged, anchor first.

    Raises:
        InputError: the model has no such stack or layers.
    """
    by_stack = stacks(sublayers)
    groups = []
    for group in record.groups:
        if group.stack not in by_stack:
            has = ", ".join(by_stack) or "none"
            raise InputError(f"no stack {group.stack!r} in the model: it has {has}.")
        by_layer = {sublayer.layer: sublayer for sublayer in by_stack[group.stack]}
        members = []
        for layer in group.layers:
            if layer not in by_layer:
                raise InputError(
                    f"layer {layer} is out of range: stack {group.stack!r} has layers "
                    f"{min(by_layer)} to {max(by_layer)}."
                )
            members.append(by_layer[layer])
        groups.append(tuple(members))
    return groups


def dropped_names(groups: Groups, own: Collection[str]) -> set[str]:
    """Return the parameter names a merged checkpoint leaves out: all members but the anchor.

    ``own`` are the parts that each member has for itself, here and below.
    """
    return {name for name, _ in _with_anchors(groups, own)}


def retie_(model: nn.Module, groups: Groups, own: Collection[str]) -> None:
    """Give every member of every group its anchor's Parameter objects."""
    for name, source in _with_anchors(groups, own):
        path, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(path), attribute, model.get_parameter(source))


def check(
    model: nn.Module,
    groups: Groups,
    own: Collection[str],
    same: Callable[[Any, Any], bool] = operator.is_,
) -> None:
    """Raise TieError unless every group shares its Parameter objects, or equal ones."""
    for name, source in _with_anchors(groups, own):
        if not same(model.get_parameter(name), model.get_parameter(source)):
            raise TieError(
                f"{name} no longer shares the weights of {source}, as the merge recorded: merge "
                "again, use ffmerge.load, or take ffmerge out of config.json to have them apart."
            )


def maps_of(model: nn.Module, groups: Groups) -> dict[str, nn.Module]:
    """Return the maps of all groups by ``group.layer.number``, numbered as the model has them."""
    order = {name: at for at, (name, _) in enumerate(model.named_modules())}
    maps = {}
    for group, members in enumerate(groups):
        for member in members:
            for number, path in enumerate(sorted(member.maps, key=order.__getitem__)):
                maps[f"{group}.{member.layer}.{number}"] = model.get_submodule(path)
    return maps


def _with_anchors(groups: Groups, own: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield the name of every member's parameter with that of its anchor's."""
    for anchor, *others in groups:
        for member in others:
            for weight, source in zip(member.weights, anchor.weights, strict=True):
                if weight.name.rpartition(".")[2] not in own:
                    yield weight.name, source.name
