"""Greedy decoding with the graphs alone, held against the ids that PyTorch put first."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ffmerge.models import kv_cache
from ffmerge.models.manifest import GraphRecord
from ffmerge.models.probe import Array
from ffmerge.runtime_tests.runtimes.base import Session


@dataclass(frozen=True)
class Difference:
    """The first id of a prompt that differs; PyTorch's exceeded its second by ``margin``."""

    prompt: int
    step: int
    expected: int
    got: int
    margin: float


@dataclass(frozen=True)
class Generation:
    """Greedy decoding of ``prompts``, at one optimization level.

    ``agreement`` is the fraction of the ``compared`` ids that are PyTorch's. From its first
    difference on a prompt does not agree; where PyTorch's choice was within the tie of its
    second, both ways are right, and from there the prompt is not compared: it is one of ``ties``.
    """

    optimization: str
    prompts: int
    tokens: int
    compared: int
    agreement: float
    ties: int
    difference: Difference | None
    needed: float
    ok: bool
    reason: str | None


def replay(
    served: Sequence[tuple[GraphRecord, Session]],
    stored: Mapping[str, Array],
    optimization: str,
    tie: float,
    needed: float,
) -> Generation:
    """Return how well the sessions continue the prompts of ``stored``, with their cache if any.

    ``stored`` has what the encoder reads, the first ids (``start``), PyTorch's ``tokens`` and by
    how much each exceeded the second (``margin``).
    """
    expected, margin = stored["tokens"], stored["margin"]
    step = decoder(served, stored)
    ids, got = stored["start"], np.empty((len(expected), 0), np.int64)
    for _ in range(expected.shape[1]):
        new = step(ids)[:, -1].argmax(-1)[:, None]
        got, ids = np.concatenate([got, new], 1), new
    same, compared, ties, first = 0, 0, 0, None
    for row in range(len(expected)):
        off = np.flatnonzero(got[row] != expected[row])
        if not len(off):
            same, compared = same + expected.shape[1], compared + expected.shape[1]
            continue
        at = int(off[0])
        tied = bool(margin[row, at] <= tie)
        same, compared = same + at, compared + (at if tied else expected.shape[1])
        ties += tied
        if not tied and first is None:
            ids_there = int(expected[row, at]), int(got[row, at])
            first = Difference(row, at, *ids_there, float(margin[row, at]))
    agreement = same / compared if compared else 1.0
    reason = None
    if agreement < needed and first:
        reason = (
            f"greedy decoding agrees in {agreement:.1%} of {compared} ids, {needed:.0%} are "
            f"needed: id {first.step} of prompt {first.prompt} is {first.got} instead of "
            f"{first.expected}"
        )
    return Generation(
        optimization, len(expected), expected.shape[1], compared, agreement, ties, first, needed,
        reason is None, reason,
    )  # fmt: skip


def decoder(
    served: Sequence[tuple[GraphRecord, Session]], stored: Mapping[str, Array]
) -> Callable[[Array], Array]:
    """Return a function from the next ids to their logits; it keeps the cache, or else all ids."""
    graph, session = served[-1]
    kept: dict[str, Array] = {}
    if len(served) > 1:
        encoder, reads = served[0]
        feeds = encoder.probe.complete(stored)
        states = reads.run(encoder.outputs, feeds)["last_hidden_state"]
        mask = feeds.get("attention_mask", np.ones(states.shape[:2], np.int64))
        kept = {"encoder_hidden_states": states, "encoder_attention_mask": mask}
    cached = kv_cache.keeps_cache(graph.outputs)

    def step(ids: Array) -> Array:
        if not cached:
            kept["input_ids"] = np.concatenate([kept.get("input_ids", ids[:, :0]), ids], 1)
            ids = kept["input_ids"]
        outputs = session.run(graph.outputs, graph.probe.complete({**kept, "input_ids": ids}))
        for name, value in outputs.items():
            if kv_cache.is_present(name) and value.size:  # of the encoder they are made once
                kept[kv_cache.past_of(name)] = value
        if cached and any(spec.name == kv_cache.FLAG for spec in graph.probe.inputs):
            kept[kv_cache.FLAG] = np.array([True])
        return outputs["logits"]

    return step
