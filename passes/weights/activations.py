"""What goes through sublayers while a model runs over data: kept by hooks, without padding.

:func:`watch` yields it batch by batch, :func:`collect` sums it up to :class:`Moments`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor

from ffmerge.errors import InputError
from ffmerge.models.inputs import StopForward, forward, unchunked
from ffmerge.models.metrics import IGNORED
from ffmerge.models.offload import device_of
from ffmerge.models.probe import Array
from ffmerge.models.sublayer import FeedForward
from ffmerge.passes.weights import processes
from ffmerge.passes.weights.moments import Moments


@dataclass(frozen=True)
class Signals:
    """What goes through one sublayer at the n positions of a batch that count.

    ``inputs`` is (n, d), ``features`` (views, n, f), ``hidden`` (n, f) what the map f -> d takes,
    ``outputs`` (n, d).
    """

    inputs: Tensor
    features: Tensor
    hidden: Tensor
    outputs: Tensor


class Keeper(Protocol):
    """What is given the signals of ``tokens`` positions, as long as it is ``open``."""

    tokens: int

    @property
    def open(self) -> bool:
        """Whether it wants more."""
        ...

    def add(self, members: Sequence[FeedForward], batch: Mapping[int, Signals]) -> None:
        """Take a batch of the members of a stack."""
        ...


def members_of(
    pairs: Mapping[str, Iterable[Sequence[FeedForward]]],
) -> dict[str, list[FeedForward]]:
    """Return the sublayers that stand in pairs, by stack, each once."""
    return {n: list({s.layer: s for pair in x for s in pair}.values()) for n, x in pairs.items()}


def watch(
    model: Any,
    sublayers: Mapping[str, Sequence[FeedForward]],
    batches: Iterable[Mapping[str, Array]],
    tokens: int,
    place: tuple[int, int] = (0, 1),
) -> Iterator[dict[str, dict[int, Signals]]]:
    """Yield, batch by batch, what goes through the sublayers, by stack and layer.

    A stack counts its own positions: a decoder those of its own input, and none counts padding.
    Stops with the batch that brings every stack to ``tokens``, or with the data. With ``place``,
    number and count of the processes, each runs every so many-th batch; together they yield what
    one would.

    Raises:
        InputError: a stack has no two positions that count, or the model does not take the data.
    """
    counts = dict.fromkeys(sublayers, 0)
    watched = [s for found in sublayers.values() for s in found]
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {p: [] for s in watched for p in s.maps}
    once = all(s.runs == 1 for s in watched)

    def keep(path: str, _: Any, args: tuple[Tensor, ...], out: Tensor) -> None:
        seen[path].append((args[0], out))
        if once and all(seen.values()):
            raise StopForward

    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(unchunked(model))
        for path in seen:
            hook = partial(keep, path)
            stack.callback(model.get_submodule(path).register_forward_hook(hook).remove)
        for every in _rounds(batches, place[1]):
            counted, signals = dict.fromkeys(sublayers, 0), None
            if len(every) > place[0]:
                signals = _through(model, sublayers, every[place[0]], seen)
                counted = {n: len(next(iter(x.values())).inputs) for n, x in signals.items()}
            for number, own in enumerate(gather_object([counted]) if place[1] > 1 else [counted]):
                if all(count >= tokens for count in counts.values()):
                    break
                for name in counts:
                    counts[name] += own[name]
                if signals is not None and number == place[0]:
                    yield signals
            if all(count >= tokens for count in counts.values()):
                break
    for name, count in counts.items():
        if count < 2:
            raise InputError(f"the data holds fewer than two positions that count for {name!r}.")


def collect(
    model: Any,
    pairs: Mapping[str, Iterable[tuple[FeedForward, FeedForward]]],
    batches: Iterable[Mapping[str, Array]],
    tokens: int,
    after: bool = False,
    keep: Keeper | None = None,
) -> dict[str, Moments]:
    """Return, by stack, the moments of the sublayers' features over at least ``tokens`` positions.

    Several processes take their share of the batches each and all have the moments of the whole.
    ``pairs`` are anchors and members by stack. ``after`` takes the activations after the
    nonlinearity, which the map f -> d takes, for the features. ``keep`` is given each batch that
    this process runs, and more of them than the moments if it is open.
    """
    found = {name: list(x) for name, x in pairs.items()}
    members = members_of(found)
    layers = {name: sorted({(a.layer, b.layer) for a, b in x}) for name, x in found.items()}
    place = processes.rank_and_world_size()
    moments, inputs, hidden = {}, {}, {}
    for name, pairs_of in layers.items():
        own = tuple((m.layer, m.layer) for m in members[name])
        # small, and what is solved for goes by them: in float64 any number of processes sum alike
        inputs[name] = Moments(own, dtype=torch.float64)
        hidden[name] = Moments(())
        moments[name] = Moments(tuple(pairs_of), inputs=inputs[name], hidden=hidden[name])
    wanted = max(tokens, keep.tokens) if keep else tokens
    for signals in watch(model, members, batches, wanted, place):
        full = all(known.count >= tokens for known in moments.values())
        for name, by_layer in signals.items():
            if keep:
                keep.add(members[name], by_layer)
            if full:
                continue
            found_in = {i: s.hidden[None] if after else s.features for i, s in by_layer.items()}
            moments[name].update(found_in)
            inputs[name].update({i: s.inputs[None] for i, s in by_layer.items()})
            hidden[name].update({i: s.hidden[None] for i, s in by_layer.items()})
        if keep and not keep.open and all(m.count >= tokens for m in moments.values()):
            break
    like = torch.empty(0, device=device_of(model))
    for name, of in members.items() if place[1] > 1 else ():
        size, gated = (1, of[0].d_ff), of[0].gated and not after
        moments[name].pooled({m.layer: (3, m.d_ff) if gated else size for m in of}, like)
        inputs[name].pooled({m.layer: (1, m.d_model) for m in of}, like)
        hidden[name].pooled({m.layer: size for m in of}, like)
    return moments


def positions(
    model: Any, batch: Mapping[str, Array], reads: Sequence[str], shape: Sequence[int]
) -> Tensor:
    """Return which positions of a tensor of ``shape`` that depends on ``reads`` are no padding.

    Sound is masked by sample and counted by frame, as far as the model's convolutions tell.

    Raises:
        InputError: rows are padded and it cannot be told which of the positions are padding.
    """
    known = padding_mask(model.config, batch, reads)
    if known is None:
        return torch.ones(tuple(shape), dtype=torch.bool)
    mask = torch.as_tensor(known)
    rows, length = mask.shape
    if tuple(shape) in ((rows, length), (rows * length,)):
        return mask.view(tuple(shape))
    frames = getattr(model, "_get_feat_extract_output_lengths", None)
    if len(shape) == 2 and frames and int(frames(torch.tensor(length))) == shape[1]:
        return torch.arange(shape[1]) < frames(mask.sum(1))[:, None]
    if len(shape) == 2 and shape[0] == rows and shape[1] > length:  # the model itself pads
        return torch.nn.functional.pad(mask, (0, shape[1] - length))
    if mask.all():
        return torch.ones(tuple(shape), dtype=torch.bool)
    raise InputError(
        f"{type(model).__name__} turns {length} positions into {tuple(shape)[-1]}, so it cannot be "
        "told which are padding: give rows of one length, or a batch size of 1."
    )


def padding_mask(config: Any, batch: Mapping[str, Array], reads: Sequence[str]) -> Array | None:
    """Return the (rows, positions) of the model input that are no padding; None: all are."""
    if "decoder_input_ids" in reads:
        if "decoder_attention_mask" in batch:
            return np.asarray(batch["decoder_attention_mask"] != 0)
        own = batch.get("decoder_input_ids")
        labels = batch.get("labels")
        if labels is not None and labels.ndim == 2:
            own = np.where(labels == IGNORED, -1, labels)
        if own is not None:
            pad = getattr(config, "pad_token_id", None)
            real = (own != -1) & (own != (-1 if pad is None else pad))
            # the token for padding may start a row as well: padding is what nothing follows
            ended = np.logical_or.accumulate(real[:, ::-1], axis=1)[:, ::-1] & (own != -1)
            ended[:, 0] |= labels is None
            return ended
    if "attention_mask" in batch and {"input_ids", "input_values", "input_features"} & set(reads):
        return np.asarray(batch["attention_mask"] != 0)
    return None


def _rounds(batches: Iterable[Mapping[str, Array]], size: int) -> Iterator[list[Any]]:
    rest = iter(batches)
    while every := [*islice(rest, size)]:
        yield every


def _through(
    model: Any,
    sublayers: Mapping[str, Sequence[FeedForward]],
    batch: Mapping[str, Array],
    seen: Mapping[str, list[tuple[Tensor, Tensor]]],
) -> dict[str, dict[int, Signals]]:
    """Run a batch; return what its hooks have put into ``seen``, and leave nothing there."""
    forward(model, batch)
    signals = {}
    for name, found in sublayers.items():
        shape = _whole(seen, found[0].output, 1).shape[:-1]
        counted = positions(model, batch, found[0].reads, shape)
        signals[name] = {s.layer: _signals(s, seen, counted) for s in found}
    for kept in seen.values():
        kept.clear()
    return signals


def _whole(seen: Mapping[str, Sequence[tuple[Tensor, Tensor]]], path: str, side: int) -> Tensor:
    """Return what went into a map (side 0) or came out (1): a chunked one runs part by part."""
    return torch.cat([call[side] for call in seen[path]], dim=-2)


def _signals(sublayer: FeedForward, seen: Mapping[str, Any], counted: Tensor) -> Signals:
    """Return a sublayer's signals; a fused map puts out gate and up side by side.

    The features of a gated one are gate, up and what W_out takes.
    """
    counted = counted.to(seen[sublayer.output][0][0].device)
    outs = [_whole(seen, path, 1)[counted] for path in sublayer.inputs]
    hidden = _whole(seen, sublayer.output, 0)[counted]
    views = [x for out in outs for x in out.chunk(sublayer.weights[0].blocks, -1)]
    views += [hidden] * sublayer.gated
    inputs = _whole(seen, sublayer.inputs[0], 0)[counted]
    outputs = _whole(seen, sublayer.output, 1)[counted]
    return Signals(inputs, torch.stack(views), hidden, outputs)
