"""How wide each sublayer is to be, for a model of a given size.

The method ``narrow`` and the search of its budget ask. What a width costs is forecast to second
order: the mean square of what the sublayer's output then misses (``narrow.forecast``), times how
far the model's own output moves with it (:func:`sensitivities`). Neurons go, some at a time, where
they cost least for each parameter; of sublayers that share their weights all are cut alike.
"""

import heapq
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ffmerge.models import ties
from ffmerge.models.inputs import forward, main_output, unchunked
from ffmerge.models.sublayer import FeedForward
from ffmerge.models.ties import Unit
from ffmerge.passes.weights import narrow
from ffmerge.passes.weights.abreast import Batch
from ffmerge.passes.weights.activations import Batches, hooked
from ffmerge.passes.weights.elimination import Matrix
from ffmerge.passes.weights.parts import rows_by_gradients, split
from ffmerge.progress import Progress, silent

Widths = dict[FeedForward, int]
Costs = Mapping[Unit, Matrix]  # by how many neurons are gone, from none on

_STEP = 64  # neurons that go at a time: blocks of 32 and 64 weights then stay whole
_STEPS = 16  # of which a sublayer has at least so many
_POSITIONS = 2_048  # that sensitivities are taken from


def chosen(
    model: Any,
    members: Sequence[FeedForward],
    remove: int,
    batches: Callable[[], Batches],
    progress: Progress = silent,
    known: dict[Unit, Matrix] | None = None,
) -> Widths:
    """Return the widths that are forecast to cost least.

    What widths cost is not forecast again where it is ``known``, and is there afterwards.
    """
    costs = {} if known is None else known
    if not costs:
        forecast = narrow.forecast(model, members, batches(), progress)
        weights = sensitivities(model, members, batches())
        for unit, cost in forecast.items():
            costs[unit] = cost * sum(weights[member] for member in unit) / len(unit)
    return cheapest(model, costs, remove)


def cheapest(model: Any, costs: Costs, remove: int) -> Widths:
    """Return the widths that cost least in all, of those that rid the model of ``remove``."""
    widths = {unit: unit[0].d_ff for unit in costs}
    offers: list[tuple[float, int, Unit, int]] = []

    def offer(number: int, unit: Unit) -> None:
        full, width, step = unit[0].d_ff, widths[unit], step_of(unit[0])
        new = (width - 1) // step * step
        if new > 0:
            price = costs[unit][full - new] - costs[unit][full - width]
            saved = (width - new) * per_neuron(model, unit)
            heapq.heappush(offers, (float(price / saved), number, unit, new))

    for number, unit in enumerate(costs):
        offer(number, unit)
    while remove > 0 and offers:
        _, number, unit, new = heapq.heappop(offers)
        remove -= (widths[unit] - new) * per_neuron(model, unit)
        widths[unit] = new
        offer(number, unit)
    return {member: width for unit, width in widths.items() for member in unit}


def step_of(member: FeedForward) -> int:
    """Return of what the widths of a sublayer are multiples."""
    step = 1
    while 2 * step <= min(_STEP, member.d_ff // _STEPS):
        step *= 2
    return step


def most(model: Any, members: Sequence[FeedForward]) -> int:
    """Return how many parameters can go."""
    count = 0
    for unit in ties.units(model, members):
        count += (unit[0].d_ff - step_of(unit[0])) * per_neuron(model, unit)
    return count


def per_neuron(model: Any, unit: Unit) -> int:
    """Return the parameters that go with one hidden neuron, shared ones once."""
    sizes = {}
    for member in unit:
        for weight in member.weights:
            if weight.neurons is not None:
                parameter = model.get_parameter(weight.name)
                sizes[id(parameter)] = parameter.numel() // member.d_ff
    return sum(sizes.values())


def parameters_of(model: Any, member: FeedForward) -> int:
    """Return the number of parameters of a sublayer."""
    return sum(model.get_parameter(weight.name).numel() for weight in member.weights)


def sensitivities(
    model: Any, members: Sequence[FeedForward], batches: Batches
) -> dict[FeedForward, float]:
    """Return how far the model's output moves where that of a sublayer moves by one.

    The sum over positions of the mean square of a gradient: that of the logarithm of a class which
    is drawn, where the output is logits, so that it is the distribution that moves (Fisher); else
    that of every output vector, its length aside, in a direction that is drawn.
    """
    generator = torch.Generator().manual_seed(0)
    total = dict.fromkeys(members, 0.0)
    moved: dict[str, Tensor] = {}
    paths = [member.output for member in members]

    def move(path: str, _: Any, args: Any, out: Tensor) -> Tensor:
        moved[path] = torch.zeros_like(out, requires_grad=True)
        return out + moved[path]

    def drawn(part: Batch) -> Tensor:
        return _drawn(forward(model, part), generator)

    seen = 0
    with torch.enable_grad(), hooked(model, paths, move), unchunked(model):
        for batch in batches:
            for part in split(batch, rows_by_gradients(model, batch, drawn)):
                grads = torch.autograd.grad(drawn(part), [moved[path] for path in paths])
                for member, grad in zip(members, grads, strict=True):
                    total[member] += float(grad.double().square().mean(-1).sum())
                seen += grads[0][..., 0].numel()
                if seen >= _POSITIONS:
                    return total
    return total


def _drawn(out: Any, generator: torch.Generator) -> Tensor:
    """Return one number of the output, which is drawn."""
    if "logits" in out:
        logs = out["logits"].flatten(0, -2).float().log_softmax(-1)
        labels = torch.multinomial(logs.detach().exp().cpu(), 1, generator=generator)
        return logs.gather(-1, labels.to(logs.device)).sum()
    vectors = torch.nn.functional.normalize(main_output(out).float(), dim=-1)
    direction = torch.randn(vectors.shape, generator=generator)
    return (vectors * direction.to(vectors.device)).sum()
