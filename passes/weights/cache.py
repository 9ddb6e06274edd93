"""What sublayers read and put out in the original model, kept so that a fit needs no passes.

The method ``calibrated`` asks what a merged sublayer makes of what the original one read. That is
the same for every candidate of a search, so it is recorded when it is first asked for, and then
only the sublayer's own module is run on it, not attention and all other layers. Whether the module
does the same when it is run alone is tried, not known: a block that holds its maps itself (BERT)
does not, and is run as a whole. So are models of 16 bits, in which the trial would tell less.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from ffmerge.models import ties
from ffmerge.models.inputs import StopForward, unchunked
from ffmerge.models.offload import call
from ffmerge.models.sublayer import FeedForward, block_of
from ffmerge.models.ties import SharedWeights
from ffmerge.passes.weights.activations import Activations, Batches, Stacks, watch

MEMORY = 1 << 30  # bytes that are kept at most: where it is more, nothing is
_TRIED = 64  # positions
_SAME = 1e-5  # of the largest; measured 0 where it is the same, 2e-3 where attention is in between

Kept = dict[FeedForward, list[tuple[Tensor, Tensor]]]  # inputs and outputs, (n, d), by batch


class ActivationCache:
    """Inputs and outputs of the sublayers of stacks, as the model has them when it is first asked.

    ``batches`` gives the data anew each time, ``tokens`` positions of it are recorded.
    """

    def __init__(
        self, model: Any, stacks: Stacks, batches: Callable[[], Batches], tokens: int
    ) -> None:
        """Record nothing yet."""
        self.model, self.stacks, self.batches, self.tokens = model, stacks, batches, tokens
        self._kept: Kept | None = None

    def replay(
        self, members: Sequence[FeedForward], weights: SharedWeights
    ) -> Generator[dict[int, tuple[Tensor, Tensor]], None, None] | None:
        """Return by batch and layer what the merged W_out is given, and what the original put out.

        (n, f) and (n, d); None if it cannot be known without passes of the whole model.
        """
        if self._kept is None:
            self._kept = self._record()
        if any(member not in self._kept for member in members):
            return None
        return self._replayed(members, weights, [self._kept[member] for member in members])

    def _replayed(
        self,
        members: Sequence[FeedForward],
        weights: SharedWeights,
        kept: Sequence[Sequence[tuple[Tensor, Tensor]]],
    ) -> Generator[dict[int, tuple[Tensor, Tensor]], None, None]:
        with torch.no_grad(), unchunked(self.model), ties.tied(self.model, [members], [weights]):
            for batch in zip(*kept, strict=True):
                found = {}
                for member, (inputs, outputs) in zip(members, batch, strict=True):
                    found[member.layer] = self._hidden(member, inputs), outputs
                yield found

    def _record(self) -> Kept:
        """Run over the data once, and once more over its first batch, to try who runs alone."""
        alone = self._running_alone()
        kept: Kept = {member: [] for members in alone.values() for member in members}
        if not kept:
            return {}
        size = 0
        with closing(watch(self.model, alone, self.batches(), self.tokens)) as watched:
            for batch in watched:
                for member, batches in kept.items():
                    seen = batch[member.stack][member.layer]
                    batches.append((seen.inputs, seen.outputs))
                    size += seen.inputs.nbytes + seen.outputs.nbytes
                if size > MEMORY:
                    return {}
        return kept

    def _running_alone(self) -> dict[str, list[FeedForward]]:
        """Return the sublayers whose module, given what its maps read, does the same alone."""
        likely = self._filtered(self.stacks, self._may_run_alone)
        if not likely:
            return {}
        with closing(watch(self.model, likely, self.batches(), 1)) as watched:
            first = next(watched)
        return self._filtered(
            likely, lambda member: self._does_run_alone(member, first[member.stack][member.layer])
        )

    @staticmethod
    def _filtered(
        stacks: Stacks, fits: Callable[[FeedForward], bool]
    ) -> dict[str, list[FeedForward]]:
        found = {name: [*filter(fits, members)] for name, members in stacks.items()}
        return {name: members for name, members in found.items() if members}

    def _may_run_alone(self, member: FeedForward) -> bool:
        """Tell without data: it is in a block, run once and in float32."""
        block = block_of(self.model, member.output)
        inside = block is None or member.path.startswith(f"{block[0]}.{block[1]}.")
        dtype = self.model.get_parameter(member.weights[0].name).dtype
        return inside and member.runs == 1 and dtype == torch.float32

    def _does_run_alone(self, member: FeedForward, seen: Activations) -> bool:
        """Try it on some positions of a batch."""
        wanted = seen.hidden[:_TRIED]
        try:
            with torch.no_grad(), unchunked(self.model):
                got = self._hidden(member, seen.inputs[:_TRIED])
        except (TypeError, ValueError, RuntimeError, LookupError, AttributeError):
            return False
        if got.shape != wanted.shape or not wanted.numel():
            return False
        return bool((got - wanted).abs().max() <= _SAME * wanted.abs().max())

    def _hidden(self, member: FeedForward, inputs: Tensor) -> Tensor:
        """Return what the map f -> d is given where the member reads (n, d) inputs."""
        given: list[Tensor] = []

        def keep(_: Any, args: tuple[Tensor, ...]) -> None:
            given.append(args[0])
            raise StopForward

        handle = self.model.get_submodule(member.output).register_forward_pre_hook(keep)
        try:
            call(self.model, self.model.get_submodule(member.path), inputs[None])
        except StopForward:
            pass
        finally:
            handle.remove()
        return given[0].reshape(len(inputs), -1)
