"""What an export is made of: graphs, and inputs on which they are compared with PyTorch.

The first step of :func:`ffmerge.exporter.package.export`. Options and data are checked here, before
anything is traced; all later steps read the :class:`Plan`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ffmerge.config import (
    CALIBRATED,
    FOUR_BITS,
    ExportConfig,
    check_without_data,
    parse_budget,
)
from ffmerge.errors import InputError
from ffmerge.exporter.fixed import with_fixed_sizes
from ffmerge.exporter.graphs import Graph, graphs, outputs_given
from ffmerge.exporter.greedy import generates, greedy
from ffmerge.exporter.rows import (
    BYTES,
    LENGTH,
    ROUNDING,
    ROWS,
    calibration_feeds,
    check_rows,
    real_inputs,
    real_rows,
    rounding_length,
    rounding_rows,
)
from ffmerge.exporter.settle import (
    any_size,
    check_repeats,
    has_large_pictures,
    one_size,
    stand_ins,
)
from ffmerge.files import size_text
from ffmerge.models import processing, tasks
from ffmerge.models.data import Data, as_examples
from ffmerge.models.derive import Made, arguments, input_specs, left_out, of_example, probe
from ffmerge.models.examples import Examples
from ffmerge.models.inputs import to_tensors
from ffmerge.models.probe import Array, InputSpec, Probe
from ffmerge.profiles import profile_of

Feeds = Mapping[str, Array]  # inputs by name
Given = Mapping[str, Tensor]  # what a model gave for some, by name
BITS_AT_LEAST = 2  # of a weight


@dataclass(frozen=True)
class Plan:
    """What is exported, in the order in which the graphs run.

    ``defaults`` are the arguments of ``forward`` that no graph reads.
    ``rows`` are a few rows of the data as the model takes them, with labels where they are known;
    ``real`` is what each graph is given of them. ``greedy`` are prompts and PyTorch's ids. From
    ``calibration``, batches by graph, int8-static takes its ranges, and by it 4 bits are rounded.
    ``source`` is the folder of the checkpoint, if there is one. ``plain`` says why attention cannot
    be one operator, where a profile has it so.
    """

    model: Any
    task: str
    config: ExportConfig
    source: Path | None
    graphs: tuple[Graph, ...]
    defaults: tuple[str, ...] = ()
    rows: Feeds = field(default_factory=dict)
    real: Mapping[str, Feeds] = field(default_factory=dict)
    greedy: Feeds = field(default_factory=dict)
    calibration: Mapping[str, Sequence[Feeds]] = field(default_factory=dict)
    plain: str = ""

    @property
    def dtype(self) -> str:
        """The precision of a plan of one, else the first."""
        return self.config.dtypes[0]


def make_plan(model: Any, config: ExportConfig, source: Path | None, data: Data | None) -> Plan:
    """Return the plan of an export, with the inputs drawn as the checkpoint in ``source`` says.

    Raises:
        InputError: the task is not served, or the data lacks what the model takes.
    """
    if data is None:
        check_without_data(config)
    model.eval()
    source = source or _folder_of(model)
    found = processing.load(source, arguments(model))
    specs, rows, given = _inputs(model, config, found)
    task = tasks.fit(
        config.task, model, lambda: list(outputs_given(model, probe(model, specs).draw(0)))
    )
    tasks.check_grows(task, config.profiles)
    keeps = config.file_layout == "transformers.js"
    fixed = profile_of(config.profiles[0]).fixed  # such a one stands alone
    planned = _settled_graphs(graphs(model, task, specs, keeps), task, config)
    if fixed:
        example: Feeds = rows if config.example else {}
        planned = with_fixed_sizes(planned, found.tokenizer, example)
    if config.budget is not None:
        _check_budget(model, config.budget)
    plan = Plan(model, task, config, source, planned, left_out(model, _all_inputs(specs, planned)))
    if data is not None:
        return _with_rows(plan, as_examples(data, source or model.name_or_path, task))
    if rows:
        return _with_made(plan, rows, given)
    drawn = planned[0].probe
    return replace(plan, greedy=_greedy(plan, drawn.draw(len(drawn.cases) - 1)))


def _all_inputs(specs: Sequence[InputSpec], planned: Sequence[Graph]) -> tuple[InputSpec, ...]:
    """Return the inputs of the model and of its graphs: that of a decoder reads more."""
    found = list(specs)
    for graph in planned:
        found += graph.probe.inputs
    return tuple(found)


def _check_budget(model: Any, text: str) -> None:
    """Raise InputError unless bits can be chosen for a budget, before anything is traced."""
    whole = sum(parameter.nbytes for parameter in model.parameters())
    least = sum(parameter.numel() for parameter in model.parameters()) * BITS_AT_LEAST // 8
    if (budget := parse_budget(text, whole)) < least:
        raise InputError(
            f"the budget of {size_text(budget)} is too small: in 2 bits the weights take "
            f"{size_text(least)}."
        )


def by_dtype(plan: Plan) -> list[Plan]:
    """Return the plan once for each of its precisions."""
    found = []
    for dtype in plan.config.dtypes:
        config = replace(plan.config, dtype=dtype, layout=plan.config.file_layout)
        calibration = plan.calibration
        if dtype not in CALIBRATED:
            calibration = {}
        found.append(replace(plan, config=config, calibration=calibration))
    return found


def with_one_size(plan: Plan) -> Plan:
    """Return the plan with pictures of the first size only."""
    fixed = [replace(graph, probe=one_size(graph.probe)) for graph in plan.graphs]
    return replace(plan, graphs=tuple(fixed))


def _inputs(
    model: Any, config: ExportConfig, found: processing.Processors
) -> tuple[tuple[InputSpec, ...], Feeds, Given]:
    """Return the inputs of the model, rows of them, and what the model gave for these, if it did.

    The rows are those of an example, else the processors' own, and others are drawn like them.
    """
    given: Given = {}
    if config.example:
        rows = _example(config.example)
        specs = of_example(model, rows)
    else:
        made, given = _usable(model, processing.made(found, model.config))
        rows = {name: first for name, (first, _) in made.items()}
        specs = input_specs(model, made)
    return processing.like_the_task(specs, found, model.config), rows, given


def _settled_graphs(
    planned: tuple[Graph, ...], task: str, config: ExportConfig
) -> tuple[Graph, ...]:
    """Return the graphs of the task with what stands for an input that is not given.

    Pictures are of any size, unless a profile fixes every size.
    """
    if len(planned) > 1 or tasks.base(task) in tasks.GENERATE:
        return planned
    settled = stand_ins(check_repeats(planned[0], "fp32" in config.dtypes))
    if not profile_of(config.profiles[0]).fixed:
        settled = any_size(settled)
    return (settled,)


def _example(path: Path) -> Feeds:
    examples = as_examples(path)
    if path.suffix != ".npz":
        raise InputError(f"{path} is no .npz: an example holds every input of the model by name.")
    return examples.take(examples.rows[:ROWS])


def _usable(model: Any, made: Made) -> tuple[Made, Given]:
    """Return what the processors return as far as the model takes it: all of it, or nothing.

    And what the model gives for the first of each; nothing where its encoder alone reads them.
    """
    accepted = arguments(model)
    known = {name: pair for name, pair in made.items() if name in accepted}
    rows = {name: first for name, (first, _) in known.items()}
    has_encoder = model.config.is_encoder_decoder and model.can_generate()
    reads = model.get_encoder() if has_encoder else model
    needed = {name for name, each in arguments(reads).items() if each.default is each.empty}
    if model.main_input_name not in rows or needed - set(rows):
        return {}, {}
    given: Given = {}
    try:
        if has_encoder:
            with torch.no_grad():
                reads(**to_tensors(rows, model))
        else:
            given = outputs_given(model, rows)
    except Exception:  # they are of another model, as a tokenizer with more ids than this one has
        return {}, {}
    return known, given


def _with_made(plan: Plan, made: Feeds, given: Given) -> Plan:
    """Return the plan with the processors' example to compare on, for which the model ``given``."""
    names = {spec.name for spec in plan.graphs[0].probe.inputs}
    rows = {name: array for name, array in made.items() if name in names}
    if sum(array.nbytes for array in rows.values()) > BYTES:
        rows = {name: array[:1] for name, array in rows.items()}
    written = _greedy(plan, rows)
    real = real_inputs(plan.graphs, rows, written)
    probed = []
    for graph in plan.graphs:
        number = int(graph.name in real)
        if given.keys() >= set(graph.outputs):  # no step of a decoder: that gives its cache, too
            graph = graph.knowing(made, given)
        recipe = replace(graph.probe, real=number, made=bool(number))
        probed.append(replace(graph, probe=_not_like(rows, recipe)))
    return replace(plan, graphs=tuple(probed), real=real, greedy=written)


def _not_like(rows: Feeds, recipe: Probe) -> Probe:
    """Return the recipe without drawn pictures in the sizes of the example, if they are large.

    They are as smooth as those that the processor was given, and PyTorch takes long for them. The
    first case stays, which is timed.
    """
    if not has_large_pictures(rows):
        return recipe
    sizes = recipe.sizes_of(rows)
    first, *others = recipe.cases
    others = [case for case in others if any(sizes.get(name) != n for name, n in case.items())]
    return replace(recipe, cases=(first, *others))


def _with_rows(plan: Plan, examples: Examples) -> Plan:
    """Return the plan with rows of the data to compare on, and others to calibrate with."""
    compared, calibrating = examples, None
    if set(CALIBRATED) & set(plan.config.dtypes):
        compared, calibrating = examples.halves()
    length = plan.graphs[0].probe.fixed.get("sequence_length", LENGTH)
    rows = real_rows(compared, plan.model, plan.task, length)
    check_rows(plan.graphs[0], rows)
    written = _greedy(plan, rows)
    real = real_inputs(plan.graphs, rows, written)
    probed = []
    for graph in plan.graphs:
        probed.append(replace(graph, probe=replace(graph.probe, real=int(graph.name in real))))
    calibration: Mapping[str, Sequence[Feeds]] = {}
    if calibrating is not None and set(FOUR_BITS) & set(plan.config.dtypes):
        calibration = _rounding_feeds(plan, calibrating)
    elif calibrating is not None:
        calibration = _ranging_feeds(plan, calibrating, length)
    return replace(
        plan, graphs=tuple(probed), rows=rows, real=real, greedy=written, calibration=calibration
    )


def _rounding_feeds(plan: Plan, examples: Examples) -> dict[str, list[Feeds]]:
    """Return batches by graph, by which int4 is rounded; none of a graph that needs a past.

    Its weights are those of a graph before it.
    """
    batches: dict[str, list[Feeds]] = {}
    for rows in rounding_rows(examples, length=rounding_length(examples)):
        written: Feeds = {}
        if len(plan.graphs) > 1:
            written = _greedy(plan, rows)
        for name, given in real_inputs(plan.graphs, rows, written).items():
            (graph,) = [graph for graph in plan.graphs if graph.name == name]
            if not graph.parts:
                batches.setdefault(name, []).append(graph.probe.complete(given))
    return batches


def _ranging_feeds(plan: Plan, examples: Examples, length: int) -> dict[str, list[Feeds]]:
    """Return batches by graph, from which int8-static takes its ranges.

    What is larger than all that they hold is cut off: of few rows that cost a trained encoder
    single tokens. Of several graphs they are few, since each batch has to be continued.
    """
    batches: dict[str, list[Feeds]] = {}
    several = len(plan.graphs) > 1
    most = ROWS if several else ROUNDING
    for rows in rounding_rows(examples, most, length):
        written: Feeds = {}
        if several:
            written = _greedy(plan, rows)
        given = real_inputs(plan.graphs, rows, written)
        for name, feeds in calibration_feeds(plan.graphs, given).items():
            batches.setdefault(name, []).extend(feeds)
    return batches


def _greedy(plan: Plan, rows: Feeds) -> Feeds:
    if generates(plan.graphs, plan.task):
        return greedy(plan.graphs, rows, plan.model)
    return {}


def _folder_of(model: Any) -> Path | None:
    """Return the folder that a model was loaded from, if it was loaded from one."""
    name = getattr(model, "name_or_path", "")
    if name and Path(name).is_dir():
        return Path(name)
    return None
