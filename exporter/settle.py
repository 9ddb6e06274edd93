"""What of the inputs of a graph can only be told by running the model: sizes, and what stands in.

``exporter/plan.py`` asks, once the graphs are known. The model is run on small inputs, with one of
them changed at a time.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ffmerge.errors import InputError
from ffmerge.models.probe import LARGE, Array, InputSpec, Probe, Tokens

Feeds = Mapping[str, Array]  # by name
HEIGHT, WIDTH = "height", "width"  # the dynamic sizes of a picture
_PICTURES = ("pixel_values", "pixel_values_videos")
_STEP = 32  # of sizes that are tried, where a model has no patches


def check_repeats(graph: Any, exact: bool = False) -> Any:
    """Return the graph of a model that answers twice in the same way, else nothing can be compared.

    The second answer is the ``exact`` one if that will be asked for: then the graph has it.

    Raises:
        InputError: the two are unlike.
    """
    feeds = graph.probe.draw(0)
    first, again = graph.answer(feeds), None
    if exact:
        again = outputs_of(graph, feeds, exact)
    if again is not None:
        graph = graph.knowing(feeds, again, exact)
    if again is None or not _alike(first, again):  # or float32 rounds off as much as that
        again = outputs_of(graph, feeds)
        if again is not None and not _alike(first, again):
            raise InputError(
                f"{type(graph.module.model).__name__} draws random numbers in its forward pass: "
                "equal inputs give unequal outputs, so no package of it can be right."
            )
    return graph


def any_size(graph: Any) -> Any:
    """Return a graph for pictures of any height and width, if its model takes others than one."""
    model, recipe = graph.module.model, graph.probe
    inputs: list[InputSpec] = []
    size: tuple[int, int] | None = None
    for spec in recipe.inputs:
        if spec.name in _PICTURES and all(isinstance(side, int) for side in spec.shape[-2:]):
            size = int(spec.shape[-2]), int(spec.shape[-1])
            spec = replace(spec, shape=(*spec.shape[:-2], HEIGHT, WIDTH))
        inputs.append(spec)
    if size is None:
        return graph
    step = getattr(getattr(model.config, "vision_config", model.config), "patch_size", _STEP)
    if not isinstance(step, int):
        step = _STEP
    (height, width), cases = size, []
    for case, (down, across) in zip(recipe.cases, ((0, 0), (1, 0), (1, 2)), strict=True):
        sides = {HEIGHT: height + down * step, WIDTH: width + across * step}
        cases.append({**case, **sides})
    other = Probe(tuple(inputs), tuple(cases))
    if outputs_of(graph, other.draw(len(cases) - 1, batch=1)) is None:
        return graph
    return replace(graph, probe=other)


def has_large_pictures(feeds: Feeds) -> bool:
    """Say whether pictures of a case are so large that float64 would take most of an export.

    Of those one row shows what is rounded off; rows of a text are less alike, by their padding.
    """
    return any(name in _PICTURES and array[0].size > LARGE for name, array in feeds.items())


def one_size(recipe: Probe) -> Probe:
    """Return a probe with the height and width of its first case for every picture."""
    first = recipe.cases[0]
    inputs = []
    for spec in recipe.inputs:
        shape = [first[side] if side in (HEIGHT, WIDTH) else side for side in spec.shape]
        inputs.append(replace(spec, shape=tuple(shape)))
    cases = [{k: n for k, n in case.items() if k not in (HEIGHT, WIDTH)} for case in recipe.cases]
    return replace(recipe, inputs=tuple(inputs), cases=tuple(cases))


def stand_ins(graph: Any) -> Any:
    """Return a graph whose inputs say what PyTorch takes where they are not given.

    One for which nothing that is known here gives PyTorch's answer is needed.
    """
    recipe, pad = graph.probe, getattr(graph.module.model.config, "pad_token_id", None)
    feeds = recipe.draw(1)
    if "input_ids" in feeds and "attention_mask" in feeds and isinstance(pad, int):
        feeds["input_ids"] = np.where(feeds["attention_mask"] == 0, pad, feeds["input_ids"])
    inputs = []
    for spec in recipe.inputs:
        if not spec.needed and spec.kind in ("integer", "boxes", "mask"):
            spec = _settled(graph, spec, feeds, pad)
        inputs.append(spec)
    return replace(graph, probe=replace(recipe, inputs=tuple(inputs)))


def _settled(graph: Any, spec: InputSpec, feeds: Feeds, pad: Any) -> InputSpec:
    """Return an input with what stands for it in ``feeds`` where it is not given."""
    rest = {name: array for name, array in feeds.items() if name != spec.name}
    without = outputs_of(graph, rest)
    if without is None:
        return replace(spec, needed=True)
    choices = [spec]
    if spec.kind == "mask" and isinstance(pad, int) and spec.shape == _shape_of_ids(graph):
        choices.append(replace(spec, tokens=Tokens(pad=pad)))
    for choice in choices:
        inputs = [choice if each.name == spec.name else each for each in graph.probe.inputs]
        completed = replace(graph.probe, inputs=tuple(inputs)).complete(rest)
        found = outputs_of(graph, completed)
        if found is not None and _alike(found, without):
            return choice
    return replace(spec, needed=True)


def _shape_of_ids(graph: Any) -> tuple[int | str, ...]:
    shapes = [spec.shape for spec in graph.probe.inputs if spec.name == "input_ids"]
    return shapes[0] if shapes else ()


def outputs_of(graph: Any, feeds: Feeds, exact: bool = False) -> Feeds | None:
    """Return what PyTorch gives, computed anew; None where it does not take the inputs."""
    try:
        found: Feeds = graph.run(feeds, exact)
    except Exception:  # a model's code may raise anything
        return None
    return found


def _alike(found: Feeds, expected: Feeds) -> bool:
    for name, one in found.items():
        other = expected[name]
        if one.shape != other.shape:
            return False
        if not np.allclose(one, other, rtol=1e-4, atol=1e-5, equal_nan=True):
            return False
    return True
