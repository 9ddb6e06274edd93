"""What a package is compared with: what PyTorch gives, on drawn inputs and on a few real ones."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

from ffmerge.errors import InputError
from ffmerge.exporter.graphs import Graph
from ffmerge.models import kv_cache, tasks
from ffmerge.models.examples import Examples, from_arrays
from ffmerge.models.inputs import to_tensors
from ffmerge.models.manifest import MetricResult, input_key, reference_key
from ffmerge.models.metrics import for_task
from ffmerge.models.probe import Array, stored_elements
from ffmerge.models.trace import GREEDY, Trace, trace_key
from ffmerge.passes.weights.evaluate import score_for

ROWS, LENGTH = 32, 64  # of the real case, and tokens of each
BYTES, SCORES = 1 << 22, 1 << 24  # of its inputs, and elements of its logits, at most
PROMPTS, PROMPT, NEW = 4, 8, 16  # of greedy decoding: rows, tokens given, tokens made
_POSITIONS = ("max_position_embeddings", "n_positions", "max_target_positions")


def real_rows(examples: Examples, model: Any, task: str) -> dict[str, Array]:
    """Return a few examples as model inputs, from all over the data, and few enough to be stored.

    Text is cut to ``LENGTH`` tokens, at the end that has the padding.
    """
    first = _cut(examples.take(examples.rows[:1]))
    size = sum(array.nbytes for name, array in first.items() if name != "labels")
    scored = tasks.base(task) in (*tasks.GENERATE, "fill-mask")
    scores = LENGTH * model.config.get_text_config().vocab_size if scored else 1
    count = max(min(ROWS, BYTES // max(size, 1), SCORES // scores, len(examples)), 1)
    chosen = np.linspace(0, len(examples) - 1, count).astype(int)
    return _cut(examples.take([examples.rows[i] for i in chosen]))


def real_inputs(plan: Sequence[Graph], batch: Mapping[str, Array]) -> dict[str, dict[str, Array]]:
    """Return of a batch what each graph is given, by graph; nothing for one that needs a past.

    The decoder of a pair reads what PyTorch's encoder gives, and the target of the data, else
    what the model itself writes.

    Raises:
        InputError: the data has not what the model takes.
    """
    found: dict[str, dict[str, Array]] = {}
    given = dict(batch)
    for graph in plan:
        names = {spec.name: spec.kind for spec in graph.probe.inputs}
        if any(map(kv_cache.is_past, names)) and "with_past" in graph.name:
            continue
        if "encoder_hidden_states" in names:
            given = _for_decoder(plan, batch)
        needed = ("normal", "picture", "integer")
        missing = [
            name for name, kind in names.items()
            if kind in needed and name not in given and name != "token_type_ids"
            and not kv_cache.is_past(name)
        ]  # fmt: skip
        if missing:
            raise InputError(f"the data has no {', '.join(missing)}, which the model reads.")
        found[graph.name] = {
            name: np.ascontiguousarray(given[name]) for name in names if name in given
        }
    return found


def real_metric(batch: Mapping[str, Array], model: Any, task: str) -> MetricResult | None:
    """Return PyTorch's task metric on a batch; None if it has no labels, or the task no metric."""
    metric, kind = for_task(task), tasks.base(task)
    paired = kind == "text2text-generation" and "decoder_input_ids" not in batch
    if metric is None or paired or ("labels" not in batch and kind != "text-generation"):
        return None
    examples = from_arrays(batch)
    value = score_for(model, task, examples, len(examples)).measure(model)
    return MetricResult(metric.name, value, len(examples))


def greedy(plan: Sequence[Graph], batch: Mapping[str, Array], model: Any) -> dict[str, Array]:
    """Return prompts and the ids that PyTorch puts first behind them, one token after another.

    Every step is a whole forward pass: what is told of a cache does not come from one. ``margin``
    is by how much each id's score exceeds the second. Nothing is left out or forbidden.
    """
    decoder = plan[-1]
    config, feeds = model.config, dict[str, Array]()
    if len(plan) > 1:
        encoded = plan[0].probe.complete(
            {k: v[:PROMPTS] for k, v in batch.items() if k != "labels"}
        )
        states = _run(plan[0], encoded)["last_hidden_state"]
        mask = encoded.get("attention_mask", np.ones(states.shape[:2], np.int64))
        feeds = {"encoder_hidden_states": states, "encoder_attention_mask": mask}
        names = ("decoder_start_token_id", "bos_token_id", "pad_token_id")
        start = [*(getattr(config, name, None) for name in names), 0]
        ids = np.full((len(states), 1), next(i for i in start if i is not None), np.int64)
        prompts = {name: encoded[name] for name in encoded}
    else:
        mask = batch.get("attention_mask", np.ones_like(batch["input_ids"]))
        length = min(PROMPT, max(int(np.median(mask.sum(1))), 1))
        rows = np.flatnonzero(mask[:, :length].all(1))[:PROMPTS]
        ids, prompts = batch["input_ids"][rows, :length], {}
    last = min([getattr(config, name, 0) or NEW * LENGTH for name in _POSITIONS])
    start_length, margins = ids.shape[1], []
    for _ in range(min(NEW, last - start_length)):
        logits = _run(decoder, decoder.probe.complete({**feeds, "input_ids": ids}))["logits"]
        best = np.sort(logits[:, -1], -1)[:, -2:]
        margins.append(best[:, 1] - best[:, 0])
        ids = np.concatenate([ids, logits[:, -1:].argmax(-1)], 1)
    named = {"start": ids[:, :start_length], "tokens": ids[:, start_length:], **prompts}
    return {**named, "margin": np.stack(margins, 1)} if margins and len(ids) else {}


def write_reference(
    path: Path,
    graphs: Sequence[tuple[Graph, str]],
    real: Mapping[str, Mapping[str, Array]],
    traces: Mapping[str, Trace],
    decoded: Mapping[str, Array],
    labels: Mapping[str, Array],
) -> None:
    """Store outputs of every graph and case, real inputs and labels, traces and greedy ids."""
    tensors: dict[str, Array] = {f"{GREEDY}{name}": array for name, array in decoded.items()}
    tensors |= labels
    about: dict[str, str] = {}
    for graph, file in graphs:
        own = real.get(graph.name, {})
        if not graph.parts:  # one made of parts is given what its first part is
            tensors |= {input_key(file, name): array for name, array in own.items()}
        for case, outputs in enumerate(_outputs(graph, own)):
            for name, array in outputs.items():
                kept = stored_elements(array, len(outputs), name, case >= len(graph.probe.cases))
                tensors[reference_key(file, case, name)] = kept
        if graph.name in traces:
            values, samples = traces[graph.name].values, traces[graph.name].samples
            about[trace_key(file)] = json.dumps([[v.name, v.shape, v.layer] for v in values])
            tensors[trace_key(file)] = np.concatenate([*samples, np.empty(0, np.float32)])
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, path, about)


def _outputs(graph: Graph, real: Mapping[str, Array]) -> Iterator[dict[str, Array]]:
    for case in range(len(graph.probe.cases) + graph.probe.real):
        yield _run(graph, graph.probe.feeds(case, real))


def _run(graph: Graph, feeds: Mapping[str, Array]) -> dict[str, Array]:
    model = graph.module.eval()
    with torch.no_grad():
        got = model(to_tensors(feeds, model))
    return {n: t.cpu().numpy() for n, t in zip(graph.outputs, got, strict=True)}


def _for_decoder(plan: Sequence[Graph], batch: Mapping[str, Array]) -> dict[str, Array]:
    ids = batch.get("decoder_input_ids")
    if ids is None:
        made = greedy(plan, batch, plan[0].module.model)
        ids = np.concatenate([made["start"], made["tokens"][:, :-1]], 1)
    rows = {name: array[: len(ids)] for name, array in batch.items() if name != "labels"}
    encoded = plan[0].probe.complete(rows)
    states = _run(plan[0], encoded)["last_hidden_state"]
    mask = encoded.get("attention_mask", np.ones(states.shape[:2], np.int64))
    return {"input_ids": ids, "encoder_hidden_states": states, "encoder_attention_mask": mask}


def _cut(batch: Mapping[str, Array]) -> dict[str, Array]:
    """Return a batch of at most ``LENGTH`` tokens, and no column that is all padding."""
    arrays = {name: np.asarray(array) for name, array in batch.items()}
    mask = arrays.get("attention_mask")
    if mask is None or mask.ndim != 2:
        return arrays
    used = np.flatnonzero(mask.any(0))
    left = not mask[:, 0].all() and mask[:, -1].all()
    columns = used[-LENGTH:] if left else used[:LENGTH]
    whole = mask.shape
    own = {n: a[:, columns] if a.shape == whole else a[:, :LENGTH] if a.ndim == 2 else a
           for n, a in arrays.items()}  # fmt: skip
    return own
