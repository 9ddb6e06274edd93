"""Merge the feed-forward sublayers of a Transformer and ship the shared weights once.

The public verbs load what they need when they are first used: importing ffmerge imports neither
torch nor onnxruntime.
"""

import os
from importlib import import_module
from typing import Any

# Since 1.29 ONNX Runtime's own builds for Linux write a device id into the home folder and report
# every model that is loaded to their maker. It must be said before they are imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"

# public name -> where it lives
_HOMES = {
    "ExportConfig": "config",
    "FfmergeError": "errors",
    "MergeConfig": "config",
    "RecoverConfig": "config",
    "SharedWeights": "models.ties",
    "audit": "passes.graph.audit",
    "export": "exporter.package",
    "inspect": "models.inspection",
    "load": "models.checkpoint",
    "load_package": "serving",
    "merge_": "passes.weights.merge",
    "method": "passes.weights.methods",
    "recover_": "passes.weights.recover",
    "save": "models.checkpoint",
    "share": "passes.graph.run",
    "validate": "runtime_tests.validate",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ffmerge' has no attribute {name!r}")
    return getattr(import_module(f"ffmerge.{_HOMES[name]}"), name)
