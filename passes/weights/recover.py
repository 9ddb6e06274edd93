"""Recovery: train a merged model in place until it computes what the original computed.

Needs no labels. The loss of a position is the divergence of its logits from the original's plus,
averaged over the layers, the squared error of its hidden state relative to the original's squared
norm. It is averaged over all positions of a step that are no padding, on whatever process they
are, so the number of processes changes the result by rounding only.
"""

import copy
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast, reduce
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import kl_div

from ffmerge.config import MIXED_PRECISION, RecoverConfig
from ffmerge.errors import InputError
from ffmerge.models import narrowed, tasks, ties
from ffmerge.models.data import Data, examples_for
from ffmerge.models.examples import Examples
from ffmerge.models.find import find
from ffmerge.models.finite import check_weights
from ffmerge.models.inputs import forward
from ffmerge.models.metrics import IGNORED, for_task, labels_of
from ffmerge.models.offload import device_of
from ffmerge.models.probe import Array
from ffmerge.models.record import merge_record
from ffmerge.passes.weights.activations import padding_mask, positions
from ffmerge.passes.weights.parts import rows_by_gradients, split
from ffmerge.passes.weights.processes import join
from ffmerge.progress import Progress, silent

_STATES = ("hidden_states", "encoder_hidden_states", "decoder_hidden_states")
_RISE = 0.3  # part of the steps in which the learning rate rises
HASHED = 1024  # rows of the data by which it is known again
_CLIP = 1.0  # largest norm of the gradient
_FILE = "recover.safetensors"
_MOMENTS = ("exp_avg", "exp_avg_sq")  # what AdamW keeps of each parameter


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
            about |= _about(model, original, examples)
            norm = math.sqrt(sum(float(p.detach().square().sum()) for p in parameters))
            saved = _Saved(folder / _FILE, trained, optimizer, about, norm)
            losses = saved.read()
            _check_shared(folder, len(losses), parameters[0].device)
        order = islice(_order(len(examples), config.seed), len(losses) * config.batch_size, None)
        for step in range(len(losses), config.steps):
            mine = [*islice(order, config.batch_size)][state.process_index :: state.num_processes]
            rows = Examples([examples.rows[i] for i in mine], examples.take)
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
    task = config.task or tasks.infer(model)
    if not for_task(task):
        raise InputError(f"{task} has no loss on labels here: recover without labels.")
    return task


def _about(model: Any, original: Any, examples: Examples) -> dict[str, str]:
    """Return what tells a recovery from others beside its settings."""
    about = {
        "examples": _digest_of_rows(examples),
        "original": _digest(original.state_dict()),
    }
    if record := merge_record(model.config):
        about["merge"] = f"{record.method}: {record.groups or record.narrowed}"
    return about


def _digest_of_rows(examples: Examples) -> str:
    """Return a hash of the inputs and labels of the rows, of many those at even distances."""
    step = -(-len(examples) // HASHED)
    hashed = hashlib.sha256(str(len(examples)).encode())
    for batch in Examples(examples.rows[::step], examples.take).batches(1):
        hashed.update(_digest(batch).encode())
    return hashed.hexdigest()


def _digest(tensors: Mapping[str, Array | Tensor]) -> str:
    """Return a hash of tensors by name: of their shapes and bytes."""
    hashed = hashlib.sha256()
    for name in sorted(tensors):
        tensor = torch.as_tensor(tensors[name]).detach().cpu().contiguous()
        hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        hashed.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return hashed.hexdigest()


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
                parameter.data = _wide(parameter.data)
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
                kind: count / count.sum() for kind, count in _weights(model, config, row).items()
            }
            return _loss(model, original, config, row, share)

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
    weights = [_weights(model, config, batch) for batch in batches]
    kinds = ("", model.main_input_name, "decoder_input_ids", "labels")
    sums = torch.zeros(len(kinds), device=device)
    for counts in weights:
        sums += torch.tensor([float(counts[kind].sum()) for kind in kinds], device=device)
    totals = dict(zip(kinds, reduce(sums, "sum").clamp(min=1).tolist(), strict=True))
    total = torch.zeros((), device=device)
    for batch, counts in zip(batches, weights, strict=True):
        share = {kind: (count / totals[kind]).to(device) for kind, count in counts.items()}
        loss = _loss(model, original, config, batch, share)
        loss.backward()
        total += loss.detach()
    for parameter in parameters:  # a process without a row, or a part no row reaches, has none
        own = parameter.grad
        if own is None:
            own = torch.zeros_like(parameter)
        parameter.grad = reduce(own, "sum")
    return float(reduce(total, "sum"))


def _weights(model: Any, config: RecoverConfig, batch: Mapping[str, Array]) -> dict[str, Tensor]:
    """Return how much each row counts, by the model input that an output goes with.

    The positions of that input that are no padding; 1 where nothing is padded (``""``).
    """
    rows = len(next(iter(batch.values())))
    counts = {"": torch.ones(rows), "labels": torch.zeros(rows)}
    for reads in (model.main_input_name, "decoder_input_ids"):
        mask = padding_mask(model.config, batch, (reads,))
        counts[reads] = torch.ones(rows)
        if mask is not None:
            counts[reads] = torch.as_tensor(mask).sum(1).float()
    if config.labels:
        labels = labels_of(config.task or "", batch)
        if tasks.base(config.task or "") == "text-generation":
            labels = labels[:, 1:]  # the first is not foretold
        counts["labels"] = torch.as_tensor(labels != IGNORED).view(rows, -1).sum(1).float()
    return counts


def _loss(
    model: Any,
    original: Any,
    config: RecoverConfig,
    batch: Mapping[str, Array],
    share: Mapping[str, Tensor],
) -> Tensor:
    """Return the part of the step's loss that a batch has; ``share`` sums to 1 over the step."""
    options: dict[str, Any] = {"output_hidden_states": config.distill}
    wanted = []
    if config.distill:
        with torch.no_grad():
            wanted = [*_outputs(model, forward(original, batch, **options))]
    if config.labels:
        labels = labels_of(config.task or "", batch)
        options["labels"] = torch.as_tensor(labels, device=share[""].device)
    output = forward(model, batch, **options)
    total = share[""].new_zeros(())
    if config.labels and share["labels"].any():
        total = total + output["loss"] * share["labels"].sum()
    if config.distill:
        states = sum(not is_logits for is_logits, *_ in wanted)
        for (is_logits, reads, y), (_, _, x) in zip(wanted, _outputs(model, output), strict=True):
            apart = _divergence(x, y) if is_logits else _distance(x, y) / states
            total = total + (_by_row(model, batch, reads, apart) * share[reads]).sum()
    return total


def _divergence(x: Tensor, y: Tensor) -> Tensor:
    """Return how far the distribution of logits ``x`` is from that of ``y``, by position."""
    x, y = _wide(x), _wide(y)
    apart = kl_div(x.log_softmax(-1), y.log_softmax(-1), reduction="none", log_target=True)
    return apart.sum(-1)


def _distance(x: Tensor, y: Tensor) -> Tensor:
    """Return the squared error of states relative to those of the original, by position."""
    x, y = _wide(x), _wide(y)
    return (x - y).square().sum(-1) / y.square().sum(-1).clamp(min=1e-12)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _by_row(model: Any, batch: Mapping[str, Array], reads: str, values: Tensor) -> Tensor:
    """Return the mean of every row's values, (rows, ...), over its positions that count."""
    if not reads:
        return values.flatten(1).mean(1) if values.ndim > 1 else values
    counted = positions(model, batch, (reads,), values.shape).to(values.device)
    return values.where(counted, 0).sum(1) / counted.sum(1).clamp(min=1)


def _outputs(model: Any, output: Mapping[str, Any], part: str = "") -> Iterator[tuple[Any, ...]]:
    """Yield logits and states after every layer: whether logits, the input they go with, values."""
    for name, value in output.items():
        if isinstance(value, Mapping):  # the towers of CLIP
            yield from _outputs(model, value, name)
            continue
        reads = model.main_input_name
        if model.config.is_encoder_decoder and not name.startswith("encoder"):
            reads = "decoder_input_ids"
        tensors: Sequence[Tensor] = ()
        if name in _STATES:
            tensors = value[1:]
        elif name == "logits":
            tensors = (value,)
        for tensor in tensors:
            alone = tensor.ndim < 3 or "vision" in part
            yield name == "logits", "" if alone else reads, tensor


@dataclass(frozen=True)
class _Saved:
    """Parameters and optimizer in a file: there is a whole one at any time.

    ``about`` tells one recovery from another; ``norm`` is that of the parameters at the start.
    """

    file: Path
    trained: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    about: Mapping[str, Any]
    norm: float

    def write(self, losses: list[float]) -> None:
        tensors = {"losses": torch.tensor(losses, dtype=torch.float64)}
        for name, parameter in self.trained.items():
            tensors[f"value/{name}"] = parameter.detach().contiguous()
            for part in _MOMENTS:
                tensors[f"{part}/{name}"] = self.optimizer.state[parameter][part].contiguous()
        self.file.parent.mkdir(parents=True, exist_ok=True)
        partial = self.file.with_suffix(".partial")
        save_file(tensors, partial, {"about": json.dumps({**self.about, "norm": self.norm})})
        partial.replace(self.file)

    def read(self) -> list[float]:
        """Set everything to what was saved; return the losses of the steps done, none at first."""
        if not self.file.exists():
            return []
        try:
            with safe_open(self.file, "pt") as stored:
                then = json.loads(stored.metadata()["about"])
                # a merge computed again may differ by rounding, another model differs by more
                alike = math.isclose(then.pop("norm"), self.norm, rel_tol=1e-4)
                if not alike or then != self.about:
                    raise InputError(
                        f"{self.file} is the state of another recovery: remove it, or go on with "
                        "that one's model, data and settings."
                    )
                losses: list[float] = stored.get_tensor("losses").tolist()
                for name, parameter in self.trained.items():
                    parameter.data.copy_(stored.get_tensor(f"value/{name}"))
                    state = {"step": torch.tensor(float(len(losses)))}
                    for part in _MOMENTS:
                        state[part] = stored.get_tensor(f"{part}/{name}").to(parameter.device)
                    self.optimizer.state[parameter] = state
        except (SafetensorError, KeyError, RuntimeError, OSError) as error:
            raise InputError(f"{self.file} cannot be used: {error}. Remove it.") from error
        return losses
