"""How wide each sublayer is to be, for a model of a given size.

The method ``narrow`` and the search of its budget ask. What a width costs is forecast to second
order: the mean square of what the sublayer's output then misses (``narrow.forecast``), times how
far the model's own output moves with it (:func:`sensitivities`). Neurons go, some at a time, where
they cost least for each parameter.
"""

import heapq
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ffmerge.models.inputs import forward, main_output, unchunked
from ffmerge.models.sublayer import FeedForward
from ffmerge.passes.weights import narrow
from ffmerge.passes.weights.abreast import Batch
from ffmerge.passes.weights.activations import Batches, hooked
from ffmerge.passes.weights.elimination import Matrix
from ffmerge.passes.weights.parts import rows_by_gradients, split
from ffmerge.progress import Progress, silent

Widths = dict[FeedForward, int]
Costs = Mapping[FeedForward, Matrix]  # by how many neurons are gone, from none on

_STEP = 64  # neurons that go at a time: blocks of 32 and 64 weights then stay whole
_STEPS = 16  # of which a sublayer has at least so many
_POSITIONS = 2_048  # that sensitivities are taken from


def chosen(
    model: Any,
    members: Sequence[FeedForward],
    remove: int,
    batches: Callable[[], Batches],
    progress: Progress = silent,
) -> Widths:
    """Return the widths that are forecast to cost least."""
    costs = narrow.forecast(model, members, batches(), progress)
    weights = sensitivities(model, members, batches())
    return cheapest(model, {m: weights[m] * cost for m, cost in costs.items()}, remove)


def cheapest(model: Any, costs: Costs, remove: int) -> Widths:
    """Return the widths that cost least in all, of those that rid the model of ``remove``."""
    widths = {member: member.d_ff for member in costs}
    offers: list[tuple[float, int, FeedForward, int]] = []

    def offer(number: int, member: FeedForward) -> None:
        width, step = widths[member], step_of(member)
        new = (width - 1) // step * step
        if new > 0:
            price = costs[member][member.d_ff - new] - costs[member][member.d_ff - width]
            saved = (width - new) * per_neuron(model, member)
            heapq.heappush(offers, (float(price / saved), number, member, new))

    for number, member in enumerate(costs):
        offer(number, member)
    while remove > 0 and offers:
        _, number, member, new = heapq.heappop(offers)
        remove -= (widths[member] - new) * per_neuron(model, member)
        widths[member] = new
        offer(number, member)
    return widths


def step_of(member: FeedForward) -> int:
    """Return of what the widths of a sublayer are multiples."""
    step = 1
    while 2 * step <= min(_STEP, member.d_ff // _STEPS):
        step *= 2
    return step


def most(model: Any, members: Sequence[FeedForward]) -> int:
    """Return how many parameters can go."""
    return sum((m.d_ff - step_of(m)) * per_neuron(model, m) for m in members)


def per_neuron(model: Any, member: FeedForward) -> int:
    """Return the parameters that go with one hidden neuron."""
    count = 0
    for weight in member.weights:
        if weight.neurons is not None:
            count += model.get_parameter(weight.name).numel() // member.d_ff
    return count


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
