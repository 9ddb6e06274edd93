"""One narrowed sublayer trained alone, until it puts out what it should: local distillation.

``narrow.py`` calls :func:`tune` once W_out is solved for, with what the sublayer reads in the
narrowed model and what it is to put out. The closed form leaves the neurons that stay as they are;
here they move too. What lies between the maps is not known by name: :func:`as_function` looks among
the activations of transformers for the one that gives what was seen.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import permutations

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers.activations import ACT2CLS, ACT2FN

from ffmerge.models.checkpoint import quiet
from ffmerge.models.sublayer import FeedForward
from ffmerge.models.ties import Key

POSITIONS = 1024  # of a step
RATE = 1e-2  # highest step of Adam, in root mean squares of a weight
_SAME = 1e-4  # of the size of what is hidden; measured 0
_SAME_HALF = 1e-2  # in 16 bits

Parts = Mapping[Key, Tensor]
Activation = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Function:
    """A sublayer as a function of its weights; ``between`` is what lies between its maps."""

    member: FeedForward
    between: Callable[[list[Tensor]], Tensor]

    def __call__(self, parts: Parts, read: Tensor) -> Tensor:
        """Return what weights, in float32 and the layout of the model, put out for (..., d)."""
        hidden = self.between(_ups(self.member, parts, read))
        return _map(self.member, parts, len(self.member.inputs), hidden)


def as_function(member: FeedForward, parts: Parts, read: Tensor, hidden: Tensor) -> Function | None:
    """Return the function that makes ``hidden`` of what the member reads; None if none does."""
    ups = _ups(member, parts, read)
    same = _SAME
    if hidden.dtype != torch.float32:
        same = _SAME_HALF
    nearest, found = same * hidden.float().norm(), None
    for between in _candidates(len(ups)):
        off = (between(ups) - hidden.float()).norm()
        if off <= nearest:
            nearest, found = off, Function(member, between)
    return found


def tune(
    function: Function, parts: Parts, read: Tensor, target: Tensor, counts: Tensor, steps: int
) -> dict[Key, Tensor]:
    """Return weights whose outputs are nearer to ``target``, by so many steps of Adam.

    ``read`` (n, d) and ``target`` (n, d) are positions, ``counts`` (n,) what the squared error of
    each counts. Types and layouts stay.
    """
    trained = {key: value.float().clone().requires_grad_() for key, value in parts.items()}
    groups = []
    for value in trained.values():
        groups.append(
            {"params": [value], "lr": RATE * float(value.detach().square().mean().sqrt())}
        )
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(0)
    with torch.enable_grad():
        for _ in range(steps):
            some = torch.randint(len(read), (POSITIONS,), generator=generator).to(read.device)
            error = (function(trained, read[some]) - target[some]).square().sum(-1)
            optimizer.zero_grad()
            (error * counts[some]).mean().backward()
            optimizer.step()
            schedule.step()
    return {key: value.detach().to(parts[key].dtype) for key, value in trained.items()}


def _candidates(count: int) -> Iterator[Callable[[list[Tensor]], Tensor]]:
    """Yield what could lie between the maps: an activation, of gated ones times the other map."""
    for activation in _activations():
        if count == 1:
            yield partial(_plain, activation)
        for one, other in permutations(range(count), 2):
            yield partial(_gated, activation, one, other)


def _activations() -> Iterator[Activation]:
    """Yield the activations of transformers that have no weights of their own."""
    for name in ACT2CLS:
        with quiet():  # one tells of a kernel that could be installed
            activation = ACT2FN[name]
        if not any(activation.parameters()):
            yield activation


def _plain(activation: Activation, ups: list[Tensor]) -> Tensor:
    return activation(ups[0])


def _gated(activation: Activation, one: int, other: int, ups: list[Tensor]) -> Tensor:
    return activation(ups[one]) * ups[other]


def _ups(member: FeedForward, parts: Parts, read: Tensor) -> list[Tensor]:
    """Return what the maps d -> f give; a fused map counts as several."""
    found: list[Tensor] = []
    for number in range(len(member.inputs)):
        weight = member.weights[member.keys.index((number, "weight"))]
        found += _map(member, parts, number, read).chunk(weight.blocks, -1)
    return found


def _map(member: FeedForward, parts: Parts, number: int, given: Tensor) -> Tensor:
    """Return what one map of the member makes of (..., in)."""
    key = (number, "weight")
    weight = parts[key].float()
    neurons_first = member.weights[member.keys.index(key)].neurons == 0
    if neurons_first == (number == len(member.inputs)):  # stored as (in, out)
        weight = weight.T
    bias = parts.get((number, "bias"))
    return linear(given.float(), weight, None if bias is None else bias.float())
