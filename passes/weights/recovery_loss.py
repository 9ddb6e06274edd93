"""The loss of a recovery: how far what a model puts out is from what the original does.

``recover.py`` takes it for every batch of a step. Rows count by their positions that are no
padding, of the step as a whole: :func:`weights_of` counts them, and :func:`loss_of` is told the
share that each row of a batch has.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from ffmerge.config import RecoverConfig
from ffmerge.models import tasks
from ffmerge.models.inputs import forward
from ffmerge.models.metrics import IGNORED, labels_of
from ffmerge.models.probe import Array
from ffmerge.passes.weights.activations import padding_mask, positions

_STATES = ("hidden_states", "encoder_hidden_states", "decoder_hidden_states")


def weights_of(model: Any, config: RecoverConfig, batch: Mapping[str, Array]) -> dict[str, Tensor]:
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


def loss_of(
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
    x, y = wide(x), wide(y)
    apart = kl_div(x.log_softmax(-1), y.log_softmax(-1), reduction="none", log_target=True)
    return apart.sum(-1)


def _distance(x: Tensor, y: Tensor) -> Tensor:
    """Return the squared error of states relative to those of the original, by position."""
    x, y = wide(x), wide(y)
    return (x - y).square().sum(-1) / y.square().sum(-1).clamp(min=1e-12)


def wide(x: Tensor) -> Tensor:
    """Return a tensor in float32 at least."""
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
