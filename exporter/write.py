"""The files of a package: graphs and weights, variants, reference, configuration, card.

The third step of :func:`ffmerge.exporter.package.export`: everything but the manifest, which
describes what is written here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ffmerge.exporter.card import card
from ffmerge.exporter.genai import write_genai
from ffmerge.exporter.graphs import Graph
from ffmerge.exporter.ort_format import write_ort
from ffmerge.exporter.plan import Plan
from ffmerge.exporter.prepack import write_prepacked
from ffmerge.exporter.reference import write_reference
from ffmerge.files import read_json, write_json
from ffmerge.models import kv_cache
from ffmerge.models.companions import copy_companions
from ffmerge.models.manifest import REFERENCE, GraphRecord, Skip, Variant
from ffmerge.models.trace import Trace
from ffmerge.passes.graph.run import ShareResult
from ffmerge.passes.graph.tensors import bytes_stored
from ffmerge.passes.graph.write import PROTOBUF_LIMIT, write_models

WEIGHTS = "model.onnx_data"  # of all graphs, each weight once
# layout -> folder of the graphs, suffix of their names by dtype
LAYOUTS: dict[str, tuple[str, Mapping[str, str]]] = {
    "optimum": ("", {}),
    "transformers.js": (
        "onnx/",
        {"fp16": "_fp16", "int8": "_quantized", "int4": "_q4", "q4f16": "_q4f16"},
    ),
}


def write_files(
    folder: Path, plan: Plan, results: Mapping[str, ShareResult], traces: Mapping[str, Trace]
) -> tuple[tuple[GraphRecord, ...], tuple[Variant, ...], tuple[Skip, ...]]:
    """Write a package without its manifest; return its graphs, their variants, what was left out.

    Raises:
        TieError: a weight would be stored twice.
        ExportError: ONNX Runtime cannot write a variant, or it computes something else.
    """
    if plan.config.layout == "transformers.js":
        plan = replace(plan, graphs=_without_parts(plan.graphs))
    records = _write_graphs(folder, plan, results)
    variants = _write_variants(folder, plan, records)
    paths = [record.path for record in records]
    rounding = write_reference(folder / REFERENCE, plan, paths, traces)
    records = tuple(replace(r, rounding=off) for r, off in zip(records, rounding, strict=True))
    skipped = _write_genai(folder, plan, records)
    _write_config(folder, plan.model)
    if plan.source:
        copy_companions(plan.source, folder)
    text = card(plan.model, plan.task, paths, plan.config.dtype, plan.source)
    (folder / "README.md").write_text(text, encoding="utf-8")
    return records, variants, skipped


def _without_parts(graphs: Sequence[Graph]) -> tuple[Graph, ...]:
    """Return the graphs without those that another one is made of: transformers.js opens none."""
    parts: set[str] = set()
    for graph in graphs:
        parts |= set(graph.parts)
    return tuple(replace(graph, parts=()) for graph in graphs if graph.name not in parts)


def _write_graphs(
    folder: Path, plan: Plan, results: Mapping[str, ShareResult]
) -> tuple[GraphRecord, ...]:
    """Write graphs where the layout has them, with one data file for all or one for each."""
    prefix, suffixes = LAYOUTS[plan.config.layout]
    suffix = suffixes.get(plan.config.dtype, "")
    paths = {graph.name: f"{prefix}{graph.name}{suffix}.onnx" for graph in plan.graphs}
    models = {folder / path: results[name].model for name, path in paths.items()}
    if plan.config.layout == "optimum":
        write_models(models, folder / WEIGHTS)
    else:
        for path, model in models.items():
            data = None
            if bytes_stored(model) > PROTOBUF_LIMIT:
                data = path.with_name(f"{path.name}_data")
            write_models({path: model}, data)
    records = []
    for graph in plan.graphs:
        parts = tuple(paths[part] for part in graph.parts)
        inputs = results[graph.name].model.graph.inputs
        optional = tuple(str(value.name) for value in inputs if value.is_initializer())
        records.append(
            GraphRecord(paths[graph.name], graph.outputs, graph.probe, parts, optional=optional)
        )
    return tuple(records)


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
    config = plan.config
    if config.profile != "cpu" or config.layout != "optimum" or len(records) > 1:
        return ()
    if not kv_cache.keeps_cache(records[0].outputs):
        return ()
    skip = write_genai(folder, records[0], plan.model, config.dtype)
    return (skip,) if skip else ()


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
