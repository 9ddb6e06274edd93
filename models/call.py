"""What a call of a package means: which arguments its graph does without, and PyTorch's loss.

``serving.py`` asks :func:`check` before it runs a graph, so that no argument is dropped in silence,
and :func:`loss` where the call has labels.
"""

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.loss.loss_utils import LOSS_MAPPING

from ffmerge.errors import InputError
from ffmerge.models import tasks

LABELS = ("labels", "start_positions", "end_positions")
# What says how the outputs are given, and what only a cache of PyTorch's own reads.
_FORM = ("use_cache", "return_dict", "cache_position", "logits_to_keep")
_CLASSES = (
    "text-classification", "image-classification", "audio-classification", "video-classification",
)  # fmt: skip


def check(model: Any, given: Mapping[str, Any], read: Collection[str], package: str) -> None:
    """Raise InputError at an argument that no graph reads, unless it says what holds anyway.

    ``given`` are the arguments of a call by name, ``read`` those that the graphs of the
    ``package`` take.
    """
    parameters = inspect.signature(type(model).forward).parameters
    for name, value in given.items():
        if name.endswith("input_ids"):
            _check_ids(name, value)
        if name in read or name in (*_FORM, *LABELS):
            continue
        default = parameters[name].default if name in parameters else None
        if not _is_default(model, name, value, default):
            raise InputError(
                f"the package {package} cannot take {name}: its graph reads "
                f"{', '.join(sorted(read))}."
            )


def _check_ids(name: str, ids: Any) -> None:
    """Raise InputError at ids below 0, which a graph counts from the end of its table."""
    if isinstance(ids, Tensor) and ids.numel() and int(ids.min()) < 0:
        raise InputError(
            f"{name} holds {int(ids.min())}, and ids are 0 or more: what is not to be read is "
            "masked by attention_mask, and -100 is for labels."
        )


def _is_default(model: Any, name: str, value: Any, default: Any) -> bool:
    """Tell whether an argument is what PyTorch takes where it is not given."""
    if name == "past_key_values":
        return not value.get_seq_length()
    if not isinstance(value, Tensor):
        return value is default or (isinstance(value, bool) and value == bool(default))
    if name.endswith("mask") and value.dtype != torch.float32:
        return bool((value == 1).all())
    if name == "position_ids":
        return bool((value == torch.arange(value.shape[-1])).all())
    if name == "token_type_ids":  # of one kind there is nothing to tell apart
        return getattr(model.config, "type_vocab_size", 0) == 1 and not value.any()
    return False


def loss(model: Any, task: str, given: Mapping[str, Any], outputs: Mapping[str, Any]) -> Tensor:
    """Return the loss of a call with labels, as PyTorch has it.

    Raises:
        InputError: the class computes one from more than its outputs, or in a way of its own.
    """
    kind = _kind_of_loss(model, tasks.base(task))
    if kind is None:
        named = next(name for name in LABELS if name in given)
        raise InputError(
            f"a package of {type(model).__name__} gives no loss: leave out {named}, and compute it "
            "from the outputs."
        )
    function: Callable[..., Tensor] = LOSS_MAPPING[kind]
    if kind == "ForQuestionAnswering":
        scores = {name: outputs[name] for name in ("start_logits", "end_logits")}
        return function(**scores, **{name: given[name] for name in LABELS[1:]})
    logits, labels, config = outputs["logits"], given["labels"], model.config
    if kind == "ForSequenceClassification":
        return function(labels=labels, pooled_logits=logits, config=config)
    return function(logits=logits, labels=labels, config=config, vocab_size=logits.shape[-1])


def _kind_of_loss(model: Any, task: str) -> str | None:
    """Return by transformers' name how a class computes its loss, None if that is not known.

    An encoder-decoder reads its labels one position later, so they need not be shifted.
    """
    if getattr(model.config, "output_router_logits", False):
        return None
    if task in _CLASSES:
        return "ForSequenceClassification"
    if task == "token-classification":
        return "ForTokenClassification"
    if task == "question-answering":
        return "ForQuestionAnswering"
    decodes = model.config.is_encoder_decoder
    if task == "fill-mask" or (task in tasks.GENERATE and decodes):
        return "ForMaskedLM"
    if task == "text-generation" and getattr(model, "loss_type", None) in ("ForCausalLM", None):
        return "ForCausalLM"
    return None
