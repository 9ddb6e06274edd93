"""A model run by its graphs alone: one step of an encoder-decoder or decoder, and greedy decoding.

The graphs that are used together are ``served``: one, or an encoder and the decoder that reads
it, each with the session that runs it. Three checks decode with them: the task metric (one step
over a whole target, ``metric.py``), chrF of written texts (``translation.py``), and
:func:`check_generation` here, which holds greedy decoding against the ids that PyTorch put first.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ffmerge.models.kv_cache import FLAG, is_present, keeps_cache, past_of
from ffmerge.models.manifest import GraphRecord
from ffmerge.models.probe import Array
from ffmerge.runtime_tests.results import Generation
from ffmerge.runtime_tests.runtimes.base import Session
from ffmerge.runtime_tests.tolerance import Tolerance

Served = Sequence[tuple[GraphRecord, Session]]


def decoder(served: Served, batch: Mapping[str, Array]) -> Callable[[Array], Array]:
    """Return a function from the next ids (rows, new) to their logits (rows, new, vocabulary).

    It keeps the cache if the graph has one; else all ids, and gives the logits of all. The encoder
    of a pair has then read the ``batch``.
    """
    graph, session = served[-1]
    kept: dict[str, Array] = {}
    if len(served) > 1:
        kept = _encoded(*served[0], batch)
    cached = keeps_cache(graph.outputs)
    flagged = any(spec.name == FLAG for spec in graph.probe.inputs)

    def step(ids: Array) -> Array:
        if not cached:
            ids = np.concatenate([kept.get("input_ids", ids[:, :0]), ids], 1)
            kept["input_ids"] = ids
        outputs = session.run(graph.outputs, graph.probe.complete({**kept, "input_ids": ids}))
        for name, value in outputs.items():
            if is_present(name) and value.size:  # the encoder's are made once, then empty
                kept[past_of(name)] = value
        if cached and flagged:
            kept[FLAG] = np.array([True])
        return outputs["logits"]

    return step


def _encoded(graph: GraphRecord, session: Session, batch: Mapping[str, Array]) -> dict[str, Array]:
    """Return what a decoder reads of the encoder at every step."""
    feeds = graph.probe.complete(batch)
    states = session.run(graph.outputs, feeds)["last_hidden_state"]
    mask = feeds.get("attention_mask", np.ones(states.shape[:2], np.int64))
    return {"encoder_hidden_states": states, "encoder_attention_mask": mask}


def greedy(step: Callable[[Array], Array], start: Array, count: int) -> Array:
    """Return the ``count`` ids that are put first behind ``start``, one after another."""
    ids, found = start, [start[:, :0]]
    for _ in range(count):
        ids = step(ids)[:, -1].argmax(-1)[:, None]
        found.append(ids)
    return np.concatenate(found, 1)


def check_generation(
    served: Served, stored: Mapping[str, Array], optimization: str, tolerance: Tolerance
) -> Generation:
    """Return how well the sessions continue the prompts of ``stored``, with their cache if any.

    ``stored`` has what the encoder reads, the first ids (``start``), PyTorch's ``tokens`` and by
    how much each exceeded the second (``margin``).
    """
    rounding = served[-1][0].rounding.get("logits", 0.0)
    tie = tolerance.for_rounding(rounding).tie
    expected, margin = stored["tokens"], stored["margin"]
    prompts, tokens = expected.shape
    got = greedy(decoder(served, stored), stored["start"], tokens)
    same, compared, ties, first = 0, 0, 0, None
    for row in range(prompts):
        off = np.flatnonzero(got[row] != expected[row])
        if not len(off):
            same, compared = same + tokens, compared + tokens
            continue
        at = int(off[0])
        same += at
        if margin[row, at] <= tie:
            compared, ties = compared + at, ties + 1
            continue
        compared += at + 1  # what follows is behind other ids than PyTorch's
        first = first or {
            "prompt": row,
            "step": at,
            "expected": int(expected[row, at]),
            "got": int(got[row, at]),
            "margin": float(margin[row, at]),
        }
    agreement = 1.0
    if compared:
        agreement = same / compared
    reason = None
    if first and agreement < tolerance.tokens:
        reason = (
            f"greedy decoding agrees in {agreement:.1%} of {compared} ids, {tolerance.tokens:.0%} "
            f"are needed: id {first['step']} of prompt {first['prompt']} is {first['got']} instead "
            f"of {first['expected']}"
        )
    return Generation(
        optimization, prompts, tokens, compared, agreement, ties, first, tolerance.tokens,
        reason is None, reason,
    )  # fmt: skip
