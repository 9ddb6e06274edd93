"""The manifest of a package: what is in the files that were written, and what it promises.

The last step of :func:`ffmerge.exporter.package.export`.
"""

import platform
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import ffmerge
from ffmerge.exporter.plan import Plan
from ffmerge.exporter.records import record_tensors
from ffmerge.exporter.reference import real_metric
from ffmerge.exporter.write import Written
from ffmerge.models.manifest import GraphRecord, Manifest, Skip, Variant, record_files
from ffmerge.models.record import merge_record
from ffmerge.models.source import fingerprint
from ffmerge.passes.graph.read import read_model
from ffmerge.passes.graph.tensors import distinct_bytes

_VERSIONS = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript", "numpy")


def describe(
    folder: Path,
    plan: Plan,
    written: Sequence[Written],
    records: Sequence[GraphRecord],
    variants: Sequence[Variant],
    left_out: Sequence[Skip],
) -> Manifest:
    """Return the manifest of the package whose files are in ``folder``; ``left_out`` is not.

    Ties are those of the first graphs: a tied weight keeps its name in all.
    """
    skipped: dict[Skip, None] = {}
    for each in written:
        for skip in each.skipped:
            if len(written) > 1:
                skip = replace(skip, reason=f"in {each.kind}, {skip.reason}")
            skipped[skip] = None
    skipped |= dict.fromkeys(left_out)
    paths = [record.path for each in written for record in each.records]
    int8: dict[str, str] = {}
    for each in written:
        int8 |= each.int8
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
        dtype=plan.dtype,
        profile=written[0].profile,
        opset=written[0].opset,
        parameters=sum(p.numel() for p in parameters),
        parameter_bytes=sum(p.nbytes for p in parameters),
        bytes_total=sum(file.bytes for file in files),
        bytes_unique=distinct_bytes(read_model(folder / path) for path in paths),
        merge=merge_record(plan.model.config),
        ties=written[0].ties,
        skipped=tuple(skipped),
        graphs=tuple(records),
        files=files,
        metric=real_metric(plan),
        tensors=record_tensors(folder, paths),
        variants=tuple(variants),
        bits=written[0].forms,
        int8=int8,
    )


def _versions() -> dict[str, str]:
    found = {"ffmerge": ffmerge.__version__, "python": platform.python_version()}
    for name in _VERSIONS:
        found[name] = version(name)
    return found
