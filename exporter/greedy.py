"""The ids that PyTorch puts first, one after another: what a package that generates must repeat.

``generate`` of transformers makes them, without the settings of the model: nothing is forbidden,
forced or left out, and no id ends a row. Every step is a whole forward pass, so that what a
package's cache is held against does not come from one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, GenerationMixin

from ffmerge.exporter.graphs import Graph
from ffmerge.models import tasks
from ffmerge.models.inputs import to_tensors
from ffmerge.models.probe import Array

PROMPTS, PROMPT, NEW = 4, 8, 16  # rows, tokens given, tokens made
_POSITIONS = ("max_position_embeddings", "n_positions", "max_target_positions")
_STARTS = ("decoder_start_token_id", "bos_token_id", "pad_token_id")


def generates(graphs: Sequence[Graph], task: str) -> bool:
    """Say whether a package writes ids one after another: CTC gives one for each frame."""
    reads = [spec.name for spec in graphs[-1].probe.inputs]
    written = graphs[-1].outputs[0] == "logits" and "input_ids" in reads
    return tasks.base(task) in tasks.GENERATE and written


def greedy(graphs: Sequence[Graph], rows: Mapping[str, Array], model: Any) -> dict[str, Array]:
    """Return prompts, the first ids (``start``) and the ids that PyTorch puts behind them.

    The ``tokens`` are (prompts, steps); ``margin``, of that shape, is by how much the score of
    each exceeds the second. Nothing is returned where there is no room for another id.
    """
    if len(graphs) > 1:
        few = {name: x[:PROMPTS] for name, x in rows.items() if name != "labels"}
        prompts = graphs[0].probe.complete(few)
        first = _start(model.config)
        start = np.full((len(next(iter(prompts.values()))), 1), first, np.int64)
        given = {**prompts, "decoder_input_ids": start}
    else:
        mask = rows.get("attention_mask", np.ones_like(rows["input_ids"]))
        length = min(PROMPT, max(int(np.median(mask.sum(1))), 1))
        unpadded = np.flatnonzero(mask[:, :length].all(1))[:PROMPTS]
        first, prompts = None, {}
        start = rows["input_ids"][unpadded, :length]
        given = {"input_ids": start, "attention_mask": np.ones_like(start)}
    steps = min(NEW, _longest(model.config) - start.shape[1])
    if steps < 1 or not len(start):
        return {}
    scores, tokens = _generate(model, to_tensors(given, model), steps, first)
    best = scores.topk(2).values
    margin = (best[..., 0] - best[..., 1]).cpu().numpy()
    return {"start": start, "tokens": tokens.cpu().numpy(), **prompts, "margin": margin}


def _generate(
    model: Any, given: Mapping[str, torch.Tensor], steps: int, first: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits of every step and the ids of the largest; the model stays as it is."""
    plain = GenerationConfig(
        max_new_tokens=steps, do_sample=False, num_beams=1, use_cache=False, output_logits=True,
        return_dict_in_generate=True, pad_token_id=0, decoder_start_token_id=first,
    )  # fmt: skip
    settings, model.generation_config = model.generation_config, plain
    try:  # Whisper's own generate would ask for a language first
        made = GenerationMixin.generate(model, **given)
    finally:
        model.generation_config = settings
    return torch.stack(made.logits, 1), made.sequences[:, -steps:]


def _start(config: Any) -> int:
    """Return the id with which a decoder begins."""
    for name in _STARTS:
        if getattr(config, name, None) is not None:
            return int(getattr(config, name))
    return 0


def _longest(config: Any) -> int:
    """Return how many positions a model has, a large number if that is not known."""
    known = [getattr(config, name, 0) or 1 << 30 for name in _POSITIONS]
    return int(min(known))
