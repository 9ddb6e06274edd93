"""The files of a package: graphs and weights, variants, reference, configuration, card.

The third step of :func:`ffmerge.exporter.package.export`: everything but the manifest, which
describes what is written here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ffmerge.config import SUFFIXES
from ffmerge.exporter.card import card
from ffmerge.exporter.convert import Converted
from ffmerge.exporter.genai import write_genai
from ffmerge.exporter.graphs import Graph
from ffmerge.exporter.ort_format import write_ort
from ffmerge.exporter.plan import Plan
from ffmerge.exporter.prepack import write_prepacked
from ffmerge.exporter.reference import write_reference
from ffmerge.files import read_json, write_json
from ffmerge.models import kv_cache
from ffmerge.models.codes import Form
from ffmerge.models.companions import copy_companions
from ffmerge.models.manifest import REFERENCE, GraphRecord, Skip, Variant
from ffmerge.models.record import Tie
from ffmerge.models.trace import Trace
from ffmerge.passes.graph.contract import join_ties
from ffmerge.passes.graph.tensors import bytes_stored
from ffmerge.passes.graph.write import PROTOBUF_LIMIT, write_models

WEIGHTS = "model.onnx_data"  # of all graphs, each weight once
# layout -> folder of the graphs, suffix of their names by dtype
LAYOUTS: dict[str, tuple[str, Mapping[str, str]]] = {
    "optimum": ("", {}),
    "transformers.js": ("onnx/", SUFFIXES),
}


@dataclass(frozen=True)
class Written:
    """The graphs for one profile in one precision, in their files, and what is told of them.

    ``kind`` is what tells them from the package's others: their profile if it has several, else
    their precision. ``traces`` are by path, ``forms`` bits and block of weights by name, where they
    were chosen, ``int8`` by path the form in which int8 multiplies.
    """

    profile: str
    kind: str
    records: tuple[GraphRecord, ...]
    traces: Mapping[str, Trace]
    opset: int
    ties: tuple[Tie, ...]
    skipped: tuple[Skip, ...]
    forms: Mapping[str, Form]
    int8: Mapping[str, str]


def write_graphs(folder: Path, plan: Plan, converted: Mapping[str, Converted]) -> list[Written]:
    """Write the graphs of one precision, by profile, with their weights.

    Raises:
        TieError: a weight would be stored twice.
    """
    plan = _as_laid_out(plan)
    paths = {profile: _paths(plan, profile) for profile in converted}
    models: dict[Path, ir.Model] = {}
    for profile, found in converted.items():
        models |= {folder / path: found.results[n].model for n, path in paths[profile].items()}
    if plan.config.file_layout == "optimum":
        write_models(models, folder / WEIGHTS)
    else:
        _write_apart(models)
    return [_written(plan, profile, found, paths[profile]) for profile, found in converted.items()]


def _paths(plan: Plan, profile: str) -> dict[str, str]:
    """Return the path of each graph for a profile; the first one's have the usual names."""
    prefix, suffixes = LAYOUTS[plan.config.file_layout]
    suffix = suffixes.get(plan.dtype, "")
    if profile != plan.config.profiles[0]:
        suffix += f"_{profile}"
    return {graph.name: f"{prefix}{graph.name}{suffix}.onnx" for graph in plan.graphs}


def _write_apart(models: Mapping[Path, ir.Model]) -> None:
    """Write each graph with its weights, in a data file of its own where one file is too large."""
    for path, model in models.items():
        data = None
        if bytes_stored(model) > PROTOBUF_LIMIT:
            data = path.with_name(f"{path.name}_data")
        write_models({path: model}, data)


def _written(plan: Plan, profile: str, found: Converted, paths: Mapping[str, str]) -> Written:
    """Return what is told of the graphs for a profile, which are in ``paths`` by name."""
    results, kind = found.results, plan.dtype
    if len(plan.config.profiles) > 1:
        kind = profile
    ties: list[Tie] = []
    skipped: dict[Skip, None] = {}
    forms: dict[str, Form] = {}
    for result in results.values():
        ties += result.ties
        skipped |= dict.fromkeys(result.skipped)
        forms |= result.forms
    return Written(
        profile=profile,
        kind=kind,
        records=tuple(_record(graph, results[graph.name].model, paths) for graph in plan.graphs),
        traces={path: found.traces[n] for n, path in paths.items() if n in found.traces},
        opset=max(result.model.opset_imports[""] for result in results.values()),
        ties=join_ties(ties),
        skipped=tuple(skipped),
        forms=forms,
        int8={path: results[name].int8 for name, path in paths.items() if results[name].int8},
    )


def _record(graph: Graph, model: ir.Model, paths: Mapping[str, str]) -> GraphRecord:
    inputs = model.graph.inputs
    return GraphRecord(
        paths[graph.name],
        graph.outputs,
        graph.probe.with_cache(_cache_of(inputs)),
        tuple(paths[part] for part in graph.parts),
        optional=tuple(str(value.name) for value in inputs if value.is_initializer()),
        by_token=graph.by_token,
    )


def write_rest(
    folder: Path, plan: Plan, written: Sequence[Written]
) -> tuple[tuple[GraphRecord, ...], tuple[Variant, ...], tuple[Skip, ...]]:
    """Write all of a package but its graphs and its manifest.

    Those of the first profile and precision are its graphs, of the others their variants. Return
    both, with all other variants, and what was left out.

    Raises:
        ExportError: ONNX Runtime cannot write a variant, or it computes something else.
    """
    plan, records = _as_laid_out(plan), written[0].records
    variants: list[Variant] = []
    for other in written[1:]:
        for record, same in zip(records, other.records, strict=True):
            variants.append(
                Variant(other.kind, same.path, True, record.path, same.probe.cache, same.optional)
            )
    variants += _write_variants(folder, plan, records)
    traces: dict[str, Trace] = {}
    paths: dict[str, str] = {}
    skipped: list[Skip] = []
    for each in written:
        traces |= each.traces
        paths |= {record.path: each.profile for record in each.records}
        if each.profile == "cpu":
            skipped += _write_genai(folder, plan, each.records)
    files = [record.path for record in records]
    rounding = write_reference(folder / REFERENCE, plan, files, traces)
    records = tuple(replace(r, rounding=off) for r, off in zip(records, rounding, strict=True))
    _write_config(folder, plan.model)
    if plan.source:
        copy_companions(plan.source, folder)
    if fixed := plan.graphs[0].probe.fixed:
        _limit_tokenizer(folder, fixed)
    text = card(plan.model, plan.task, paths, plan.config.dtypes, plan.source)
    (folder / "README.md").write_text(text, encoding="utf-8")
    return records, tuple(variants), tuple(skipped)


def _as_laid_out(plan: Plan) -> Plan:
    """Return the plan without graphs that another is made of: transformers.js opens none."""
    if plan.config.file_layout != "transformers.js":
        return plan
    parts: set[str] = set()
    for graph in plan.graphs:
        parts |= set(graph.parts)
    whole = [replace(graph, parts=()) for graph in plan.graphs if graph.name not in parts]
    return replace(plan, graphs=tuple(whole))


def _cache_of(inputs: Sequence[ir.Value]) -> str:
    """Return the type in which a graph takes keys and values."""
    for value in inputs:
        if kv_cache.is_past(str(value.name)) and value.dtype is not None:
            return str(value.dtype.numpy())
    return "float32"


def _write_variants(
    folder: Path, plan: Plan, records: Sequence[GraphRecord]
) -> tuple[Variant, ...]:
    """Write the graphs that are opened in the other forms that were asked for."""
    parts: set[str] = set()
    for record in records:
        parts |= set(record.parts)
    opened = [record for record in records if record.path not in parts]
    variants = []
    if plan.config.ort:
        variants += write_ort(folder, opened)
    if plan.config.prepack:
        variants += write_prepacked(folder, opened)
    return tuple(variants)


def _write_genai(folder: Path, plan: Plan, records: Sequence[GraphRecord]) -> tuple[Skip, ...]:
    """Write what onnxruntime-genai needs beside a decoder for the CPU; return what is left out."""
    if len(records) > 1 or not kv_cache.keeps_cache(records[0].outputs):
        return ()
    if plan.config.file_layout != "optimum":
        return (Skip("genai", "it runs packages of one precision, in the layout of optimum"),)
    skip = write_genai(folder, records[0], plan.model, plan.dtype)
    return (skip,) if skip else ()


def _limit_tokenizer(folder: Path, fixed: Mapping[str, int]) -> None:
    """Let the package's tokenizer cut to as many tokens as its graph takes."""
    path = folder / "tokenizer_config.json"
    if path.is_file() and "sequence_length" in fixed:
        write_json(path, {**read_json(path), "model_max_length": fixed["sequence_length"]})


def _write_config(folder: Path, model: Any) -> None:
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    path = folder / "config.json"
    config = read_json(path)
    config.pop("auto_map", None)  # its code ties PyTorch weights, of which there are none
    beside = {f"{data.stem}.onnx": True for data in sorted(folder.glob("onnx/*.onnx_data"))}
    if beside:  # transformers.js looks for data beside a graph only where it is told so
        config["transformers.js_config"] = {"use_external_data_format": beside}
    write_json(path, config)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
