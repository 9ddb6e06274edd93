"""Merge the feed-forward sublayers of a Transformer and ship the shared weights once.

The public names load what they need when they are first used: importing ffmerge imports neither
torch nor onnxruntime, and those of the device side (share, audit, validate) never need torch.
"""

import os
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ffmerge.config import (
        CompareConfig,
        ExportConfig,
        MergeConfig,
        QuantizeConfig,
        RecoverConfig,
        ShareConfig,
        SimilarityConfig,
        ValidateConfig,
    )
    from ffmerge.errors import FfmergeError
    from ffmerge.exporter.package import export
    from ffmerge.models.checkpoint import load, save
    from ffmerge.models.data import read
    from ffmerge.models.inspection import inspect
    from ffmerge.models.ties import SharedWeights
    from ffmerge.passes.graph.run import share
    from ffmerge.passes.weights.compare import compare
    from ffmerge.passes.weights.merge import merge_
    from ffmerge.passes.weights.methods import method
    from ffmerge.passes.weights.recover import clone_sharing_parameters, recover_
    from ffmerge.passes.weights.similarity import similarity
    from ffmerge.runtime_tests.loaded import audit
    from ffmerge.runtime_tests.validate import validate
    from ffmerge.serving import load_package

# Since 1.29 ONNX Runtime's own builds for Linux write a device id into the home folder and report
# every model that is loaded to their maker. It must be said before they are imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

# module -> the public names that live in it
_HOMES = {
    "config": (
        "CompareConfig",
        "ExportConfig",
        "MergeConfig",
        "QuantizeConfig",
        "RecoverConfig",
        "ShareConfig",
        "SimilarityConfig",
        "ValidateConfig",
    ),
    "errors": ("FfmergeError",),
    "exporter.package": ("export",),
    "models.checkpoint": ("load", "save"),
    "models.data": ("read",),
    "models.inspection": ("inspect",),
    "models.ties": ("SharedWeights",),
    "passes.graph.run": ("share",),
    "passes.weights.compare": ("compare",),
    "passes.weights.merge": ("merge_",),
    "passes.weights.methods": ("method",),
    "passes.weights.recover": ("clone_sharing_parameters", "recover_"),
    "passes.weights.similarity": ("similarity",),
    "runtime_tests.loaded": ("audit",),
    "runtime_tests.validate": ("validate",),
    "serving": ("load_package",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "CompareConfig",
    "ExportConfig",
    "FfmergeError",
    "MergeConfig",
    "QuantizeConfig",
    "RecoverConfig",
    "ShareConfig",
    "SharedWeights",
    "SimilarityConfig",
    "ValidateConfig",
    "audit",
    "clone_sharing_parameters",
    "compare",
    "export",
    "inspect",
    "load",
    "load_package",
    "merge_",
    "method",
    "read",
    "recover_",
    "save",
    "share",
    "similarity",
    "validate",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name not in _HOME_OF:
        raise AttributeError(f"module 'ffmerge' has no attribute {name!r}")
    return getattr(import_module(f"ffmerge.{_HOME_OF[name]}"), name)


def _version() -> str:
    """Return what was installed; of a checkout that is only on the path nobody knows."""
    try:
        return version("ffmerge")
    except PackageNotFoundError:
        return "0+unknown"


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
