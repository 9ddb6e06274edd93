"""What is known of the data: statistics of the sublayers, collected for all candidates at once.

``merge_`` makes one :class:`Statistics`, the search lets it learn what its candidates need, and
each call of a method is given :class:`Evidence`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ffmerge.config import MergeConfig
from ffmerge.models.examples import Examples
from ffmerge.models.offload import device_of
from ffmerge.models.sublayer import FeedForward
from ffmerge.passes.weights import activations, cost
from ffmerge.passes.weights.activations import Batches
from ffmerge.passes.weights.cache import ActivationCache
from ffmerge.passes.weights.moments import Moments
from ffmerge.passes.weights.progress import shown_batches
from ffmerge.passes.weights.windows import Choice, Stacks
from ffmerge.progress import Progress

Pairs = dict[str, list[tuple[FeedForward, FeedForward]]]  # by stack


@dataclass(frozen=True)
class Evidence:
    """What a method may read: all of it is empty where there is no data.

    Moments of the stack's ``features``, of the ``inputs`` of its sublayers and of their ``hidden``
    activations; the data once more, ``tokens`` positions of it are meant to do; what the original
    sublayers read and put out, if it is kept; and of the settings the number ``k`` of layers that
    one sublayer is to serve, and a ``rank``.
    """

    features: Moments = field(default_factory=partial(Moments, ()))
    inputs: Moments = field(default_factory=partial(Moments, ()))
    hidden: Moments = field(default_factory=partial(Moments, ()))
    batches: Callable[[], Batches] = tuple
    tokens: int = 0
    cache: ActivationCache | None = None
    k: int | None = None
    rank: int | None = None


class Statistics:
    """Moments of the sublayers of a model by stack: only those that candidates need are held."""

    def __init__(
        self,
        model: Any,
        data: Examples | None,
        stacks: Stacks,
        config: MergeConfig,
        progress: Progress,
    ) -> None:
        """Know nothing yet; without data that remains so."""
        self.model, self.data, self.config, self.progress = model, data, config, progress
        self.memory: float = cost.room(device_of(model))  # bytes of moments that are held at most
        self.moments: dict[str, dict[str, Moments]] = {}
        if data:
            self.rows = cost.rows_at_a_time(model, data, config.batch_size, stacks)

    def batches(self) -> Batches:
        """Return the data anew."""
        return self.data.batches(self.rows) if self.data else ()

    def evidence(self, stack: str, cache: ActivationCache | None) -> Evidence:
        """Return what a method is given for a group of the stack."""
        return Evidence(
            **self.moments.get(stack, {}),
            batches=self.batches,
            tokens=self.config.tokens,
            cache=cache,
            k=self.config.k,
            rank=self.config.rank,
        )

    def learn(self, choices: Sequence[Choice]) -> None:
        """Collect in one pass over the data what is not known yet, forget what is not needed.

        Of the model as it is now, so it must be the original.
        """
        missing: Pairs = {}
        for stack, pairs in pairs_of(choices).items():
            known = self.moments[stack]["features"].cross if stack in self.moments else {}
            wanted = {(a.layer, b.layer): (a, b) for a, b in pairs}
            for layers in known.keys() - wanted.keys():
                del known[layers]
            if new := [pair for layers, pair in wanted.items() if layers not in known]:
                missing[stack] = new
        if missing:
            self._collect(missing)

    def _collect(self, missing: Pairs) -> None:
        assert self.data is not None
        every = [pair for pairs in missing.values() for pair in pairs]
        step = f"statistics: {cost.cost_text(every, self.config.tokens)}"
        batches = shown_batches(self.data, self.rows, self.progress, step)
        found = activations.collect(self.model, missing, batches, self.config.tokens)
        for stack, moments in found.items():
            for what, each in self.moments.get(stack, {}).items():
                moments[what] = each.joined(moments[what])
            self.moments[stack] = moments

    def parts(self, choices: Sequence[Choice]) -> list[list[int]]:
        """Return the choices, by number, in parts whose statistics fit the memory, if one does."""
        parts: list[list[int]] = [[]]
        pairs: list[tuple[FeedForward, FeedForward]] = []
        for number, choice in enumerate(choices):
            own = [pair for each in pairs_of([choice]).values() for pair in each]
            if parts[-1] and cost.cost_of([*pairs, *own])[1] > self.memory:
                parts.append([])
                pairs = []
            parts[-1].append(number)
            pairs += own
        return parts


def pairs_of(choices: Sequence[Choice]) -> Pairs:
    """Return the pairs whose neurons are compared, by stack: each member with the anchor."""
    pairs: Pairs = {}
    for choice in choices:
        for anchor, *others in choice:
            pairs.setdefault(anchor.stack, []).extend((anchor, other) for other in others)
    return pairs
