"""Moments of hidden neurons, in one pass over the data.

The features X of a plain sublayer are the outputs of its map d -> f, before the nonlinearity
(arXiv 2501.06126, section 3.3). A gated one has two such outputs for each neuron, gate and up; both
count, and so does their product that the map f -> d takes (docs/merging.md). Batches are merged by
the update of Chan, Golub and LeVeque (1979): every batch is centred on its own mean before it is
squared, so nothing cancels however far the mean lies from zero.
"""

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from accelerate.utils import gather_object, reduce
from torch import Tensor

from ffmerge.errors import InputError
from ffmerge.models.inputs import to_tensors, unchunked
from ffmerge.models.metrics import IGNORED
from ffmerge.models.offload import device_of
from ffmerge.models.probe import Array
from ffmerge.models.sublayer import FeedForward
from ffmerge.passes.weights import processes

Pair = tuple[int, int]


class Enough(Exception):
    """What a hook raises when nothing that comes after it in the pass is needed."""


@dataclass
class Moments:
    """Count, means, sums of squares and of cross products of the layers' features.

    Features have v views of the same f neurons: 1, or 3 of a gated sublayer. ``cross``
    holds, for each pair (anchor, other), the (v, f, f) sums of products of deviations, in
    ``dtype``; means and squares are (v, f) in float64. ``inputs`` are the moments of what the
    layers read, each paired with itself, ``hidden`` those of what the map f -> d is given,
    unpaired.
    """

    pairs: tuple[Pair, ...]
    count: int = 0
    dtype: torch.dtype = torch.float32
    mean: dict[int, Tensor] = field(default_factory=dict)
    squares: dict[int, Tensor] = field(default_factory=dict)
    cross: dict[Pair, Tensor] = field(default_factory=dict)
    inputs: "Moments | None" = None
    hidden: "Moments | None" = None

    def update(self, features: Mapping[int, Tensor]) -> None:
        """Add a batch: (v, n, f) features of every layer, the same n rows in each."""
        views, n, _ = next(iter(features.values())).shape
        if n == 0:
            return
        total = self.count + n
        means = {layer: x.mean(1, dtype=torch.float64) for layer, x in features.items()}
        shift = {layer: m - self.mean.get(layer, m) for layer, m in means.items()}
        scale = self.count * n / total
        centred = {}
        for layer, x in features.items():
            # the last row gives what the means of the batch and of those before are apart
            centred[layer] = _centred(x, means[layer], scale**0.5 * shift[layer])
            squares = torch.linalg.vector_norm(centred[layer][:, :n], dim=1, dtype=torch.float64)
            squares = squares.square() + scale * shift[layer].square()
            self.squares[layer] = self.squares.get(layer, 0) + squares
            self.mean[layer] = self.mean.get(layer, means[layer]) + shift[layer] * (n / total)
        for a, b in self.pairs:
            if (a, b) not in self.cross:
                shape = (views, means[a].shape[1], means[b].shape[1])
                self.cross[a, b] = centred[a].new_zeros(shape, dtype=self.dtype)
            for view, total_of in enumerate(self.cross[a, b]):
                x, y = centred[a][view], centred[b][view]
                if self.dtype == x.dtype:
                    total_of.addmm_(x.T, y)
                else:  # products too: of those in float32 the sum may be indefinite
                    total_of += x[:n].to(self.dtype).T @ y[:n].to(self.dtype)
                    total_of.addr_(scale * shift[a][view], shift[b][view])
        self.count = total

    def pooled(self, sizes: Mapping[int, tuple[int, int]], like: Tensor) -> None:
        """Make these the moments of all processes together, none of which need have a batch.

        ``sizes`` are the (v, f) of every layer, ``like`` is a tensor of the device.
        """
        count = like.new_tensor(self.count, dtype=torch.float64)
        total = reduce(count, "sum")
        shift = {}
        for layer, size in sizes.items():
            zeros = like.new_zeros(size, dtype=torch.float64)
            mean = self.mean.get(layer, zeros)
            self.mean[layer] = reduce(mean * count, "sum") / total.clamp(min=1)
            shift[layer] = mean - self.mean[layer]
            squares = self.squares.get(layer, zeros) + count * shift[layer].square()
            self.squares[layer] = reduce(squares, "sum")
        for a, b in self.pairs:
            (views, f), (_, g) = sizes[a], sizes[b]
            cross = self.cross.get((a, b), like.new_zeros((views, f, g), dtype=self.dtype))
            for view in range(views):
                x, y = (count * shift[a][view]).to(cross), shift[b][view].to(cross)
                cross[view].addr_(x, y)
            self.cross[a, b] = reduce(cross, "sum")
        self.count = int(total)

    def joined(self, other: "Moments") -> "Moments":
        """Return these moments with those of other layers and pairs at the same positions."""
        found = Moments((*self.cross, *other.cross), self.count)
        for name in ("mean", "squares", "cross"):
            getattr(found, name).update(getattr(self, name) | getattr(other, name))
        if self.inputs and other.inputs and self.hidden and other.hidden:
            found.inputs = self.inputs.joined(other.inputs)
            found.hidden = self.hidden.joined(other.hidden)
        return found

    def correlation(self, anchor: int, other: int) -> Tensor:
        """Return equation (1), the (f, f) Pearson correlation; rows are the anchor's neurons.

        Summed over the views. A neuron that never changes correlates with nothing: its row or
        column is 0.
        """
        if (anchor, other) not in self.cross:
            return self.correlation(other, anchor).T
        crosses = self.cross[anchor, other]
        total = torch.zeros_like(crosses[0])
        for cross, a, b in zip(crosses, self.squares[anchor], self.squares[other], strict=True):
            spread = torch.outer(a.sqrt(), b.sqrt()).float()
            total += torch.where(spread > 0, cross / spread, 0.0)
        return total


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
            raise Enough

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
    place = processes.place()
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
    known = _mask(model.config, batch, reads)
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


def _mask(config: Any, batch: Mapping[str, Array], reads: Sequence[str]) -> Array | None:
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


def forward(model: Any, batch: Mapping[str, Array], **options: Any) -> Any:
    """Return the model's output for a batch; ``options`` go to the model as they are.

    None if a hook has :class:`Enough`. Labels are left out, unless an encoder-decoder has to make
    the decoder's input of them.

    Raises:
        InputError: the model does not take these arrays.
    """
    inputs = {name: array for name, array in batch.items() if name != "labels"}
    if "use_cache" in inspect.signature(model.forward).parameters:
        options = {"use_cache": False, **options}  # keys and values of a batch are never read
    decoded = model.config.is_encoder_decoder and "decoder_input_ids" not in batch
    if decoded and "labels" in batch and batch["labels"].ndim == 2:
        inputs["labels"] = batch["labels"]
    try:
        return model(**{**to_tensors(inputs, model), **options})
    except Enough:
        return None
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        shapes = ", ".join(f"{name} {tuple(array.shape)}" for name, array in inputs.items())
        raise InputError(
            f"{type(model).__name__} does not take this data ({shapes}): "
            f"{str(error).splitlines()[0]}"
        ) from error


def _centred(x: Tensor, mean: Tensor, last: Tensor) -> Tensor:
    """Return the rows ``x - mean``, (v, n, f), and one more, in float32.

    What rounding takes from the mean is taken off after it.
    """
    near = mean.float()[:, None]
    out = near.new_empty((x.shape[0], x.shape[1] + 1, x.shape[2]))
    torch.sub(x, near, out=out[:, :-1])
    out[:, :-1] -= mean[:, None] - near
    out[:, -1] = last
    return out


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
