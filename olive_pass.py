"""ffmerge as passes of Olive: a model merged or narrowed and exported, any ONNX file shared.

Olive imports this module where a package configuration names it, and hands over a model and the
options of the run. ``python -m ffmerge.olive_pass`` prints such a configuration: Olive's
own passes and these. Options are fields of ``config.py``, by the same names.
"""

import json
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from olive.model import CompositeModelHandler, ONNXModelHandler
from olive.passes import Pass
from olive.passes.pass_config import PassConfigParam

from ffmerge import commands
from ffmerge.config import (
    CheckpointConfig,
    DataConfig,
    ExportConfig,
    LoadConfig,
    MergeConfig,
    ShareConfig,
)
from ffmerge.errors import InputError
from ffmerge.passes.graph.run import share_file

_MODULE = "ffmerge.olive_pass"  # also where it is run as a program
_ANYWHERE = {
    "supported_providers": ["*"],
    "supported_accelerators": ["*"],
    "supported_precisions": ["*"],
}
# what Olive reads of a pass, by its name
PASSES = {
    "FfmergeExport": {"module_path": f"{_MODULE}.FfmergeExport", **_ANYWHERE},
    "FfmergeShare": {"module_path": f"{_MODULE}.FfmergeShare", **_ANYWHERE},
}


def _params(*kinds: tuple[Any, tuple[str, ...]]) -> dict[str, PassConfigParam]:
    """Return fields of configurations as parameters of a pass."""
    params = {}
    for kind, names in kinds:
        for field in fields(kind):
            if field.name in names:
                params[field.name] = PassConfigParam(
                    type_=str, default_value=field.default, description=field.metadata["help"]
                )
    return params


class FfmergeExport(Pass):
    """Export a model of transformers as a package; with a budget merge or narrow it before."""

    @classmethod
    def _default_config(cls, accelerator_spec: Any) -> dict[str, PassConfigParam]:
        return _params(
            (DataConfig, ("data", "validation", "text_column", "label_column", "target_column")),
            (MergeConfig, ("method", "budget", "task")),
            (ExportConfig, ("dtype", "profile")),
        )

    def _run_for_config(self, model: Any, config: Any, output_model_path: str) -> Any:
        given = {name: getattr(config, name) for name in self._default_config(None)}
        data = DataConfig(**_of(DataConfig, given))
        export = ExportConfig(**_of(ExportConfig, {**given, "budget": None}))
        if len(export.profiles) * len(export.dtypes) > 1:
            raise InputError("a pass gives Olive one model: give one profile and one dtype.")
        out = _free(output_model_path)
        source = str(model.model_name_or_path)
        with TemporaryDirectory(dir=out.parent) as there:
            if given["budget"]:
                if not data.data:
                    raise InputError("what a budget leaves out is chosen on data: give data.")
                merged = Path(there) / "merged"
                settings = MergeConfig(**_of(MergeConfig, given))
                commands.merge(source, merged, settings, data, None, CheckpointConfig())
                source = str(merged)
            result = commands.export(source, out, export, LoadConfig(), data.data, data)
        graphs = [graph.path for graph in result.manifest.graphs]
        handlers = [ONNXModelHandler(model_path=str(out), onnx_file_name=each) for each in graphs]
        if len(handlers) == 1:
            return handlers[0]
        return CompositeModelHandler(handlers, [Path(each).stem for each in graphs])


class FfmergeShare(Pass):
    """Store equal weights of an ONNX file once, in fewer bits if wanted."""

    @classmethod
    def _default_config(cls, accelerator_spec: Any) -> dict[str, PassConfigParam]:
        return _params((ShareConfig, ("dtype", "data")))

    def _run_for_config(self, model: Any, config: Any, output_model_path: str) -> Any:
        out = _free(output_model_path)
        out.mkdir(parents=True)
        data = None
        if config.data:
            data = Path(config.data)
        settings = ShareConfig(dtype=config.dtype, data=data)
        share_file(Path(model.model_path), out / "model.onnx", settings)
        return ONNXModelHandler(model_path=str(out), onnx_file_name="model.onnx")


def _of(kind: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Return what is given of the fields of a configuration."""
    names = {field.name for field in fields(kind)}
    return {name: value for name, value in given.items() if name in names}


def _free(path: str) -> Path:
    """Return the folder that Olive wants an output in, which it may have made, empty."""
    out = Path(path)
    if out.suffix == ".onnx":
        out = out.with_suffix("")
    if out.is_dir() and not any(out.iterdir()):
        out.rmdir()
    out.parent.mkdir(parents=True, exist_ok=True)
    return out


if __name__ == "__main__":
    from olive.package_config import OlivePackageConfig

    own = json.loads(Path(OlivePackageConfig.get_default_config_path()).read_text())
    own["passes"] |= PASSES
    print(json.dumps(own, indent=2))
