"""Merge methods: functions from the weights of a group to the weights it will share.

Every method has one signature, ``(model, members, moments) -> tensors``: ``members`` are the
sublayers of the group, anchor first; the tensors come in the order of ``FeedForward.weights``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ffmerge.errors import InputError
from ffmerge.models.feedforward import FeedForward
from ffmerge.passes.weights.align import match
from ffmerge.passes.weights.statistics import Moments

Merger = Callable[[Any, Sequence[FeedForward], Moments | None], list[Tensor]]


@dataclass(frozen=True)
class Method:
    """A registered method; ``needs_data`` tells whether it reads the moments."""

    name: str
    source: str
    needs_data: bool
    merge: Merger


METHODS: dict[str, Method] = {}


def method(name: str, source: str, needs_data: bool = True) -> Callable[[Merger], Merger]:
    """Register a function as the method called ``name``; ``source`` is where it comes from."""

    def register(merge: Merger) -> Merger:
        METHODS[name] = Method(name, source, needs_data, merge)
        return merge

    return register


def get(name: str) -> Method:
    """Return a method by name.

    Raises:
        InputError: there is no such method.
    """
    if name not in METHODS:
        raise InputError(f"there is no method {name!r}: choose one of {', '.join(METHODS)}.")
    return METHODS[name]


@method("average", source="arXiv 2501.06126, 'vanilla'", needs_data=False)
def average(model: Any, members: Sequence[FeedForward], moments: Moments | None) -> list[Tensor]:
    """Return the plain mean of the members' weights."""
    return mean(model, members, [None] * len(members))


@method("permute", source="arXiv 2501.06126, equations (1) to (6)")
def permute(model: Any, members: Sequence[FeedForward], moments: Moments | None) -> list[Tensor]:
    """Return the mean of the members' weights after each is aligned to the anchor.

    The anchor is the first member. Hidden neurons of the others are reordered in W_in, b_in and
    W_out; b_out lives in model space and is averaged as it is (equation 6).
    """
    if moments is None:
        raise InputError("method 'permute' aligns activations: it needs calibration data.")
    anchor, *others = members
    orders = [match(moments.correlation(anchor.layer, other.layer)) for other in others]
    return mean(model, members, [None, *orders])


def mean(
    model: Any, members: Sequence[FeedForward], orders: Sequence[Tensor | None]
) -> list[Tensor]:
    """Return equations (3) to (6): the mean over members, reordered where ``orders`` says so.

    Sums in float64, so that k equal members give exactly their common value.
    """
    shared = []
    for position, weight in enumerate(members[0].weights):
        parameters = [model.get_parameter(m.weights[position].name).detach() for m in members]
        total = torch.zeros_like(parameters[0], dtype=torch.float64)
        for parameter, order in zip(parameters, orders, strict=True):
            total += parameter if order is None else weight.reordered(parameter, order)
        shared.append((total / len(members)).to(parameters[0].dtype))
    return shared
