"""A model as a folder that a runtime serves: graph, weights, configuration, manifest, card."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ffmerge
from ffmerge.config import QuantizeConfig
from ffmerge.errors import InputError
from ffmerge.exporter.card import card
from ffmerge.exporter.graphs import Graph, graphs
from ffmerge.exporter.merged import either
from ffmerge.exporter.ort_format import write_ort
from ffmerge.exporter.prepack import write_prepacked
from ffmerge.exporter.records import record_tensors
from ffmerge.exporter.reference import (
    greedy,
    real_inputs,
    real_metric,
    real_rows,
    write_reference,
)
from ffmerge.exporter.torch_onnx import to_onnx
from ffmerge.exporter.trace import record_trace
from ffmerge.files import read_json, staged, write_json
from ffmerge.models import tasks
from ffmerge.models.data import Data, as_examples
from ffmerge.models.inputs import unchunked
from ffmerge.models.manifest import LABELS, REFERENCE, GraphRecord, Manifest, record_files
from ffmerge.models.processing import like_the_task
from ffmerge.models.record import merge_record
from ffmerge.models.source import copy_companions, fingerprint
from ffmerge.models.trace import Trace
from ffmerge.passes.graph.contract import join_ties
from ffmerge.passes.graph.opset import OLDEST, to_opset
from ffmerge.passes.graph.quantize import PRECISIONS
from ffmerge.passes.graph.read import read_model
from ffmerge.passes.graph.run import ShareResult, share
from ffmerge.passes.graph.tensors import bytes_stored, distinct_bytes, is_op
from ffmerge.passes.graph.write import PROTOBUF_LIMIT, write_models

WEIGHTS = "model.onnx_data"  # of all graphs, each weight once
OPSETS = range(OLDEST, 24)
DIRECT = 18  # the first that PyTorch's exporter writes by itself; older ones are converted
# layout -> folder of the graphs, suffix of their names by dtype
LAYOUTS: dict[str, tuple[str, Mapping[str, str]]] = {
    "optimum": ("", {}),
    "transformers.js": ("onnx/", {"fp16": "_fp16", "int8": "_quantized", "int4": "_q4"}),
}
_VERSIONS = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript", "numpy")


@dataclass(frozen=True)
class ExportConfig:
    """Settings of an export; ``task`` None means: inferred from the model's class.

    ``dtype`` is fp32 or one of :data:`ffmerge.passes.graph.quantize.PRECISIONS`; ``ort`` and
    ``prepack`` add the graphs in ONNX Runtime's format, and with packed weights. ``layout`` is
    one of :data:`LAYOUTS`: optimum's has all its graphs and one data file for them, that of
    transformers.js only the graphs that it loads, each with its weights.
    """

    task: str | None = None
    opset: int = 20
    dtype: str = "fp32"
    ort: bool = False
    prepack: bool = False
    layout: str = "optimum"


@dataclass(frozen=True)
class Package:
    """A package on disk; ``costs`` are the footprints of its graph and variants, if measured."""

    path: Path
    manifest: Manifest
    costs: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "path": str(self.path),
            "task": self.manifest.task,
            "files": [{"path": f.path, "bytes": f.bytes} for f in self.manifest.files],
            "bytes_total": self.manifest.bytes_total,
            "bytes_unique": self.manifest.bytes_unique,
            "skipped": [vars(skip) for skip in self.manifest.skipped],
            "variants": [vars(variant) for variant in self.manifest.variants],
            "costs": dict(self.costs),
        }


def export(
    model: Any,
    target: str | Path,
    config: ExportConfig = ExportConfig(),
    source: Path | None = None,
    data: Data | None = None,
) -> Package:
    """Write ``model`` as an ONNX package; weights that PyTorch shares are stored once.

    ``source`` is the checkpoint folder the model came from: its tokenizer and processor files
    travel along, the inputs of the comparison are drawn as they say, and its weight files are
    named in the manifest. Of ``data`` a few rows are stored, to compare on as well.

    Raises:
        ExportError: the model cannot be exported.
        TieError: a shared weight would be stored twice.
        InputError: the task is not served, the data lacks what the model takes, or ``target``
            exists or cannot be written.
    """
    task = tasks.fit(config.task, model)
    parameters = list(model.parameters())
    if config.opset not in OPSETS:
        raise InputError(f"opset {config.opset} is not one of {OPSETS[0]} to {OPSETS[-1]}.")
    if config.dtype not in ("fp32", *PRECISIONS):
        raise InputError(f"no dtype {config.dtype!r}: there is fp32, {', '.join(PRECISIONS)}.")
    if config.layout not in LAYOUTS:
        raise InputError(f"no layout {config.layout!r}: there is {', '.join(LAYOUTS)}.")
    with staged(Path(target)) as folder, unchunked(model):
        plan = graphs(model, task)
        probes = like_the_task([graph.probe for graph in plan], source, model.config)
        plan = tuple(replace(g, probe=probe) for g, probe in zip(plan, probes, strict=True))
        batch = {}
        if data is not None:
            examples = as_examples(data, source or model.name_or_path, task)
            batch = real_rows(examples, model, task)
        real = real_inputs(plan, batch) if batch else {}
        plan = tuple(replace(g, probe=replace(g.probe, real=int(g.name in real))) for g in plan)
        shared, traces = _to_onnx(plan, config, real)
        last = plan[-1]  # CTC gives a token for each frame and reads none
        reads_ids = "input_ids" in [spec.name for spec in last.probe.inputs]
        generates = tasks.base(task) in tasks.GENERATE and reads_ids and last.outputs[0] == "logits"
        prompts = batch or plan[0].probe.draw(len(plan[0].probe.cases) - 1)
        decoded = greedy(plan, prompts, model) if generates else {}
        if config.layout == "transformers.js":  # it opens no graph that another one contains
            parts = {part for graph in plan for part in graph.parts}
            plan = tuple(replace(g, parts=()) for g in plan if g.name not in parts)
        records = _write_graphs(folder, plan, shared, config)
        parts = {part for record in records for part in record.parts}
        served = [record for record in records if record.path not in parts]
        variants = [
            variant
            for wanted, write in ((config.ort, write_ort), (config.prepack, write_prepacked))
            if wanted
            for variant in write(folder, served)
        ]
        paired = [(g, record.path) for g, record in zip(plan, records, strict=True)]
        metric = real_metric(batch, model, task) if batch else None
        labels = {LABELS: batch["labels"]} if metric and "labels" in batch else {}
        write_reference(folder / REFERENCE, paired, real, traces, decoded, labels)
        _write_config(folder, model)
        if source:
            copy_companions(source, folder)
        (folder / "README.md").write_text(
            card(model, task, [r.path for r in records]), encoding="utf-8"
        )
        files = record_files(folder)
        manifest = Manifest(
            versions={
                "ffmerge": ffmerge.__version__,
                "python": platform.python_version(),
                **{name: version(name) for name in _VERSIONS},
            },
            source={"files": fingerprint(source) if source else {}},
            model_type=model.config.model_type,
            task=task,
            dtype=config.dtype,
            opset=max(each.model.opset_imports[""] for each in shared.values()),
            parameters=sum(p.numel() for p in parameters),
            parameter_bytes=sum(p.nbytes for p in parameters),
            bytes_total=sum(file.bytes for file in files),
            bytes_unique=distinct_bytes(read_model(folder / record.path) for record in records),
            merge=merge_record(model.config),
            ties=join_ties(tie for each in shared.values() for tie in each.ties),
            skipped=tuple(dict.fromkeys(s for each in shared.values() for s in each.skipped)),
            graphs=records,
            files=files,
            metric=metric,
            tensors=record_tensors(folder, [record.path for record in records]),
            variants=tuple(variants),
        )
        manifest.write(folder)
    return Package(Path(target), manifest)


def _to_onnx(
    plan: Sequence[Graph], config: ExportConfig, real: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, ShareResult], dict[str, Trace]]:
    """Return every graph of the plan by name, in the opset and precision that were asked for.

    And of each that PyTorch translated, what PyTorch computes at its nodes.
    """
    done: dict[str, ShareResult] = {}
    programs: dict[str, Any] = {}
    for graph in plan:
        if not graph.parts:
            done[graph.name], programs[graph.name] = to_onnx(graph, max(config.opset, DIRECT))
    if config.opset < DIRECT:
        done = {name: share(to_opset(each.model, config.opset)) for name, each in done.items()}
    if config.dtype != "fp32":  # all graphs agree on the form of a weight: it is stored once
        read = (
            (v.name, v.consumers())
            for each in done.values()
            for v in each.model.graph.initializers.values()
        )
        multiplied = {str(n) for n, nodes in read if any(is_op(c, "MatMul", "Gemm") for c in nodes)}
        browser = config.layout == "transformers.js"
        settings = QuantizeConfig(multiplied=frozenset(multiplied), plain_lookups=browser)
        done = {
            name: share(each.model, dtype=config.dtype, config=settings)
            for name, each in done.items()
        }
    traces = {
        g.name: record_trace(g, programs[g.name], done[g.name].model, real.get(g.name, {}))
        for g in plan
        if g.name in programs
    }
    for graph in plan:
        if graph.parts:
            first, later = (done[part].model for part in graph.parts)
            done[graph.name] = either(first, later, graph)
    return done, traces


def _write_graphs(
    folder: Path, plan: Sequence[Graph], shared: Mapping[str, ShareResult], config: ExportConfig
) -> tuple[GraphRecord, ...]:
    """Write the graphs where the layout has them."""
    prefix, suffixes = LAYOUTS[config.layout]
    paths = {g.name: f"{prefix}{g.name}{suffixes.get(config.dtype, '')}.onnx" for g in plan}
    models = {folder / paths[g.name]: shared[g.name].model for g in plan}
    if config.layout == "optimum":
        write_models(models, folder / WEIGHTS)
    else:
        for path, model in models.items():
            large = bytes_stored(model) > PROTOBUF_LIMIT
            write_models({path: model}, path.with_name(f"{path.name}_data") if large else None)
    return tuple(
        GraphRecord(paths[g.name], g.outputs, g.probe, tuple(paths[p] for p in g.parts))
        for g in plan
    )


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
