"""Sublayers with fewer hidden neurons: how a model of a class is made to have them.

``merge_`` narrows and then asks :func:`settle_config_` whether the configuration can say so: then
the checkpoint is a plain one. Where layers differ in width, or no value of the configuration is the
width, saving and loading go by :func:`rules`, which ``modeling_ffmerge.py`` follows.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from ffmerge.errors import InputError
from ffmerge.models.modeling_ffmerge import Rules
from ffmerge.models.record import MergeRecord
from ffmerge.models.sublayer import FeedForward, block_of, stacks


def rules(model: nn.Module, sublayers: Sequence[FeedForward], record: MergeRecord) -> Rules:
    """Return which maps of which layers have which shapes, by no name that a release may change.

    Raises:
        InputError: the model has no such stack or layer.
    """
    widths = [width for narrowed in record.narrowed for width in narrowed.widths]
    found = members(sublayers, record)
    return [_rule(model, member, width) for member, width in zip(found, widths, strict=True)]


def members(sublayers: Sequence[FeedForward], record: MergeRecord) -> list[FeedForward]:
    """Return the sublayers that were narrowed, in the order of the record.

    Raises:
        InputError: the model has no such stack or layer.
    """
    by_stack = stacks(sublayers)
    found = []
    for narrowed in record.narrowed:
        by_layer = {member.layer: member for member in by_stack.get(narrowed.stack, ())}
        for layer in narrowed.layers:
            if layer not in by_layer:
                raise InputError(
                    f"the merge record narrows layer {layer} of stack {narrowed.stack!r}, which "
                    "this model has not."
                )
            found.append(by_layer[layer])
    return found


def _rule(model: nn.Module, member: FeedForward, width: int) -> Any:
    block = block_of(model, member.output)
    assert block is not None  # a sublayer is found in a repeated block only
    blocks, layer = block
    before = blocks.split(".")
    words = tuple(word for word in member.stack.split(".") if word in before)
    numbers = sum(part.isdigit() for part in before)
    order = []
    for path, module in model.get_submodule(f"{blocks}.{layer}").named_modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            order.append(f"{blocks}.{layer}.{path}")
    shapes = {}
    for weight in member.weights:
        path, _, part = weight.name.rpartition(".")
        if part == "weight":
            shape = [*model.get_parameter(weight.name).shape]
            shape[weight.neurons or 0] = width * weight.blocks
            shapes[order.index(path)] = tuple(shape)
    return words, numbers, layer, shapes


def fill(state: dict[str, Tensor], sublayers: Sequence[FeedForward], record: MergeRecord) -> None:
    """Put into ``state`` weights of the width that they once had: what was taken out is 0."""
    full = [width for narrowed in record.narrowed for width in narrowed.full]
    for member, width in zip(members(sublayers, record), full, strict=True):
        for weight in member.weights:
            state[weight.name] = weight.filled(state[weight.name], width)


def settle_config_(model: Any) -> None:
    """Have the configuration of a narrowed model say how wide it is, where it can.

    A value that is the old width is tried with the new one, and kept if a model made of the
    configuration then has more of the shapes that this one has. All or nothing is changed.
    """
    now = _differing(model, model.config)
    changed = []
    for holder, name, value in [*_candidates(model, now)]:
        if not now:
            break
        old = getattr(holder, name)
        try:
            setattr(holder, name, value)
        except Exception:  # however a configuration says that it takes no such value
            continue
        found = _differing(model, model.config)
        if found < now:
            now = found
            changed.append((holder, name, old))
        else:
            setattr(holder, name, old)
    if now:
        for holder, name, old in reversed(changed):
            setattr(holder, name, old)


def is_plain(model: Any) -> bool:
    """Tell whether a model made of the configuration has every parameter in its shape."""
    return not _differing(model, model.config)


def _differing(model: Any, config: Any) -> set[str]:
    """Return the parameters that have another shape in a model made of ``config``."""
    shapes = {name: p.shape for name, p in model.named_parameters()}
    try:
        with torch.device("meta"):
            made = type(model)(type(config).from_dict(config.to_dict()))
    except Exception:  # whatever a class does with a value that it does not take
        return set(shapes) | {""}
    found = {name: p.shape for name, p in made.named_parameters()}
    return {name for name, shape in shapes.items() if found.get(name) != shape}


def _candidates(model: Any, differing: set[str]) -> Iterator[tuple[Any, str, Any]]:
    """Yield values of the configuration that may be the width: where, its name, the new value."""
    with torch.device("meta"):
        made = dict(type(model)(model.config).named_parameters())
    changes = set()
    for name in sorted(differing):
        old, new = made[name].shape, model.get_parameter(name).shape
        if len(old) == 2:
            sides = [*zip(old, new, strict=True)]
            wide, narrow = next(side for side in sides if side[0] != side[1])
            rest = next((a for a, b in sides if a == b), 0)
            changes |= {(wide, narrow, rest), (wide // 2, narrow // 2, rest)}  # fused: half of it
    holders = [model.config]
    holders += [each for each in vars(model.config).values() if isinstance(each, PretrainedConfig)]
    for holder in holders:
        for name, value in [*vars(holder).items()]:
            for wide, narrow, rest in sorted(changes):
                if value is None or (type(value) is int and value == wide):
                    yield holder, name, narrow
                elif type(value) in (int, float) and rest and value * rest == wide:
                    yield holder, name, (narrow + 0.25) / rest
