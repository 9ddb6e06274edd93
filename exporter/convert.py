"""The graphs of a plan as ONNX, in the opset and precision that were asked for.

The second step of :func:`ffmerge.exporter.package.export`. Each graph is translated by itself; all
agree on the form in which a weight is stored, so that ``exporter/write.py`` can store it once.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

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
from ffmerge.passes.graph.run import ShareResult, bring_to, share_model
from ffmerge.passes.graph.tensors import is_op

DIRECT = 18  # the first opset that PyTorch's exporter writes by itself; older ones are converted


def convert(plan: Plan) -> tuple[dict[str, ShareResult], dict[str, Trace]]:
    """Return every graph of the plan by name, and of those PyTorch translated what it computes.

    Raises:
        ExportError: a graph cannot be translated.
        TieError: a shared weight would be stored twice.
        InputError: a graph cannot be of the opset or the precision.
    """
    results, programs = _translated(plan)
    if plan.config.dtype != "fp32":
        results = _quantized(results, plan)
    if plan.config.profile == "cpu":
        pack([result.model for result in results.values()])
    traces = {}
    for graph in plan.graphs:
        if graph.parts:
            first, later = (results[part].model for part in graph.parts)
            results[graph.name] = merge_decoders(first, later, graph)
        else:
            program, real = programs[graph.name], plan.real.get(graph.name, {})
            traces[graph.name] = record_trace(graph, program, results[graph.name].model, real)
    return results, traces


def _translated(plan: Plan) -> tuple[dict[str, ShareResult], dict[str, Any]]:
    """Return the graphs that are not made of others, fused where that is wanted and all can be.

    Their programs, too.
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
    results, programs = _all_of(plan, plan.config.opset or PLAIN_OPSET)
    for name, result in results.items():
        results[name] = replace(result, skipped=(skip, *result.skipped))
    return results, programs


def _all_of(
    plan: Plan, opset: int, fused: bool = False
) -> tuple[dict[str, ShareResult], dict[str, Any]]:
    results: dict[str, ShareResult] = {}
    programs: dict[str, Any] = {}
    resident = plan.config.dtype == "fp32"
    for graph in plan.graphs:
        if not graph.parts:
            results[graph.name], programs[graph.name] = to_onnx(
                graph, max(opset, DIRECT), resident, fused
            )
    if opset < DIRECT:
        for name, result in results.items():
            results[name] = share_model(to_opset(result.model, opset), resident=resident)
    return results, programs


def _quantized(results: Mapping[str, ShareResult], plan: Plan) -> dict[str, ShareResult]:
    """Return shared graphs in the plan's precision."""
    common = QuantizeConfig(
        multiplied=_multiplied(results.values()),
        plain_lookups=plan.config.layout == "transformers.js",
        block=plan.config.block,
        rounded={} if plan.calibration else None,
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
