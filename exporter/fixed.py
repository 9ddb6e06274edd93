"""A graph for rows of one size, one by one, as an NPU wants it: what those sizes are.

``exporter/plan.py`` asks for a profile that is ``fixed``. The recipe of the graph's inputs then
holds the sizes (``Probe.fixed``): it is translated at them, whatever is compared or calibrated on
is padded to them, and so is what a user gives the package.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ffmerge.errors import FfmergeWarning, InputError
from ffmerge.exporter.graphs import Graph
from ffmerge.models.inputs import refused
from ffmerge.models.probe import Array, Probe, Tokens

TOKENS = 128  # of a row of text
_ROW, _TEXT = "batch_size", "sequence_length"
_POSITIONS = ("max_position_embeddings", "n_positions")


def with_fixed_sizes(
    planned: Sequence[Graph], tokenizer: Any, example: Mapping[str, Array]
) -> tuple[Graph, ...]:
    """Return the only graph of a package so that it takes one row, of the sizes of an example.

    Without one a row is ``TOKENS`` tokens, fewer where the model has fewer positions, or the
    ``tokenizer`` (None: there is none) makes fewer.

    Raises:
        InputError: there are several graphs, a size is not known, inputs are of several batches, or
            the model does not run at these sizes.
    """
    if len(planned) > 1:
        raise InputError("an encoder and its decoder have no form of fixed sizes: export another.")
    (graph,) = planned
    model, recipe = graph.module.model, graph.probe
    if any(spec.shape[:1] != (_ROW,) for spec in recipe.inputs):
        raise InputError(f"the inputs of {type(model).__name__} are not rows of one batch.")
    known = {_TEXT: _longest(model, tokenizer), **recipe.sizes_of(example), _ROW: 1}
    named = {side for spec in recipe.inputs for side in spec.shape if isinstance(side, str)}
    if missing := sorted(named - set(known)):
        raise InputError(
            f"no size is known for {', '.join(missing)}: give --example FILE.npz, which holds a "
            "row of every input of the sizes that the package is to have."
        )
    fixed = {side: known[side] for side in sorted(named)}
    cases = tuple({**fixed, _ROW: rows} for rows, _ in enumerate(recipe.cases, 1))
    recipe = replace(_with_padding(recipe, model.config), cases=cases, fixed=fixed)
    drawn = recipe.draw(0)
    try:
        graph.run(drawn)
        graph = replace(graph, by_token=_by_token(graph), probe=recipe)
        _warn_of_padding(graph)
    except InputError:
        raise
    except Exception as error:  # a model's code may raise anything
        raise InputError(refused(model, drawn, error)) from error
    return (graph,)


def _with_padding(recipe: Probe, config: Any) -> Probe:
    """Return a recipe whose ids are padded as the configuration says, if no tokenizer does."""
    pad: Any = getattr(config, "pad_token_id", None)
    inputs = []
    for spec in recipe.inputs:
        told = isinstance(pad, int) and 0 <= pad < spec.high
        if spec.name == "input_ids" and spec.tokens is None and told:
            spec = replace(spec, tokens=Tokens(pad=int(pad)))
        inputs.append(spec)
    return replace(recipe, inputs=tuple(inputs))


def _warn_of_padding(graph: Graph) -> None:
    """Warn where a row of half the tokens gets something else once it is padded."""
    recipe = graph.probe
    masks = [spec.name for spec in recipe.inputs if spec.kind == "mask" and _TEXT in spec.shape]
    length = recipe.fixed.get(_TEXT, 0) // 2
    if not masks or not length:
        return
    half = replace(recipe, cases=({**recipe.cases[0], _TEXT: length},))
    feeds = half.draw(0)
    feeds |= {name: np.ones_like(feeds[name]) for name in masks}
    alone, padded = graph.run(feeds), graph.run(recipe.complete(feeds))
    for name, array in alone.items():
        found = padded[name]
        if name in graph.by_token:
            found = found[:, :length]
        if found.shape == array.shape and not np.allclose(found, array, rtol=1e-2, atol=1e-3):
            model = type(graph.module.model).__name__
            warnings.warn(
                f"{name} of {model} depends on the padding that the mask tells: of shorter rows a "
                "package of one size gives what PyTorch gives of padded ones.",
                FfmergeWarning,
                stacklevel=2,
            )


def _longest(model: Any, tokenizer: Any) -> int:
    """Return how many tokens a row has where no example says it."""
    config = model.config.get_text_config()
    places = [getattr(config, name, None) for name in _POSITIONS]
    places.append(getattr(tokenizer, "model_max_length", None))
    return min([TOKENS, *(n for n in places if isinstance(n, int) and n > 0)])


def _by_token(graph: Graph) -> tuple[str, ...]:
    """Return the outputs whose second dimension is the tokens of a row: it grows with them.

    Raises:
        InputError: an output is not of the rows of the batch.
    """
    recipe, found = graph.probe, set(graph.outputs)
    for case in range(2):
        sizes = recipe.cases[case]
        for name, array in graph.run(recipe.draw(case)).items():
            if array.shape[:1] != (sizes[_ROW],):
                raise InputError(f"{name} is not of the rows that the model reads.")
            if array.ndim < 2 or array.shape[1] != sizes.get(_TEXT):
                found.discard(name)
    return tuple(name for name in graph.outputs if name in found)
