"""From where a decoder counts its positions, if it is not given any.

``exporter/graphs.py`` calls :func:`positions` for the input ``position_ids`` of a decoder alone;
``models/probe.py`` fills it in where a caller of the package does not give it, as PyTorch does.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ffmerge.errors import InputError
from ffmerge.models.inputs import refused, to_tensors
from ffmerge.models.probe import ALL, SHOWN, TOLD, Array, InputSpec, Probe, Tokens

NAME = "position_ids"
CLOSE = 1e-3  # of the largest logit: more than rounding, which is all that a rotation shows


def positions(model: Any, inputs: Sequence[InputSpec]) -> InputSpec | None:
    """Return how the input that a model counts its tokens by is filled in, None if it is not known.

    Most models count all of them, or only see how far two are apart; some that have a table of
    positions, as OPT, leave padding out by the mask, and some, as RoBERTa, by its id.
    """
    spec = InputSpec(NAME, "int64", ("batch_size", "sequence_length"), ALL)
    names = {each.name for each in inputs}
    needed = {each.name for each in inputs if each.needed}
    if "attention_mask" not in names or needed != {"input_ids"}:
        return spec
    pad = getattr(model.config, "pad_token_id", None) or 0
    text = [each for each in range(3) if each != pad][:2]
    padding = 3 if pad == 1 else 2  # of pad + 1 tokens the first way is the last, of RoBERTa
    given = {
        "input_ids": np.array([[pad] * padding + text]),
        "attention_mask": np.array([[0] * padding + [1] * len(text)]),
    }
    kinds = (spec, replace(spec, kind=SHOWN), replace(spec, kind=TOLD, tokens=Tokens(pad=pad)))
    found = _last(model, Probe(tuple(inputs), ()).complete(given))
    for each in kinds:
        filled = _last(model, Probe((*inputs, each), ()).complete(given))
        if np.abs(filled - found).max() <= CLOSE * np.abs(found).max():
            return each
    return None


def _last(model: Any, feeds: Mapping[str, Array]) -> Array:
    """Return the logits of the last token.

    Raises:
        InputError: the model does not run.
    """
    try:
        with torch.no_grad():
            logits = model(**to_tensors(feeds, model)).logits
    except Exception as error:  # a model's code may raise anything
        raise InputError(refused(model, feeds, error)) from error
    return np.asarray(logits[0, -1].double().cpu())
