"""The proof that a sublayer is a feed-forward one: its hidden neurons may stand in any order.

Runs the code of the sublayer on random weights: reordering its hidden neurons must leave its output
as it was. What :func:`ffmerge.models.find.survey` found and this rejects is left alone.
"""

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from transformers import Cache

from ffmerge.models.dataflow import run_example
from ffmerge.models.find import survey
from ffmerge.models.inputs import unchunked
from ffmerge.models.sublayer import FeedForward, LeftAlone

REJECTED = "reordering its hidden neurons changes its output"


def prove(model: nn.Module, sublayers: Sequence[FeedForward], seed: int = 0) -> tuple[bool, ...]:
    """Tell for each sublayer whether reordering its hidden neurons leaves its output unchanged.

    Each is run alone, in float32, with random weights on the inputs the model gave it, three
    times: as it is, with all its weights reordered, and with only the first map reordered. The
    second must agree with the first to rounding, and the third must not: a sublayer whose
    output does not depend on the weights proves nothing.
    """
    with unchunked(model):
        calls = _capture(model, sublayers)
        return tuple(_is_proved(model, each, *calls[each.path], seed) for each in sublayers)


def proven(model: nn.Module) -> tuple[tuple[FeedForward, ...], tuple[LeftAlone, ...]]:
    """Return what :func:`survey` returns, with what the proof rejects left alone as well."""
    found, left = survey(model)
    kept, rejected = [], []
    for sublayer, holds in zip(found, prove(model, found), strict=True):
        if holds:
            kept.append(sublayer)
        else:
            rejected.append(LeftAlone(sublayer.path, REJECTED))
    return tuple(kept), (*left, *rejected)


def _capture(model: nn.Module, sublayers: Sequence[FeedForward]) -> dict[str, tuple[Any, Any]]:
    """Return, by path, the first positional and keyword arguments each module is called with."""
    calls: dict[str, tuple[Any, Any]] = {}

    def keep(path: str, _: nn.Module, args: Any, kwargs: Any) -> None:
        calls.setdefault(path, (args, kwargs))

    with ExitStack() as stack:
        for sublayer in sublayers:
            module = model.get_submodule(sublayer.path)
            hook = partial(keep, sublayer.path)
            handle = module.register_forward_pre_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        run_example(model)
    return calls


def _is_proved(model: nn.Module, sublayer: FeedForward, args: Any, kwargs: Any, seed: int) -> bool:
    generator = torch.Generator().manual_seed(seed)
    module = copy.deepcopy(model.get_submodule(sublayer.path)).float().cpu().eval()
    args, kwargs = tree_map(_to_float32, (args, kwargs))
    parameters = {}
    for weight in sublayer.weights:
        parameter = module.get_parameter(weight.name.removeprefix(f"{sublayer.path}."))
        spread = parameter.numel() ** -0.25  # one over the square root of the mean side
        parameter.data = torch.randn(parameter.shape, generator=generator) * spread
        parameters[weight] = parameter
    order = torch.randperm(sublayer.d_ff, generator=generator)

    def run() -> Tensor:
        with torch.no_grad():
            leaves = tree_leaves(module(*args, **kwargs))
        return next(leaf for leaf in leaves if isinstance(leaf, Tensor))

    def reorder(of_output: bool) -> None:
        for weight, parameter in parameters.items():
            if weight.name.startswith(f"{sublayer.output}.") == of_output:
                parameter.data = weight.reordered(parameter.data, order)

    before = run()
    reorder(of_output=False)
    half_way = run()
    reorder(of_output=True)
    held = (run() - before).abs().max()
    return bool(held < 1e-3 * (half_way - before).abs().max())  # measured: 1e-7 to 1e-6


def _to_float32(value: Any) -> Any:
    if isinstance(value, Cache):
        return None  # empty on the first pass, but of a dtype
    if not isinstance(value, Tensor):
        return value
    if value.is_floating_point():
        value = value.float()
    return value.cpu()
