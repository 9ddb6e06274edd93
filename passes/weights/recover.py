"""Recovery: train a merged model in place until it computes what the original computed.

Needs no labels. The loss of a position is the divergence of its logits from the original's plus,
averaged over the layers, the squared error of its hidden state relative to the original's squared
norm. It is averaged over all positions of a step that are no padding, on whatever process they
are, so the number of processes changes the result by rounding only.
"""

import copy
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast, reduce
from torch import Tensor, nn

from ffmerge.config import MIXED_PRECISION, RecoverConfig
from ffmerge.errors import InputError
from ffmerge.models import narrowed, tasks, ties
from ffmerge.models.data import Data, examples_for
from ffmerge.models.examples import Examples
from ffmerge.models.find import find
from ffmerge.models.finite import check_has_weights, check_weights
from ffmerge.models.metrics import for_task
from ffmerge.models.offload import device_of
from ffmerge.models.probe import Array
from ffmerge.models.record import merge_record
from ffmerge.passes.weights.parts import rows_by_gradients, split
from ffmerge.passes.weights.processes import join
from ffmerge.passes.weights.recovery_loss import loss_of, weights_of, wide
from ffmerge.passes.weights.recovery_state import FILE, Saved, what_tells
from ffmerge.progress import Progress, silent

_RISE = 0.3  # part of the steps in which the learning rate rises
_CLIP = 1.0  # largest norm of the gradient


@dataclass(frozen=True)
class Recovery:
    """What was trained: parameters by name, and the loss of every step, before it was taken."""

    trained: tuple[str, ...]
    losses: tuple[float, ...]


def clone_sharing_parameters(model: nn.Module) -> Any:
    """Return other modules around the same Parameter objects and buffers.

    Merging gives ``model`` new Parameters: a clone made before remains the original, and takes
    memory only for what the merge replaced.
    """
    check_has_weights(model)
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def recover_(
    model: Any,
    original: Any,
    data: Data,
    config: RecoverConfig = RecoverConfig(),
    progress: Progress = silent,
    folder: Path | None = None,
) -> Recovery:
    """Train ``model`` in place towards ``original``; ties hold, every dtype stays.

    ``original`` may share Parameters with ``model`` (:func:`clone_sharing_parameters`): of those
    that are trained it gets copies. Weights of 16 bits are trained in 32. Under ``accelerate
    launch`` or torchrun every process calls this with the same arguments and takes its share of
    each batch. With ``folder``, one all processes see, a run that was killed goes on from its last
    saved state, and ends with the parameters it would have had.

    Raises:
        InputError: the settings, the data or the saved state do not fit, or the loss diverges.
    """
    check_weights(model)
    check_weights(original, "the original")
    mixed = _in_bfloat16(config)
    about = asdict(config)
    config = replace(config, task=_task(model, config))
    examples = examples_for(model, data, config.task)
    state = join()
    if original is model:
        raise InputError(
            "recovery follows the original: keep it with clone_sharing_parameters before merging."
        )
    trained = _trained(model, config.parts)
    _part_(original, {id(parameter) for parameter in trained.values()})
    parameters = list(trained.values())
    with _training(model, original, parameters, state.device):
        for parameter in parameters:
            broadcast(parameter.data)
        optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
        saved, losses = None, []
        if folder:
            about |= what_tells(model, original, examples)
            norm = math.sqrt(sum(float(p.detach().square().sum()) for p in parameters))
            saved = Saved(folder / FILE, trained, optimizer, about, norm)
            losses = saved.read()
            _check_shared(folder, len(losses), parameters[0].device)
        order = islice(_order(len(examples), config.seed), len(losses) * config.batch_size, None)
        for step in range(len(losses), config.steps):
            mine = [*islice(order, config.batch_size)][state.process_index :: state.num_processes]
            rows = examples.of([examples.rows[i] for i in mine])
            batches = [*_micro_batches(model, original, config, rows)]
            with torch.autocast(state.device.type, torch.bfloat16, enabled=mixed):
                losses.append(_backward(model, original, config, batches, parameters))
            if not math.isfinite(losses[-1]):
                raise InputError(
                    f"recovery diverged at step {step}: take a learning rate below "
                    f"{config.learning_rate:g}."
                )
            nn.utils.clip_grad_norm_(parameters, _CLIP)
            optimizer.param_groups[0]["lr"] = learning_rate(step, config)
            optimizer.step()
            if saved and (step + 1) % config.save_every == 0 and state.is_main_process:
                saved.write(losses)
            progress(f"recovery: loss {losses[-1]:.4f}", step + 1, config.steps)
    return Recovery(tuple(trained), tuple(losses))


def _task(model: Any, config: RecoverConfig) -> str | None:
    """Return the task whose labels are learnt; what is given where none are."""
    if not config.labels:
        return config.task
    task = tasks.task_of(model, config.task)
    if not for_task(task):
        raise InputError(f"{task} has no loss on labels here: recover without labels.")
    return task


def _check_shared(folder: Path, steps: int, device: torch.device) -> None:
    """Refuse a folder in which processes see different states."""
    done = torch.tensor(float(steps), device=device)
    if reduce(done, "mean") != done:
        raise InputError(f"{folder} is not the same for all processes: give a shared folder.")


def learning_rate(step: int, config: RecoverConfig) -> float:
    """Return the rate of a step: half a cosine up, then half a cosine down to almost nothing."""
    rise = _RISE * config.steps
    at = min((step + 0.5) / rise, (config.steps - step - 0.5) / (config.steps - rise))
    return config.learning_rate * (1 - math.cos(math.pi * at)) / 2


def _in_bfloat16(config: RecoverConfig) -> bool:
    """Tell whether to compute in bfloat16, as is asked for or ``accelerate launch`` was told."""
    precision = config.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in MIXED_PRECISION:
        raise InputError(f"recovery is asked for mixed precision {precision!r}, not no or bf16.")
    return precision == "bf16"


def _trained(model: Any, parts: str) -> dict[str, nn.Parameter]:
    """Return what to train by its first name, a tied parameter once."""
    kept = {id(p) for p in model.parameters() if p.is_floating_point() and p.requires_grad}
    if parts == "merged":
        record = merge_record(model.config)
        if not record:
            raise InputError("nothing is merged in this model: merge it, or recover all parts.")
        found = find(model)
        maps = [*ties.maps_of(model, ties.groups_of(found, record)).values()]
        for member in narrowed.members(found, record):
            maps += [model.get_submodule(path) for path in member.maps]
        kept &= {id(parameter) for module in maps for parameter in module.parameters()}
    return {name: p for name, p in model.named_parameters() if id(p) in kept}


def _part_(original: nn.Module, trained: set[int]) -> None:
    """Give the original Parameters of its own for those, by id, that are going to change."""
    copies = {id(p): copy.deepcopy(p) for p in original.parameters() if id(p) in trained}
    for module in original.modules():
        for name, parameter in module._parameters.items():
            module._parameters[name] = copies.get(id(parameter), parameter)


@contextmanager
def _training(
    model: Any, original: Any, trained: list[nn.Parameter], device: torch.device
) -> Iterator[None]:
    """Put both models on the device, in float32 and evaluation mode; undo all of it at the end.

    Of models that are offloaded only what is trained is put there. Without dropout the two compute
    the same function as far as their weights agree.
    """
    with _evaluated((model, original), device):
        for parameter in trained:
            parameter.data = parameter.data.to(device_of(model))
        with _wide_parameters((*model.parameters(), *original.parameters())):
            for parameter in trained:
                parameter.requires_grad_()
            yield


@contextmanager
def _evaluated(models: Sequence[Any], device: torch.device) -> Iterator[None]:
    """Put models on the device and in evaluation mode; at the end back, in the mode of before."""
    before = [(each, each.training, each.device) for each in models]
    # looked at before one is moved: the other may share its parameters
    at_home = [each for each in models if each.device.type == device_of(each).type == "cpu"]
    try:
        for each in models:
            each.eval()
        for each in at_home:
            each.to(device)
        yield
    finally:
        for each, mode, home in before:
            each.train(mode)
            if home.type == "cpu":
                each.to(home)


@contextmanager
def _wide_parameters(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Let parameters be float32 at least, and none of them trained; undo it at the end."""
    before = {p: (p.dtype, p.requires_grad) for p in parameters}
    try:
        for parameter in before:
            if parameter.is_floating_point():
                parameter.data = wide(parameter.data)
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, (dtype, wanted) in before.items():
            parameter.grad = None
            parameter.data = parameter.data.to(dtype)
            parameter.requires_grad_(wanted)


def _order(rows: int, seed: int) -> Iterator[int]:
    """Yield the numbers below ``rows`` again and again, each time in another order."""
    for epoch in count():
        yield from np.random.default_rng([seed, epoch]).permutation(rows).tolist()


def _micro_batches(
    model: Any, original: Any, config: RecoverConfig, rows: Examples
) -> Iterator[dict[str, Array]]:
    """Yield the rows of a step, as many at a time as are asked for, or as memory is there for."""
    if config.micro_batch:
        yield from rows.batches(config.micro_batch)
        return
    for batch in rows.batches(len(rows) or 1):

        def loss(row: dict[str, Array]) -> Tensor:
            share = {
                kind: count / count.sum() for kind, count in weights_of(model, config, row).items()
            }
            return loss_of(model, original, config, row, share)

        yield from split(batch, rows_by_gradients(model, batch, loss))


def _backward(
    model: Any,
    original: Any,
    config: RecoverConfig,
    batches: list[dict[str, Array]],
    parameters: list[nn.Parameter],
) -> float:
    """Set the gradients of one step, of all processes together, and return its loss."""
    for parameter in parameters:
        parameter.grad = None
    device = parameters[0].device
    weights = [weights_of(model, config, batch) for batch in batches]
    kinds = ("", model.main_input_name, "decoder_input_ids", "labels")
    sums = torch.zeros(len(kinds), device=device)
    for counts in weights:
        sums += torch.tensor([float(counts[kind].sum()) for kind in kinds], device=device)
    totals = dict(zip(kinds, reduce(sums, "sum").clamp(min=1).tolist(), strict=True))
    total = torch.zeros((), device=device)
    for batch, counts in zip(batches, weights, strict=True):
        share = {kind: (count / totals[kind]).to(device) for kind, count in counts.items()}
        loss = loss_of(model, original, config, batch, share)
        loss.backward()
        total += loss.detach()
    for parameter in parameters:  # a process without a row, or a part no row reaches, has none
        own = parameter.grad
        if own is None:
            own = torch.zeros_like(parameter)
        parameter.grad = reduce(own, "sum")
    return float(reduce(total, "sum"))
