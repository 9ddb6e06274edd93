"""The manifest of a package: what is in the files that were written, and what it promises.

The last step of :func:`ffmerge.exporter.package.export`.
"""

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import ffmerge
from ffmerge.exporter.plan import Plan
from ffmerge.exporter.records import record_tensors
from ffmerge.exporter.reference import real_metric
from ffmerge.models.manifest import GraphRecord, Manifest, Skip, Variant, record_files
from ffmerge.models.record import Tie, merge_record
from ffmerge.models.source import fingerprint
from ffmerge.passes.graph.contract import join_ties
from ffmerge.passes.graph.read import read_model
from ffmerge.passes.graph.run import ShareResult
from ffmerge.passes.graph.tensors import distinct_bytes

_VERSIONS = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript", "numpy")


def describe(
    folder: Path,
    plan: Plan,
    results: Mapping[str, ShareResult],
    records: Sequence[GraphRecord],
    variants: Sequence[Variant],
    left_out: Sequence[Skip],
) -> Manifest:
    """Return the manifest of the package whose files are in ``folder``; ``left_out`` is not."""
    ties: list[Tie] = []
    skipped: dict[Skip, None] = {}
    for result in results.values():
        ties += result.ties
        skipped |= dict.fromkeys(result.skipped)
    skipped |= dict.fromkeys(left_out)
    source = {}
    if plan.source:
        source = fingerprint(plan.source)
    parameters = list(plan.model.parameters())
    files = record_files(folder)
    return Manifest(
        versions=_versions(),
        source={"files": source},
        model_type=plan.model.config.model_type,
        task=plan.task,
        dtype=plan.config.dtype,
        profile=plan.config.profile,
        opset=max(result.model.opset_imports[""] for result in results.values()),
        parameters=sum(p.numel() for p in parameters),
        parameter_bytes=sum(p.nbytes for p in parameters),
        bytes_total=sum(file.bytes for file in files),
        bytes_unique=distinct_bytes(read_model(folder / record.path) for record in records),
        merge=merge_record(plan.model.config),
        ties=join_ties(ties),
        skipped=tuple(skipped),
        graphs=tuple(records),
        files=files,
        metric=real_metric(plan),
        tensors=record_tensors(folder, [record.path for record in records]),
        variants=tuple(variants),
        bits=dict(pair for result in results.values() for pair in result.forms.items()),
    )


def _versions() -> dict[str, str]:
    found = {"ffmerge": ffmerge.__version__, "python": platform.python_version()}
    for name in _VERSIONS:
        found[name] = version(name)
    return found
