"""Merge methods: functions from the sublayers of a group to what takes the place of their weights.

The search calls a method with the model, the sublayers of one group in layer order, the anchor
first, and the evidence, and puts what it returns into the model to measure it:

    @method("average", source="arXiv 2501.06126, 'vanilla'", statistics=False)
    def average(model, members, evidence):
        return SharedWeights({...})

What is tried is every window of k layers of each stack, unless a method brings ``choices`` of its
own. What shares nothing is narrowed: its layers have fewer neurons each (``narrow.py``). A method
that makes a model smaller in a way that no checkpoint holds returns :class:`Temporary`: it can be
compared with, not saved (``rivals.py``).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

import torch
from torch import Tensor

from ffmerge.errors import InputError
from ffmerge.models import ties
from ffmerge.models.record import Group, Narrowed
from ffmerge.models.sublayer import FeedForward, stacks
from ffmerge.models.ties import SharedWeights
from ffmerge.passes.weights import align, calibrated, narrow, widths
from ffmerge.passes.weights.evidence import Evidence
from ffmerge.passes.weights.windows import Choice, Members, Stacks

_DIMENSIONS_PER_RANK = 64  # so that the residual stays under 1 % of the parameters


@dataclass(frozen=True)
class Temporary:
    """A change that stands in the model while ``applied()`` lasts, and rids it of parameters."""

    removed: int
    applied: Callable[[], AbstractContextManager[None]]


Change = SharedWeights | Temporary
Merged = dict[Members, Change]  # by the sublayers of a group
Merger = Callable[[Any, Sequence[FeedForward], Evidence], Change]
Chooser = Callable[[Any, Stacks, int], list[Choice]]


@dataclass(frozen=True)
class Method:
    """A registered method: see :func:`method`."""

    name: str
    source: str
    merge: Merger
    statistics: bool
    saved: bool
    choices: Chooser | None


METHODS: dict[str, Method] = {}


def method(
    name: str,
    source: str,
    statistics: bool = True,
    saved: bool = True,
    choices: Chooser | None = None,
) -> Callable[[Merger], Merger]:
    """Register a function as the method called ``name``; ``source`` is where it comes from.

    ``statistics``: its evidence has moments, which needs data. ``saved``: a checkpoint can hold
    what it returns. ``choices(model, stacks, k)`` are what is tried instead of windows of k layers.
    """

    def register(merge: Merger) -> Merger:
        METHODS[name] = Method(
            name=name,
            source=source,
            merge=merge,
            statistics=statistics,
            saved=saved,
            choices=choices,
        )
        return merge

    return register


def get(name: str) -> Method:
    """Return by name a method whose result can be saved.

    One that another package registers is found by its entry point of the group
    ``ffmerge.methods``, whose module is imported only then.

    Raises:
        InputError: there is no such method.
    """
    if name not in METHODS:
        for found in entry_points(group="ffmerge.methods", name=name):
            found.load()
    known = [each.name for each in METHODS.values() if each.saved]
    if name not in known:
        raise InputError(f"there is no method {name!r}: choose one of {', '.join(known)}.")
    return METHODS[name]


@contextmanager
def in_place(model: Any, merged: Merged) -> Iterator[None]:
    """Let the changes stand in the model for the length of the block."""
    with ExitStack() as stack:
        for members, change in merged.items():
            if isinstance(change, Temporary):
                stack.enter_context(change.applied())
            else:
                stack.enter_context(ties.tied(model, [members], [change]))
        yield


def size_of(model: Any, merged: Mapping[Members, Change] | None = None) -> tuple[int, int]:
    """Return parameters and bytes of a model in which ``merged`` stands, each shared one once."""
    parameters = list(model.parameters())
    count = sum(p.numel() for p in parameters)
    size = sum(p.nbytes for p in parameters)
    for change in (merged or {}).values():
        if isinstance(change, Temporary):
            count -= change.removed
            size -= change.removed * parameters[0].element_size()
    return count, size


def own_parts(merged: Merged) -> tuple[str, ...]:
    """Return the names of the parts that members of groups have for themselves."""
    parts: set[str] = set()
    for change in merged.values():
        if isinstance(change, SharedWeights) and change.shared:
            parts.update(change.parts)
    return tuple(sorted(parts))


def groups_of(merged: Merged) -> tuple[Group, ...]:
    """Return as data which layers share."""
    groups = []
    for members, change in merged.items():
        if isinstance(change, Temporary) or change.shared:
            groups.append(Group(members[0].stack, tuple(member.layer for member in members)))
    return tuple(groups)


def narrowed_of(merged: Merged) -> tuple[Narrowed, ...]:
    """Return as data which layers have how many neurons, where none is shared."""
    found = []
    for members, change in merged.items():
        if isinstance(change, SharedWeights) and not change.shared:
            width = {}
            for member, parts in zip(members, change.own, strict=True):
                weight = parts[0, "weight"]
                width[member] = weight.shape[member.weights[0].neurons or 0]
                width[member] //= member.weights[0].blocks
            for stack, layers in stacks(members).items():
                found.append(
                    Narrowed(
                        stack=stack,
                        layers=tuple(member.layer for member in layers),
                        widths=tuple(width[member] for member in layers),
                        full=tuple(member.d_ff for member in layers),
                    )
                )
    return tuple(found)


@method("average", source="arXiv 2501.06126, 'vanilla'", statistics=False)
def average(model: Any, members: Sequence[FeedForward], evidence: Evidence) -> SharedWeights:
    """Return the plain mean of the members' weights."""
    return mean_of(model, members, [None] * len(members))


@method("copy-anchor", source="a baseline: nothing is merged", statistics=False)
def copy_anchor(model: Any, members: Sequence[FeedForward], evidence: Evidence) -> SharedWeights:
    """Return the weights of the anchor as they are."""
    return mean_of(model, members[:1], [None])


@method("drop-ffn", source="a baseline: arXiv 2405.18218 drops sublayers")
def drop_ffn(model: Any, members: Sequence[FeedForward], evidence: Evidence) -> SharedWeights:
    """Return the anchor's weights, and for the other layers the mean of what they put out."""
    anchor = members[0]
    shared = dict(mean_of(model, [anchor], [None]).shared)
    biases = {key: shared.pop(key) for key in [*shared] if key[1] == "bias"}
    own: list[dict[tuple[int, str], Tensor]] = []
    for member in members:
        number, bias = len(member.inputs), model.get_submodule(member.output).bias
        w_out = align.neurons(model, member)[number, "weight"]
        mean = evidence.hidden.mean[member.layer][0] @ w_out
        keeps = float(member is anchor)
        old = torch.zeros_like(mean) if bias is None else bias.detach().to(mean)
        parts = {"scale": torch.full_like(mean, keeps), "bias": old + (1 - keeps) * mean}
        like = model.get_parameter(member.weights[0].name)
        mine = {key: tensor.clone() for key, tensor in biases.items()}
        own.append(mine | {(number, part): value.to(like) for part, value in parts.items()})
    return SharedWeights(shared, own)


@method("permute", source="arXiv 2501.06126, equations (1) to (6)")
def permute(model: Any, members: Sequence[FeedForward], evidence: Evidence) -> SharedWeights:
    """Return the mean of the members' weights after each is aligned to the anchor.

    Hidden neurons of the others are reordered in W_in, b_in and W_out; b_out lives in model space
    and is averaged as it is (equation 6).
    """
    return mean_of(model, members, orders(members, evidence))


@method("weights", source="arXiv 2209.04836, Git Re-Basin, section 3.2", statistics=False)
def weights(model: Any, members: Sequence[FeedForward], evidence: Evidence) -> SharedWeights:
    """Return the mean after aligning by the weights alone: every member to the mean of the rest."""
    rows = [torch.cat([*align.neurons(model, member).values()], 1) for member in members]
    return mean_of(model, members, align.jointly(rows))


@method("calibrated", source="weighted mean, scales as in REPAIR, least squares: see calibrated.py")
def calibrate(model: Any, members: Sequence[FeedForward], evidence: Evidence) -> SharedWeights:
    """Return weights, and of each layer scale and bias, that keep the members' outputs."""
    return calibrated.fit(model, members, orders(members, evidence), evidence, rank=0)


@method("residual", source="calibrated, with arXiv 2410.20672's low-rank part of each layer")
def residual(model: Any, members: Sequence[FeedForward], evidence: Evidence) -> SharedWeights:
    """Return what ``calibrated`` does with a residual of low rank to each map of each layer."""
    rank = evidence.rank or max(1, members[0].d_model // _DIMENSIONS_PER_RANK)
    return calibrated.fit(model, members, orders(members, evidence), evidence, rank)


def _all_sublayers(model: Any, by_stack: Stacks, k: int) -> list[Choice]:
    """Return one choice: all of them, for as many parameters as merging k of each stack removes."""
    return [(tuple(member for members in by_stack.values() for member in members),)]


@method(
    "narrow",
    source="neurons by optimal brain surgery, W_out by ridge regression: see narrow.py",
    statistics=False,
    choices=_all_sublayers,
)
def narrow_all(model: Any, members: Sequence[FeedForward], evidence: Evidence) -> SharedWeights:
    """Return the members' own weights with fewer neurons, by as much as merging k would save."""
    remove = 0
    for layers in stacks(members).values():
        remove += ((evidence.k or 1) - 1) * widths.parameters_of(model, layers[0])
    wide = widths.chosen(model, members, remove, evidence.batches)
    return narrow.fit(model, members, wide, evidence.batches())


def orders(members: Sequence[FeedForward], evidence: Evidence) -> list[Tensor | None]:
    """Return for each member the order of its neurons, by equation (2); None for the anchor.

    Raises:
        InputError: there is no calibration data.
    """
    if not evidence.features.count:
        raise InputError("this method aligns activations: it needs calibration data.")
    anchor, *others = members
    found: list[Tensor | None] = [None]
    for other in others:
        found.append(align.match(evidence.features.correlation(anchor.layer, other.layer)))
    return found


def mean_of(
    model: Any, members: Sequence[FeedForward], orders: Sequence[Tensor | None]
) -> SharedWeights:
    """Return equations (3) to (6): the mean over members, reordered where ``orders`` says so.

    Sums in float64, so that k equal members give exactly their common value.
    """
    shared = {}
    for position, (key, weight) in enumerate(zip(members[0].keys, members[0].weights, strict=True)):
        parameters = [model.get_parameter(m.weights[position].name).detach() for m in members]
        total = torch.zeros_like(parameters[0], dtype=torch.float64)
        for parameter, order in zip(parameters, orders, strict=True):
            total += parameter if order is None else weight.reordered(parameter, order)
        shared[key] = (total / len(members)).to(parameters[0].dtype)
    return SharedWeights(shared)
