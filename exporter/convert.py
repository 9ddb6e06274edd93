"""The graphs of a plan as ONNX, in the opset and precision that were asked for.

The second step of :func:`ffmerge.exporter.package.export`. Each graph is translated by itself,
once for each profile, and brought to every precision that is wanted; all agree on the form in which
a weight is stored, so that ``exporter/write.py`` can store it once.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import onnx_ir as ir

from ffmerge.config import QuantizeConfig, parse_budget
from ffmerge.errors import ExportError
from ffmerge.exporter.by_columns import store_by_columns
from ffmerge.exporter.flash import use_flash, with_many_tokens
from ffmerge.exporter.flat import join_heads
from ffmerge.exporter.fused import NotFused, check_fused
from ffmerge.exporter.graphs import STATES, Graph
from ffmerge.exporter.half_cache import halve_cache
from ffmerge.exporter.merged import merge_decoders
from ffmerge.exporter.multihead import (
    check_multihead,
    one_row_behind_a_past,
    shares_keys,
    use_multihead,
)
from ffmerge.exporter.packed import pack
from ffmerge.exporter.plan import Plan
from ffmerge.exporter.summed import sum_apart, sum_inside
from ffmerge.exporter.torch_onnx import SizeError, to_onnx
from ffmerge.exporter.trace import record_trace
from ffmerge.models import kv_cache
from ffmerge.models.codes import BLOCKS, FLOOR, Blocks
from ffmerge.models.manifest import Skip
from ffmerge.models.read_once import read_once
from ffmerge.models.trace import Trace
from ffmerge.passes.graph.bits import Files
from ffmerge.passes.graph.joined import SECOND, clone, join
from ffmerge.passes.graph.opset import to_opset
from ffmerge.passes.graph.quantize import IN_BLOCKS, ROWS, for_package, int8_products
from ffmerge.passes.graph.run import ShareResult, bring_to, share_again, share_model
from ffmerge.passes.graph.tensors import is_op, stored
from ffmerge.profiles import HALVES, PLAIN_OPSET, Profile, profile_of

Results = Mapping[str, ShareResult]  # graphs by name
DIRECT = 18  # the first opset that PyTorch's exporter writes by itself; older ones are converted


@dataclass(frozen=True)
class Translated:
    """The graphs that are not made of others, in float32, and the programs they are of.

    Both by profile, then by name. ``rounded`` are codes that were found by data, in blocks: those
    of int4 are q4f16's, too, and those of one profile are all others'.
    """

    results: Mapping[str, Results]
    programs: Mapping[str, Mapping[str, Any]]
    rounded: dict[str, Blocks] = field(default_factory=dict)


@dataclass(frozen=True)
class Converted:
    """The graphs for one profile in one precision, and what PyTorch computes in them, by name.

    That is known of those that PyTorch translated.
    """

    results: Results
    traces: Mapping[str, Trace]


def convert(translated: Translated, plan: Plan) -> dict[str, Converted]:
    """Return every graph of the plan in its one precision, by profile; a weight is alike in all.

    Raises:
        TieError: a shared weight would be stored twice.
        InputError: a graph cannot be of the precision.
    """
    results = translated.results
    if plan.dtype != "fp32":
        results = _quantized(translated, plan)
    _pack(plan, results)
    found = {}
    for profile, some in results.items():
        fitted = _fit(plan, profile, some)
        found[profile] = _completed(plan, fitted, translated.programs[profile])
    if "cpu" in found and plan.dtype == "fp32":
        store_by_columns(_models(each.results for each in found.values()))
    return found


def _models(results: Iterable[Results]) -> list[ir.Model]:
    return [result.model for some in results for result in some.values()]


def _pack(plan: Plan, results: Mapping[str, Results]) -> None:
    """Let products of one value be one where all graphs of all profiles can, in place.

    Of what the CPU runs as well decoders alone: it takes tokens of an encoder faster apart. For it
    gates are packed, too; elsewhere that was not measured.
    """
    for_cpu = "cpu" in results
    names = [graph.name for graph in plan.graphs if not graph.parts]
    if for_cpu:
        names = [graph.name for graph in plan.graphs if _is_decoder(graph)]
    pack([some[name].model for some in results.values() for name in names], gates=for_cpu)


def _fit(plan: Plan, profile: str, results: Results) -> Results:
    """Bring graphs that are in their precision to the form that a profile has, in place.

    Return them with what could not be.
    """
    form, skipped = profile_of(profile), []
    models = _models([results])
    if form.half_cache and plan.dtype in HALVES:
        if not halve_cache(models):
            skipped.append(Skip("cache", "FLOAT: keys or values of a graph are not float16 alone"))
    if form.multihead:
        for model in models:
            use_multihead(model)
            sum_inside(model.graph)
    if form.on_cpu:
        for model in models:
            sum_apart(model.graph)
        for graph in plan.graphs:
            if not graph.parts:
                use_flash(results[graph.name].model, graph.probe)
    return {n: replace(r, skipped=(*r.skipped, *skipped)) for n, r in results.items()}


def _completed(plan: Plan, translated: Results, programs: Mapping[str, Any]) -> Converted:
    """Return all graphs, with those that are made of others, and what PyTorch computes."""
    results, traces = dict(translated), {}
    for graph in plan.graphs:
        if graph.parts:
            first, later = (results[part].model for part in graph.parts)
            merged = merge_decoders(first, later, graph)
            results[graph.name] = replace(merged, int8=results[graph.parts[0]].int8)
        else:
            program, real = programs[graph.name], plan.real.get(graph.name, {})
            traces[graph.name] = record_trace(graph, program, results[graph.name].model, real)
    return Converted(results, traces)


def _is_decoder(graph: Graph) -> bool:
    """Say whether a graph of its own keeps a cache, so that tokens come one by one."""
    return not graph.parts and kv_cache.keeps_cache(graph.outputs)


def copied(translated: Translated, plan: Plan) -> Translated:
    """Return the graphs again, for one precision of several; their tensors are the same ones."""
    copies: dict[str, Results] = {}
    for profile, results in translated.results.items():
        copies[profile] = {name: _copy(result, plan.dtype) for name, result in results.items()}
    return replace(translated, results=copies)


def _copy(result: ShareResult, dtype: str) -> ShareResult:
    copy = replace(result, model=clone(result.model))
    if dtype == "fp32":
        return share_again(copy)
    return copy


def with_checked_attention(plan: Plan) -> Plan:
    """Return the plan with graphs whose attention can be one operator, or the reason why not.

    Unchanged if no profile has it so.
    """
    if not any(profile_of(name).fused for name in plan.config.profiles):
        return plan
    graphs = []
    try:
        with read_once(plan.model):
            for graph in plan.graphs:
                graphs.append(graph if graph.parts else check_fused(graph))
    except NotFused as error:
        return replace(plan, plain=str(error))
    return replace(plan, graphs=tuple(graphs))


def translate(plan: Plan) -> Translated:
    """Return the graphs for each profile in its opset, fused where that is wanted and all can be.

    Raises:
        ExportError: a graph cannot be translated.
        TieError: a shared weight would be stored twice.
        InputError: a graph cannot be of the opset.
    """
    results, programs = {}, {}
    for name in plan.config.profiles:
        results[name], programs[name] = _translated(plan, profile_of(name))
    return Translated(results, programs)


def _translated(plan: Plan, profile: Profile) -> tuple[Results, dict[str, Any]]:
    """Return the graphs for a profile by name, and the programs they are of."""
    opset, reason = plan.config.opset, plan.plain
    if not profile.fused:
        return _all_of(plan, opset or profile.opset)
    if not reason:
        try:
            return _fused(plan, profile)
        except SizeError:
            raise
        except ExportError as error:
            reason = str(error)
    skip = Skip("attention", f"plain products, as --for portable has it: {reason}")
    plain, programs = _all_of(plan, opset or PLAIN_OPSET)
    results = {}
    for name, result in plain.items():
        results[name] = replace(result, skipped=(skip, *result.skipped))
    return results, programs


def _fused(plan: Plan, profile: Profile) -> tuple[Results, dict[str, Any]]:
    results, programs = _all_of(plan, profile.opset, fused=True)
    if profile.multihead:
        for graph in plan.graphs:
            if not graph.parts:
                join_heads(results[graph.name].model)
                check_multihead(results[graph.name].model, graph)
    return results, programs


def as_taken(plan: Plan, translated: Translated) -> Plan:
    """Return the plan with the cases on which the graphs are compared in the form of every profile.

    They are those that can be run, and where another operator computes many tokens such a one, too.
    """
    graphs = []
    for graph in plan.graphs:
        for profile, results in translated.results.items():
            if not graph.parts:
                graph = _as_taken(graph, profile_of(profile), results[graph.name].model)
        graphs.append(graph)
    return replace(plan, graphs=tuple(graphs))


def _as_taken(graph: Graph, form: Profile, model: ir.Model) -> Graph:
    if form.multihead and shares_keys(model):
        graph = replace(graph, probe=one_row_behind_a_past(graph.probe))
    if form.on_cpu:
        graph = with_many_tokens(graph, model)
    return graph


def _all_of(plan: Plan, opset: int, fused: bool = False) -> tuple[Results, dict[str, Any]]:
    results: dict[str, ShareResult] = {}
    programs: dict[str, Any] = {}
    resident = plan.config.dtypes == ("fp32",)
    for graph in plan.graphs:
        if not graph.parts:
            results[graph.name], programs[graph.name] = to_onnx(
                graph, max(opset, DIRECT), resident, fused
            )
    if opset < DIRECT:
        for name, result in results.items():
            results[name] = share_model(to_opset(result.model, opset), resident=resident)
    return results, programs


def _quantized(translated: Translated, plan: Plan) -> dict[str, Results]:
    """Return shared graphs in the plan's precision, by profile."""
    results = translated.results
    every = [result for some in results.values() for result in some.values()]
    rounded: dict[str, Blocks] = {}
    if plan.calibration:
        rounded = translated.rounded
    common = QuantizeConfig(
        multiplied=_read_by(every, "MatMul", "Gemm"),
        looked_up=_read_by(every, "Gather"),
        plain_lookups=plan.config.layout == "transformers.js",
        block=_block(plan, every),
        rounded=rounded,
        forms={},
        activations=profile_of(plan.config.profiles[0]).activations,
        budget=_budget(every, plan),
    )
    calibration = plan.calibration
    if common.budget is not None and len(every) > 1:
        (some,) = results.values()
        common, calibration = _for_all(some, plan, common), {}
    done: dict[str, Results] = {}
    for profile, some in results.items():
        made: dict[str, ShareResult] = {}
        for name, before in some.items():
            config = replace(common, calibration=calibration.get(name, ()))
            made[name] = bring_to(before, plan.dtype, config)
            if plan.config.budget is not None and common.forms:
                made[name] = replace(made[name], forms=common.forms)
        done[profile] = made
    return done


def _block(plan: Plan, results: Iterable[ShareResult]) -> int | None:
    """Return the block that is asked for; of int8 always one, where rows have no kernels.

    Or where a graph in blocks multiplies by a weight of one in rows: it would be stored twice.
    """
    rows = all(profile_of(profile).rows for profile in plan.config.profiles)
    if plan.dtype == "int8" and not (rows and _stored_in_one_form(results)):
        return plan.config.block or BLOCKS[8]
    return plan.config.block


def _stored_in_one_form(results: Iterable[ShareResult]) -> bool:
    """Say whether all graphs that multiply by one weight want the same form of int8."""
    named: dict[str, set[str]] = {ROWS: set(), IN_BLOCKS: set()}
    for result in results:
        form = int8_products(result.model, QuantizeConfig())
        large = {item.name for item in stored(result.model) if item.tensor.size >= FLOOR}
        named[form] |= large & _read_by([result], "MatMul", "Gemm")
    return named[ROWS].isdisjoint(named[IN_BLOCKS])


def _for_all(results: Results, plan: Plan, config: QuantizeConfig) -> QuantizeConfig:
    """Return the settings with which the graphs of a pair take its budget together.

    They run as one, the encoder and the first step of the decoder. Later steps have its weights.
    """
    models = {name: result.model for name, result in results.items()}
    encoder, decoder = plan.graphs[:2]
    (states,) = encoder.outputs
    joined = join(models[encoder.name], models[decoder.name], {states: STATES})
    batches = []
    for one, other in zip(*(plan.calibration[g.name] for g in (encoder, decoder)), strict=True):
        batches.append(_joined(one, other))
    config = replace(config, calibration=batches)
    forms, rounded = for_package(joined, _files(plan, models), config)
    return replace(config, calibration=(), budget=None, forms=forms, rounded=rounded)


def _joined(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Return a batch of both graphs: as many rows as the decoder has, and fewer tokens there.

    So no values of the decoder are as many as the encoder's mask has places.
    """
    rows = len(other[STATES])
    batch = {name: array[:rows] for name, array in one.items()}
    for name, array in other.items():
        if name == STATES:
            continue
        if name == "input_ids" and array.shape[1] == other[STATES].shape[1] > 1:
            array = array[:, :-1]
        batch[f"{SECOND}{name}"] = array
    return batch


def _files(plan: Plan, models: Mapping[str, ir.Model]) -> Files:
    """Return what the files of the package will be made of."""
    inner: set[str] = set()
    shared = plan.config.file_layout == "optimum"
    for graph in plan.graphs:
        if not shared:
            inner |= set(graph.parts)
    files = []
    for graph in plan.graphs:
        if graph.name not in inner:
            files.append([models[name] for name in graph.parts or (graph.name,)])
    return Files(files, shared)


def _budget(results: Iterable[ShareResult], plan: Plan) -> int | None:
    """Return the bytes that the graphs may take, if they have a budget."""
    if plan.config.budget is None:
        return None
    sizes: dict[str, int] = {}  # a weight that several graphs read counts once
    for result in results:
        sizes |= {item.name: item.tensor.nbytes for item in stored(result.model)}
    return parse_budget(plan.config.budget, sum(sizes.values()))


def _read_by(results: Iterable[ShareResult], *ops: str) -> frozenset[str]:
    """Return the names of the weights that such an operator reads in a graph of the package."""
    names = set()
    for result in results:
        for value in result.model.graph.initializers.values():
            if any(is_op(node, *ops) for node in value.consumers()):
                names.add(str(value.name))
    return frozenset(names)
