"""What goes through sublayers while a model runs over data: kept by hooks, without padding.

:func:`watch` yields it batch by batch, :func:`add_up` and :func:`collect` sum it to
:class:`~ffmerge.passes.weights.moments.Moments`. The features of a plain sublayer are the outputs
of its map d -> f, before the nonlinearity (arXiv 2501.06126, section 3.3). A gated one has two such
outputs for each neuron, gate and up; both count, and so does their product that the map f -> d
takes (docs/merging.md).
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

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
from ffmerge.passes.weights.moments import Moments
from ffmerge.passes.weights.processes import rank_and_world_size

Stacks = Mapping[str, Sequence[FeedForward]]
Batches = Iterable[Mapping[str, Array]]
Calls = dict[str, list[tuple[Tensor, Tensor]]]  # what a module took and gave, by its path


@dataclass(frozen=True)
class Activations:
    """What goes through one sublayer at the n positions of a batch that count.

    ``inputs`` is (n, d), ``features`` (views, n, f), ``hidden`` (n, f) what the map f -> d takes,
    ``outputs`` (n, d).
    """

    inputs: Tensor
    features: Tensor
    hidden: Tensor
    outputs: Tensor


@contextmanager
def hooked(model: Any, paths: Iterable[str], hook: Callable[..., Any]) -> Iterator[None]:
    """Call ``hook(path, module, args, out)`` after the modules, for the length of the block."""
    with ExitStack() as stack:
        for path in paths:
            handle = model.get_submodule(path).register_forward_hook(partial(hook, path))
            stack.callback(handle.remove)
        yield


def watch(
    model: Any,
    sublayers: Stacks,
    batches: Batches,
    tokens: int,
    rank: int = 0,
    world: int = 1,
) -> Generator[dict[str, dict[int, Activations]], None, None]:
    """Yield, batch by batch, what goes through the sublayers, by stack and layer.

    A stack counts its own positions: a decoder those of its own input, and none counts padding.
    Stops with the batch that brings every stack to ``tokens``, or with the data. Of ``world``
    processes each runs every so many-th batch; together they yield what one would. Hooks are in
    the model until the generator is closed.

    Raises:
        InputError: a stack has no two positions that count, or the model does not take the data.
    """
    counts = dict.fromkeys(sublayers, 0)
    watched = [member for members in sublayers.values() for member in members]
    seen: Calls = {path: [] for member in watched for path in member.maps}

    def keep(path: str, _: Any, args: tuple[Tensor, ...], out: Tensor) -> None:
        seen[path].append((args[0], out))
        stop_when_seen(seen, watched)

    with hooked(model, seen, keep), unchunked(model), torch.no_grad():
        rest = iter(batches)
        while min(counts.values()) < tokens and (turn := [*islice(rest, world)]):
            own = None
            if rank < len(turn):
                own = _run(model, sublayers, turn[rank], seen)
            seen_by_all = _counted_by_all(own, sublayers, world)
            if _count_turn(counts, seen_by_all, tokens, rank) and own is not None:
                yield own
    _check_enough(counts)


def stop_when_seen(calls: Mapping[str, Sequence[Any]], sublayers: Iterable[FeedForward]) -> None:
    """Stop a forward pass as soon as all maps have been called.

    Not where a sublayer runs several times: how often it will is not known.
    """
    if all(calls.values()) and all(member.runs == 1 for member in sublayers):
        raise StopForward


def _check_enough(counts: Mapping[str, int]) -> None:
    for name, count in counts.items():
        if count < 2:
            raise InputError(f"the data holds fewer than two positions that count for {name!r}.")


def add_up(
    model: Any,
    sublayers: Stacks,
    moments: Mapping[str, Mapping[str, Moments]],
    batches: Batches,
    tokens: int,
) -> None:
    """Update moments with at least ``tokens`` positions of data.

    ``moments`` are by stack and by what is summed up: a field of :class:`Activations`. Several
    processes take their share of the batches each and all have the moments of the whole.

    Raises:
        InputError: as of :func:`watch`, or what a layer computes is not finite.
    """
    rank, world = rank_and_world_size()
    with closing(watch(model, sublayers, batches, tokens, rank, world)) as watched:
        for activations in watched:
            for stack, what, sums in _flat(moments):
                batch = {}
                for layer in sums.layers or activations[stack]:
                    values = getattr(activations[stack][layer], what)
                    batch[layer] = values if values.ndim == 3 else values[None]
                sums.update(batch)
    if world > 1:
        like = torch.empty(0, device=device_of(model))
        for stack, what, sums in _flat(moments):
            sums.pool_({m.layer: _size(m, what) for m in sublayers[stack]}, like)
    for stack, _, sums in _flat(moments):
        _check_finite(stack, sums)


def _check_finite(stack: str, sums: Moments) -> None:
    for layer, squares in sums.squares.items():
        if not torch.isfinite(squares).all():
            raise InputError(
                f"layer {layer} of {stack!r} gives NaN or infinite values on this data."
            )


def collect(
    model: Any,
    pairs: Mapping[str, Iterable[Sequence[FeedForward]]],
    batches: Batches,
    tokens: int,
) -> dict[str, dict[str, Moments]]:
    """Return what methods read of the data, by stack and by name: features, inputs, hidden.

    ``pairs`` are anchors and members by stack. Features are multiplied pair by pair, the inputs of
    each layer with themselves, of what is hidden there are means and variances only.
    """
    sublayers: dict[str, list[FeedForward]] = {}
    moments: dict[str, dict[str, Moments]] = {}
    for stack, wanted in pairs.items():
        found = [*wanted]
        members = dict.fromkeys(member for pair in found for member in pair)
        sublayers[stack] = [*members]
        moments[stack] = {
            "features": Moments(tuple(sorted({(a.layer, b.layer) for a, b in found}))),
            # in float64 any number of processes sum alike, and no covariance is indefinite
            "inputs": Moments(tuple((m.layer, m.layer) for m in members), dtype=torch.float64),
            "hidden": Moments(()),
        }
    add_up(model, sublayers, moments, batches, tokens)
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
        labels = batch.get("labels")
        if labels is not None and labels.ndim == 2:
            return _not_padded(config, np.where(labels == IGNORED, -1, labels), first=False)
        if "decoder_input_ids" in batch:
            return _not_padded(config, batch["decoder_input_ids"], first=labels is None)
    if "attention_mask" in batch and {"input_ids", "input_values", "input_features"} & set(reads):
        return np.asarray(batch["attention_mask"] != 0)
    return None


def _not_padded(config: Any, ids: Array, first: bool) -> Array:
    """Return which ids are no padding: it is what only padding follows, or -1.

    The token for padding may start a row as well: ``first`` counts it there.
    """
    pad = getattr(config, "pad_token_id", None)
    real = ids != -1
    if pad is not None:
        real = real & (ids != pad)
    followed = np.logical_or.accumulate(real[:, ::-1], axis=1)[:, ::-1] & (ids != -1)
    followed[:, 0] |= first
    return followed


def _run(
    model: Any, sublayers: Stacks, batch: Mapping[str, Array], seen: Calls
) -> dict[str, dict[int, Activations]]:
    """Run a batch; return what its hooks have put into ``seen``, and leave nothing there."""
    forward(model, batch)
    found = {}
    for name, members in sublayers.items():
        shape = _shape_of_all(name, members, seen)
        counted = positions(model, batch, members[0].reads, shape)
        found[name] = {member.layer: _activations(member, seen, counted) for member in members}
    for calls in seen.values():
        calls.clear()
    return found


def _shape_of_all(name: str, members: Sequence[FeedForward], seen: Calls) -> Sequence[int]:
    """Return the rows and positions that all sublayers of a stack run over.

    Raises:
        InputError: one runs over fewer, as behind a convolution that halves them.
    """
    shapes = {m.layer: tuple(_whole(seen, m.output, 1).shape[:-1]) for m in members}
    layer, shape = next(iter(shapes.items()))
    for other, found in shapes.items():
        if found != shape:
            raise InputError(
                f"layer {layer} of {name!r} runs over {shape[-1]} positions and layer {other} over "
                f"{found[-1]}, so it cannot be seen how alike they are: take --method narrow."
            )
    return shape


def _counted_by_all(
    own: Mapping[str, Mapping[int, Activations]] | None, sublayers: Stacks, world: int
) -> list[dict[str, int]]:
    """Return the positions that each process has just seen, by stack; 0 without a batch."""
    counted = dict.fromkeys(sublayers, 0)
    for name, by_layer in (own or {}).items():
        counted[name] = len(next(iter(by_layer.values())).inputs)
    return [counted] if world == 1 else gather_object([counted])


def _count_turn(
    counts: dict[str, int], seen_by_all: list[dict[str, int]], tokens: int, rank: int
) -> bool:
    """Add what processes have seen, one after the other until it is enough; was ``rank`` one?"""
    for number, counted in enumerate(seen_by_all):
        if min(counts.values()) >= tokens:
            return rank < number
        for name in counts:
            counts[name] += counted[name]
    return True


def _whole(seen: Calls, path: str, side: int) -> Tensor:
    """Return what went into a map (side 0) or came out (1): a chunked one runs part by part."""
    return torch.cat([call[side] for call in seen[path]], dim=-2)


def _activations(sublayer: FeedForward, seen: Calls, counted: Tensor) -> Activations:
    """Return a sublayer's activations; a fused map puts out gate and up side by side.

    The features of a gated one are gate, up and what W_out takes.
    """
    counted = counted.to(seen[sublayer.output][0][0].device)
    hidden = _whole(seen, sublayer.output, 0)[counted]
    views: list[Tensor] = []
    for path in sublayer.inputs:
        views += _whole(seen, path, 1)[counted].chunk(sublayer.weights[0].blocks, -1)
    if sublayer.gated:
        views.append(hidden)
    return Activations(
        inputs=_whole(seen, sublayer.inputs[0], 0)[counted],
        features=torch.stack(views),
        hidden=hidden,
        outputs=_whole(seen, sublayer.output, 1)[counted],
    )


def _flat(moments: Mapping[str, Mapping[str, Moments]]) -> Iterator[tuple[str, str, Moments]]:
    for stack, by_what in moments.items():
        for what, each in by_what.items():
            yield stack, what, each


def _size(member: FeedForward, what: str) -> tuple[int, int]:
    """Return views and width of one of a sublayer's activations."""
    if what == "features" and member.gated:
        return 3, member.d_ff
    return 1, member.d_model if what in ("inputs", "outputs") else member.d_ff
