"""A model as a folder that a runtime serves: graph, weights, configuration, manifest, card."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

import ffmerge
from ffmerge.errors import InputError
from ffmerge.exporter.card import card
from ffmerge.exporter.ort_format import write_ort
from ffmerge.exporter.prepack import write_prepacked
from ffmerge.exporter.torch_onnx import reference_outputs, to_onnx
from ffmerge.files import staged
from ffmerge.models import checkpoint, tasks
from ffmerge.models.inputs import probe
from ffmerge.models.manifest import Manifest, record_files
from ffmerge.models.probe import stored_elements
from ffmerge.passes.graph.opset import OLDEST, to_opset
from ffmerge.passes.graph.quantize import PRECISIONS
from ffmerge.passes.graph.run import share
from ffmerge.passes.graph.write import write_models

GRAPH, WEIGHTS, REFERENCE = "model.onnx", "model.onnx_data", "reference.safetensors"
OPSETS = range(OLDEST, 24)
DIRECT = 18  # the first that PyTorch's exporter writes by itself; older ones are converted
_VERSIONS = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript", "numpy")


@dataclass(frozen=True)
class ExportConfig:
    """Settings of an export; ``task`` None means: inferred from the model's class.

    ``dtype`` is fp32 or one of :data:`ffmerge.passes.graph.quantize.PRECISIONS`; ``ort`` and
    ``prepack`` add the graph in ONNX Runtime's format, and with packed weights.
    """

    task: str | None = None
    opset: int = 20
    dtype: str = "fp32"
    ort: bool = False
    prepack: bool = False


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
) -> Package:
    """Write ``model`` as an ONNX package; weights that PyTorch shares are stored once.

    ``source`` is the checkpoint folder the model came from: its tokenizer and processor files
    travel along and its weight files are named in the manifest.

    Raises:
        ExportError: the model cannot be exported.
        TieError: a shared weight would be stored twice.
        InputError: the task is not served, or ``target`` exists or cannot be written.
    """
    task = tasks.infer(type(model))
    if config.task and tasks.check(config.task) != task:
        raise InputError(f"{type(model).__name__} does not serve {config.task}: it serves {task}.")
    parameters = list(model.parameters())
    if config.opset not in OPSETS:
        raise InputError(f"opset {config.opset} is not one of {OPSETS[0]} to {OPSETS[-1]}.")
    if config.dtype not in ("fp32", *PRECISIONS):
        raise InputError(f"no dtype {config.dtype!r}: there is fp32, {', '.join(PRECISIONS)}.")
    with staged(Path(target)) as folder:
        shared = to_onnx(model, task, max(config.opset, DIRECT))
        if config.opset < DIRECT:
            shared = share(to_opset(shared.model, config.opset))
        if config.dtype != "fp32":
            shared = share(shared.model, dtype=config.dtype)
        write_models({folder / GRAPH: shared.model}, folder / WEIGHTS)
        recipe = probe(model)
        feeds = [recipe.draw(case) for case in range(len(recipe.cases))]
        variants = [
            write(folder / GRAPH, feeds)
            for wanted, write in ((config.ort, write_ort), (config.prepack, write_prepacked))
            if wanted
        ]
        _write_reference(folder / REFERENCE, reference_outputs(model, task))
        _write_config(folder, model)
        if source:
            checkpoint.copy_companions(source, folder)
        (folder / "README.md").write_text(card(model, task), encoding="utf-8")
        files = record_files(folder)
        manifest = Manifest(
            versions={
                "ffmerge": ffmerge.__version__,
                "python": platform.python_version(),
                **{name: version(name) for name in _VERSIONS},
            },
            source={"files": checkpoint.fingerprint(source) if source else {}},
            model_type=model.config.model_type,
            task=task,
            dtype=config.dtype,
            opset=shared.model.opset_imports[""],
            parameters=sum(p.numel() for p in parameters),
            parameter_bytes=sum(p.nbytes for p in parameters),
            bytes_total=sum(file.bytes for file in files),
            bytes_unique=shared.bytes_after,
            merge=checkpoint.merge_record(model.config),
            ties=shared.ties,
            skipped=shared.skipped,
            outputs=tasks.OUTPUTS[task],
            probe=recipe,
            files=files,
            variants=tuple(variants),
        )
        manifest.write(folder)
    return Package(Path(target), manifest)


def _write_reference(path: Path, outputs: Sequence[dict[str, Any]]) -> None:
    """Store the sampled outputs of every case, as ``CASE.NAME``."""
    tensors = {
        f"{case}.{name}": np.ascontiguousarray(stored_elements(array))
        for case, by_name in enumerate(outputs)
        for name, array in by_name.items()
    }
    save_file(tensors, path)


def _write_config(folder: Path, model: Any) -> None:
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
