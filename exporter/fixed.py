"""A graph for rows of one size, one by one, as an NPU wants it: what those sizes are.

``exporter/plan.py`` asks for a profile that is ``fixed``. The recipe of the graph's inputs then
holds the sizes (``Probe.fixed``): it is translated at them, whatever is compared or calibrated on
is padded to them, and so is what a user gives the package.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ffmerge.errors import InputError
from ffmerge.exporter.graphs import Graph
from ffmerge.models.inputs import refused, to_tensors
from ffmerge.models.probe import Array

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
    by_token = _by_token(graph)
    graph = replace(graph, probe=replace(recipe, cases=cases, fixed=fixed), by_token=by_token)
    drawn = graph.probe.draw(0)
    try:
        with torch.no_grad():
            graph.module(to_tensors(drawn, graph.module))
    except Exception as error:  # a model's code may raise anything
        raise InputError(refused(model, drawn, error)) from error
    return (graph,)


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
