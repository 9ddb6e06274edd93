"""The graphs of a plan as ONNX, in the opset and precision that were asked for.

The second step of :func:`ffmerge.exporter.package.export`. Each graph is translated by itself,
once, and brought to every precision that is wanted; all agree on the form in which a weight is
stored, so that ``exporter/write.py`` can store it once.
"""

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import onnx_ir as ir

from ffmerge.config import PLAIN_OPSET, QuantizeConfig, parse_budget
from ffmerge.errors import ExportError
from ffmerge.exporter.fused import check_fused
from ffmerge.exporter.merged import merge_decoders
from ffmerge.exporter.packed import pack
from ffmerge.exporter.plan import Plan
from ffmerge.exporter.torch_onnx import SizeError, to_onnx
from ffmerge.exporter.trace import record_trace
from ffmerge.models.manifest import Skip
from ffmerge.models.trace import Trace
from ffmerge.passes.graph.opset import to_opset
from ffmerge.passes.graph.run import ShareResult, bring_to, share_again, share_model
from ffmerge.passes.graph.tensors import is_op

DIRECT = 18  # the first opset that PyTorch's exporter writes by itself; older ones are converted


@dataclass(frozen=True)
class Translated:
    """The graphs that are not made of others, in float32, and the programs they are of, by name.

    ``rounded`` are codes and scales that were found by data: those of int4 are q4f16's, too.
    """

    results: Mapping[str, ShareResult]
    programs: Mapping[str, Any]
    rounded: dict[str, tuple[Any, Any]] = field(default_factory=dict)


def convert(translated: Translated, plan: Plan) -> tuple[dict[str, ShareResult], dict[str, Trace]]:
    """Return every graph of the plan by name, in its one precision, and what PyTorch computes.

    That is known of those that PyTorch translated.

    Raises:
        TieError: a shared weight would be stored twice.
        InputError: a graph cannot be of the precision.
    """
    results = dict(translated.results)
    if plan.config.dtype != "fp32":
        results = _quantized(translated, plan)
    if plan.config.profile == "cpu":
        pack([result.model for result in results.values()])
    traces = {}
    for graph in plan.graphs:
        if graph.parts:
            first, later = (results[part].model for part in graph.parts)
            results[graph.name] = merge_decoders(first, later, graph)
        else:
            program, real = translated.programs[graph.name], plan.real.get(graph.name, {})
            traces[graph.name] = record_trace(graph, program, results[graph.name].model, real)
    return results, traces


def copied(translated: Translated, plan: Plan) -> Translated:
    """Return the graphs again, for one precision of several; their tensors are the same ones."""
    results = {}
    for name, result in translated.results.items():
        copy = replace(result, model=_clone(result.model))
        if plan.config.dtype == "fp32":
            copy = share_again(copy)
        results[name] = copy
    return replace(translated, results=results)


def _clone(model: ir.Model) -> ir.Model:
    """Return a model with nodes and values of its own; a clone of onnx_ir has the same types."""
    clone = model.clone()
    for graph in clone.graphs():
        values = [*graph.inputs, *graph.initializers.values()]
        for node in graph:
            values += node.outputs
        for value in values:
            value.type = deepcopy(value.type)
    return clone


def translate(plan: Plan) -> Translated:
    """Return the graphs in the plan's opset, fused where that is wanted and all can be.

    Raises:
        ExportError: a graph cannot be translated.
        TieError: a shared weight would be stored twice.
        InputError: a graph cannot be of the opset.
    """
    if plan.config.profile != "cpu":
        return _all_of(plan, plan.config.operators)
    try:
        for graph in plan.graphs:
            if not graph.parts:
                check_fused(graph)
        return _all_of(plan, plan.config.operators, fused=True)
    except SizeError:
        raise
    except ExportError as error:
        skip = Skip("attention", f"the graph is that of --for portable: {error}")
    plain = _all_of(plan, plan.config.opset or PLAIN_OPSET)
    results = {}
    for name, result in plain.results.items():
        results[name] = replace(result, skipped=(skip, *result.skipped))
    return replace(plain, results=results)


def _all_of(plan: Plan, opset: int, fused: bool = False) -> Translated:
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
    return Translated(results, programs)


def _quantized(translated: Translated, plan: Plan) -> dict[str, ShareResult]:
    """Return shared graphs in the plan's precision."""
    results, rounded = translated.results, None
    if plan.calibration:
        rounded = translated.rounded
    common = QuantizeConfig(
        multiplied=_multiplied(results.values()),
        plain_lookups=plan.config.layout == "transformers.js",
        block=plan.config.block,
        rounded=rounded,
        forms={},
        budget=_budget(results.values(), plan),
    )
    done = {}
    for name, before in results.items():
        config = replace(common, calibration=plan.calibration.get(name, ()))
        done[name] = bring_to(before, plan.config.dtype, config)
        if common.budget is not None and common.forms:
            done[name] = replace(done[name], forms=common.forms)
    return done


def _budget(results: Iterable[ShareResult], plan: Plan) -> int | None:
    """Return the bytes that the graphs may take, if they have a budget."""
    if plan.config.budget is None:
        return None
    return parse_budget(plan.config.budget, sum(result.bytes_after for result in results))


def _multiplied(results: Iterable[ShareResult]) -> frozenset[str]:
    """Return the names of the weights that a graph of the package multiplies by."""
    names = set()
    for result in results:
        for value in result.model.graph.initializers.values():
            if any(is_op(node, "MatMul", "Gemm") for node in value.consumers()):
                names.add(str(value.name))
    return frozenset(names)
