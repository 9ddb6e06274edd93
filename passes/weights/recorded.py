"""What sublayers read and put out in the original model, kept so that a fit needs no passes.

A fit asks what a merged sublayer makes of what the original one read. That is the same for every
candidate, so it is kept from the pass for the statistics, and only the sublayer's own module is run
on it, not attention and all other layers. Whether the module does the same when it is run alone is
tried, not known: a block that holds its maps itself (BERT) does not, and is run as a whole. So are
models of 16 bits, in which the trial would tell less.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ffmerge.models import ties
from ffmerge.models.inputs import StopForward, unchunked
from ffmerge.models.offload import call
from ffmerge.models.probe import Array
from ffmerge.models.sublayer import FeedForward, block_of
from ffmerge.models.ties import SharedWeights
from ffmerge.passes.weights.activations import Signals, members_of, watch

MEMORY = 1 << 30  # bytes that are kept at most: where it is more, nothing is
_TRIED = 64  # positions
_SAME = 1e-5  # of the largest; measured 0 where it is the same, 2e-3 where attention is in between
Key = tuple[str, int]


class Recorded:
    """Inputs and outputs of a model's sublayers, (n, d) each batch, at ``tokens`` positions."""

    def __init__(self, model: Any, tokens: int) -> None:
        """Begin with nothing."""
        self.model, self.tokens = model, tokens
        self._of: dict[Key, list[tuple[Tensor, Tensor]]] = {}
        self._first: dict[Key, tuple[Tensor, Tensor]] = {}
        self._alone: dict[Key, bool] = {}
        self._missing: set[Key] = set()

    def begin(self, members: Sequence[FeedForward]) -> None:
        """Forget all other sublayers; of these, those that are not known are going to be added."""
        wanted = {(m.stack, m.layer): m for m in members}
        self._of = {key: kept for key, kept in self._of.items() if key in wanted}
        self._missing = wanted.keys() - self._of.keys()
        for key in self._missing - self._alone.keys():
            if not self._may_run_alone(wanted[key]):
                self._alone[key] = False

    @property
    def open(self) -> bool:
        """Whether anything is to be added."""
        return any(self._alone.get(key, True) for key in self._missing)

    def add(self, members: Sequence[FeedForward], batch: Mapping[int, Signals]) -> None:
        """Keep a batch of the members of a stack."""
        for member in members:
            key, signals = (member.stack, member.layer), batch[member.layer]
            if key not in self._first:
                given = signals.inputs[:_TRIED].clone(), signals.hidden[:_TRIED].clone()
                self._first[key] = given
            if key in self._missing and self._alone.get(key, True):
                self._of.setdefault(key, []).append((signals.inputs, signals.outputs))
        if sum(x.nbytes + y.nbytes for kept in self._of.values() for x, y in kept) > MEMORY:
            self._alone |= dict.fromkeys(self._of, False)
            self._of.clear()

    def fill(
        self,
        pairs: Mapping[str, Sequence[Sequence[FeedForward]]],
        batches: Iterable[Mapping[str, Array]],
    ) -> None:
        """Keep what the members of the pairs, by stack, read and put out, in a pass of its own."""
        members = members_of(pairs)
        for signals in watch(self.model, members, batches, self.tokens):
            for name, batch in signals.items():
                self.add(members[name], batch)

    def side_by_side(
        self, members: Sequence[FeedForward], sharing: SharedWeights
    ) -> Iterator[dict[int, tuple[Tensor, Tensor]]] | None:
        """Return by batch and layer what the merged W_out is given, and what the original put out.

        (n, f) and (n, d); None if it cannot be told without passes.
        """
        keys = [(m.stack, m.layer) for m in members]
        for key, member in zip(keys, members, strict=True):
            if key not in self._alone and key in self._first:
                self._alone[key] = self._runs_alone(member, *self._first[key])
            if not self._alone.get(key):
                self._of.pop(key, None)
        if any(key not in self._of for key in keys):
            return None
        return self._replayed(members, sharing, [self._of[key] for key in keys])

    def _replayed(
        self,
        members: Sequence[FeedForward],
        sharing: SharedWeights,
        kept: Sequence[Sequence[tuple[Tensor, Tensor]]],
    ) -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
        with torch.no_grad(), unchunked(self.model), ties.tied(self.model, [members], [sharing]):
            for batch in zip(*kept, strict=True):
                yield {
                    m.layer: (self._hidden(m, x), y)
                    for m, (x, y) in zip(members, batch, strict=True)
                }

    def _may_run_alone(self, member: FeedForward) -> bool:
        """Tell what signals are not needed for: it is in a block, run once and in float32."""
        block = block_of(self.model, member.output)
        inside = block is None or member.path.startswith(f"{block[0]}.{block[1]}.")
        dtype = self.model.get_parameter(member.weights[0].name).dtype
        return inside and member.runs == 1 and dtype == torch.float32

    def _runs_alone(self, member: FeedForward, x: Tensor, wanted: Tensor) -> bool:
        """Try whether the module, given what its maps read, does what it did in the model."""
        try:
            with unchunked(self.model):
                got = self._hidden(member, x)
        except (TypeError, ValueError, RuntimeError, LookupError, AttributeError):
            return False
        same = got.shape == wanted.shape
        return same and bool((got - wanted).abs().max() <= _SAME * wanted.abs().max())

    def _hidden(self, member: FeedForward, x: Tensor) -> Tensor:
        """Return what the map f -> d is given where the member reads (n, d) inputs."""
        given: list[Tensor] = []

        def keep(_: Any, args: tuple[Tensor, ...]) -> None:
            given.append(args[0])
            raise StopForward

        output = self.model.get_submodule(member.output)
        handle = output.register_forward_pre_hook(keep)
        try:
            call(self.model, self.model.get_submodule(member.path), x[None])
        except StopForward:
            pass
        finally:
            handle.remove()
        return given[0].reshape(len(x), -1)
