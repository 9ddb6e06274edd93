"""A few rows of the data as inputs of every graph: to compare on, and to calibrate with.

``exporter/plan.py`` takes rows from all over the data, few enough to be stored, and asks here what
each graph of the package reads of them.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ffmerge.errors import InputError
from ffmerge.exporter.graphs import STATES, Graph
from ffmerge.models import kv_cache, tasks
from ffmerge.models.derive import fits
from ffmerge.models.examples import Examples
from ffmerge.models.probe import Array

ROWS, LENGTH = 32, 64  # of the real case, and tokens of each
BYTES, SCORES = 1 << 22, 1 << 24  # of its inputs, and elements of its logits, at most
# By which int4 is rounded, and from which int8-static has its ranges: 16,384 tokens of text.
ROUNDING, BATCH = 256, 8
LONGEST = 256  # tokens of a row by which it is rounded, where there are few rows


def real_rows(examples: Examples, model: Any, task: str, length: int = LENGTH) -> dict[str, Array]:
    """Return a few examples as model inputs, from all over the data, and few enough to be stored.

    Text is cut to ``length`` tokens, at the end that has the padding. Where scores of a large
    vocabulary leave room for few rows, they are the longest of their part of the data: one of three
    tokens says nothing of a model.
    """
    first = _cut(examples.take(examples.rows[:1]), length)
    size = sum(array.nbytes for name, array in first.items() if name != "labels")
    scores = 1
    if tasks.base(task) in (*tasks.GENERATE, "fill-mask"):
        scores = length * model.config.get_text_config().vocab_size
    count = max(min(ROWS, BYTES // max(size, 1), SCORES // scores, len(examples)), 1)
    chosen = [examples.rows[i] for i in np.linspace(0, len(examples) - 1, count).astype(int)]
    if scores > 1 and examples.lengths:
        chosen = _longest_of_parts(examples, count)
    return _cut(examples.take(chosen), length)


def _longest_of_parts(examples: Examples, count: int) -> list[int]:
    """Return ``count`` rows, the longest of each part of the data."""
    chosen: list[int] = []
    for part in np.array_split(np.arange(len(examples)), count):
        rows = [examples.rows[place] for place in part]
        chosen += examples.of(rows).longest().rows
    return chosen


def rounding_rows(
    examples: Examples, most: int = ROUNDING, length: int = LENGTH
) -> Iterator[dict[str, Array]]:
    """Yield batches of examples from all over the data, at most ``most`` rows in all.

    Text is cut to ``length`` tokens.
    """
    count = min(most, len(examples))
    chosen = np.linspace(0, len(examples) - 1, count).astype(int)
    for start in range(0, count, BATCH):
        rows = [examples.rows[i] for i in chosen[start : start + BATCH]]
        yield _cut(examples.take(rows), length)


def rounding_length(examples: Examples) -> int:
    """Return to how many tokens rows are cut by which int4 is rounded: of few rows to more."""
    return max(LENGTH, min(LONGEST, ROUNDING * LENGTH // len(examples)))


def check_rows(graph: Graph, rows: Mapping[str, Array]) -> None:
    """Raise InputError unless rows have what the first graph of a package reads."""
    missing = []
    for spec in graph.probe.inputs:
        if spec.needed and spec.name not in rows:
            missing.append(spec.name)
        elif spec.name in rows and not fits(spec, rows[spec.name]):
            sizes = "x".join(map(str, rows[spec.name].shape[1:]))
            wanted = "x".join(map(str, spec.shape[1:]))
            raise InputError(f"{spec.name} of the data is {sizes} a row, the model takes {wanted}.")
    if missing:
        raise InputError(f"the data has no {', '.join(missing)}, which the model reads.")


def real_inputs(
    graphs: Sequence[Graph], rows: Mapping[str, Array], greedy: Mapping[str, Array]
) -> dict[str, dict[str, Array]]:
    """Return of the rows what each graph is given, by graph; nothing for one that needs a past.

    The decoder of a pair reads what PyTorch's encoder gives, and the target of the data, else
    what the model itself writes: the ids of ``greedy``.
    """
    found = {}
    given = dict(rows)
    for graph in graphs:
        names = [spec.name for spec in graph.probe.inputs]
        if needs_past(graph):
            continue
        if STATES in names:
            given = _for_decoder(graphs[0], rows, greedy)
        found[graph.name] = {
            name: np.ascontiguousarray(given[name]) for name in names if name in given
        }
    return found


def needs_past(graph: Graph) -> bool:
    """Say whether a graph is only for later steps: of a pair, and it reads no encoder's output."""
    names = [spec.name for spec in graph.probe.inputs]
    return STATES not in names and any(kv_cache.side_of(name) for name in names)


def calibration_feeds(
    graphs: Sequence[Graph], real: Mapping[str, Mapping[str, Array]]
) -> dict[str, list[dict[str, Array]]]:
    """Return batches of all inputs, for every graph that is traced, from what it is given of rows.

    One that needs a past reads all ids but the first, behind what the first step leaves of that.
    It is compared on drawn inputs only, so these are among its batches.
    """
    batches: dict[str, list[dict[str, Array]]] = {}
    first = graphs[0]
    for graph in graphs:
        if graph.name in real and not graph.parts:
            batches[graph.name] = graph.probe.runs(graph.probe.complete(real[graph.name]))
        elif needs_past(graph):
            drawn = [graph.probe.draw(case) for case in range(len(graph.probe.cases))]
            batches[graph.name] = [_later_step(graph, first, real), *drawn]
        first = graph
    return batches


def _later_step(
    graph: Graph, first: Graph, real: Mapping[str, Mapping[str, Array]]
) -> dict[str, Array]:
    """Return the inputs of a graph that goes on where the ``first`` step ended."""
    feeds = first.probe.complete(real[first.name])
    ids = feeds["input_ids"]
    outputs = first.run({**feeds, "input_ids": ids[:, :1]})
    feeds["input_ids"] = ids[:, 1:]
    for name, array in outputs.items():
        if kv_cache.is_present(name):
            feeds[kv_cache.past_of(name)] = array
    return {spec.name: feeds[spec.name] for spec in graph.probe.inputs}


def encoded(encoder: Graph, rows: Mapping[str, Array]) -> tuple[dict[str, Array], dict[str, Array]]:
    """Return what the encoder of a pair is given for rows, and what a decoder reads of it."""
    feeds = encoder.probe.complete({name: x for name, x in rows.items() if name != "labels"})
    states = encoder.run(feeds)["last_hidden_state"]
    mask = feeds.get("attention_mask", np.ones(states.shape[:2], np.int64))
    return feeds, {STATES: states, "encoder_attention_mask": mask}


def _for_decoder(
    encoder: Graph, rows: Mapping[str, Array], greedy: Mapping[str, Array]
) -> dict[str, Array]:
    ids = rows.get("decoder_input_ids")
    if ids is None:
        ids = np.concatenate([greedy["start"], greedy["tokens"][:, :-1]], 1)
    _, read = encoded(encoder, {name: array[: len(ids)] for name, array in rows.items()})
    return {"input_ids": ids, **read}


def _cut(batch: Mapping[str, Array], length: int = LENGTH) -> dict[str, Array]:
    """Return a batch of at most ``length`` tokens, and no column that is all padding.

    What a mask tells of sound stays as it is: that counts samples or frames.
    """
    arrays = {name: np.asarray(array) for name, array in batch.items()}
    mask = arrays.get("attention_mask")
    if mask is None or mask.ndim != 2:
        return arrays
    whole = {name for name, array in arrays.items() if array.dtype.kind in "iu"}
    is_text = any(arrays[name].shape == mask.shape for name in whole - {"attention_mask"})
    columns = _tokens(mask, length)
    for name, array in arrays.items():
        if array.shape[:2] == mask.shape and array.ndim < 4:  # boxes have four numbers a token
            if is_text:
                arrays[name] = array[:, columns]
        elif array.ndim == 2 and name in whole:
            arrays[name] = array[:, :length]
    return arrays


def _tokens(mask: Array, length: int) -> Array:
    """Return which columns are kept, ``length`` at most, at the end that has no padding."""
    columns = np.flatnonzero(mask.any(0))
    if not mask[:, 0].all() and mask[:, -1].all():  # padding is on the left
        return columns[-length:]
    return columns[:length]
