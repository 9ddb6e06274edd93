"""Merge methods: functions from the sublayers of a group to what they will share.

Every method has one signature, ``(model, members, evidence) -> SharedWeights``: ``members`` are the
sublayers of the group in layer order, ``evidence`` is what is known of the data.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ffmerge.errors import InputError
from ffmerge.models.probe import Array
from ffmerge.models.sublayer import FeedForward
from ffmerge.models.ties import SharedWeights
from ffmerge.passes.weights import align, calibrated
from ffmerge.passes.weights.moments import Moments
from ffmerge.passes.weights.recorded import Recorded
from ffmerge.passes.weights.settings import Settings


@dataclass(frozen=True)
class Evidence:
    """What a method may read: moments of the stack, settings, and the data once more.

    ``recorded`` is what the sublayers read and put out, if it is kept.
    """

    settings: Settings = field(default_factory=Settings)
    moments: Moments | None = None
    batches: Callable[[], Iterable[Mapping[str, Array]]] = tuple
    recorded: Recorded | None = None


_DIMENSIONS_PER_RANK = 64  # so that the residual stays under 1 % of the parameters

Merger = Callable[[Any, Sequence[FeedForward], Evidence], SharedWeights]


@dataclass(frozen=True)
class Method:
    """A registered method: whether it reads the moments, and whether the data once more."""

    name: str
    source: str
    needs_data: bool
    fits: bool
    merge: Merger


METHODS: dict[str, Method] = {}


def method(
    name: str, source: str, needs_data: bool = True, fits: bool = False
) -> Callable[[Merger], Merger]:
    """Register a function as the method called ``name``; ``source`` is where it comes from."""

    def register(merge: Merger) -> Merger:
        METHODS[name] = Method(name, source, needs_data, fits, merge)
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
def average(model: Any, members: Sequence[FeedForward], evidence: Evidence) -> SharedWeights:
    """Return the plain mean of the members' weights."""
    return mean_of(model, members, [None] * len(members))


@method("copy-anchor", source="a baseline: nothing is merged", needs_data=False)
def copy_anchor(model: Any, members: Sequence[FeedForward], evidence: Evidence) -> SharedWeights:
    """Return the weights of the anchor as they are."""
    return mean_of(model, [members[evidence.settings.place(len(members))]], [None])


@method("drop-ffn", source="a baseline: arXiv 2405.18218 drops sublayers")
def drop_ffn(model: Any, members: Sequence[FeedForward], evidence: Evidence) -> SharedWeights:
    """Return the anchor's weights, and for the other layers the mean of what they put out."""
    kept = members[evidence.settings.place(len(members))]
    hidden = _moments(evidence).hidden
    assert hidden is not None
    shared = mean_of(model, [kept], [None]).shared
    own: list[dict[tuple[int, str], Tensor]] = []
    for m in members:
        number, bias = len(m.inputs), model.get_submodule(m.output).bias
        w_out = align.neurons(model, m)[number, "weight"]
        mean = hidden.mean[m.layer][0] @ w_out
        keeps = float(m is kept)
        old = torch.zeros_like(mean) if bias is None else bias.detach().to(mean)
        parts = {"scale": torch.full_like(mean, keeps), "bias": old + (1 - keeps) * mean}
        like = model.get_parameter(m.weights[0].name)
        biases = {key: b.clone() for key, b in shared.items() if key[1] == "bias"}
        own.append(biases | {(number, part): value.to(like) for part, value in parts.items()})
    return SharedWeights({key: value for key, value in shared.items() if key[1] != "bias"}, own)


@method("permute", source="arXiv 2501.06126, equations (1) to (6)")
def permute(model: Any, members: Sequence[FeedForward], evidence: Evidence) -> SharedWeights:
    """Return the mean of the members' weights after each is aligned to the anchor.

    Hidden neurons of the others are reordered in W_in, b_in and W_out; b_out lives in model space
    and is averaged as it is (equation 6).
    """
    return mean_of(model, members, orders(members, evidence))


@method("weights", source="arXiv 2209.04836, Git Re-Basin, section 3.2", needs_data=False)
def weights(model: Any, members: Sequence[FeedForward], evidence: Evidence) -> SharedWeights:
    """Return the mean after aligning by the weights alone: every member to the mean of the rest."""
    rows = [torch.cat([*align.neurons(model, m).values()], 1) for m in members]
    similarity = {
        (a, b): rows[a] @ rows[b].T for a in range(len(rows)) for b in range(len(rows)) if a != b
    }
    return mean_of(model, members, align.jointly(similarity, len(rows)))


def orders(members: Sequence[FeedForward], evidence: Evidence) -> list[Tensor | None]:
    """Return for each member the order of its neurons, by equation (2); None for the anchor.

    Raises:
        InputError: there is no calibration data.
    """
    moments = _moments(evidence)
    layers = [m.layer for m in members]
    if evidence.settings.anchor == "joint":
        pairs = [(a, b) for a in range(len(layers)) for b in range(len(layers)) if a != b]
        found = {(a, b): moments.correlation(layers[a], layers[b]) for a, b in pairs}
        return align.jointly(found, len(layers))
    anchor = layers[evidence.settings.place(len(layers))]
    return [
        None if layer == anchor else align.match(moments.correlation(anchor, layer))
        for layer in layers
    ]


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


@method(
    "calibrated",
    source="weighted mean, scales as in REPAIR, least squares: see calibrated.py",
    fits=True,
)
def calibrate(model: Any, members: Sequence[FeedForward], evidence: Evidence) -> SharedWeights:
    """Return weights, and of each layer scale and bias, that keep the members' outputs."""
    settings = replace(evidence.settings, rank=0)
    return _calibrated(model, members, replace(evidence, settings=settings))


@method(
    "residual", source="calibrated, with arXiv 2410.20672's low-rank part of each layer", fits=True
)
def residual(model: Any, members: Sequence[FeedForward], evidence: Evidence) -> SharedWeights:
    """Return what ``calibrated`` does with a residual of low rank to each map of each layer."""
    rank = evidence.settings.rank or max(1, members[0].d_model // _DIMENSIONS_PER_RANK)
    settings = replace(evidence.settings, rank=rank)
    return _calibrated(model, members, replace(evidence, settings=settings))


def _calibrated(model: Any, members: Sequence[FeedForward], evidence: Evidence) -> SharedWeights:
    found, again, recorded = orders(members, evidence), evidence.batches, evidence.recorded
    moments, settings = _moments(evidence), evidence.settings
    return calibrated.fit(model, members, found, moments, again, settings, recorded)


def _moments(evidence: Evidence) -> Moments:
    if evidence.moments is None:
        raise InputError("this method aligns activations: it needs calibration data.")
    return evidence.moments
