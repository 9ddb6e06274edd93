"""A package's graph as ONNX Runtime's own file, and the list of operators a small build needs."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from ffmerge.errors import ExportError, InputError, TieError
from ffmerge.models.manifest import Variant
from ffmerge.passes.graph.read import read_model
from ffmerge.passes.graph.tensors import bytes_stored
from ffmerge.passes.graph.write import PROTOBUF_LIMIT

ORT, OPERATORS = "model.ort", "required_operators.config"
OVERHEAD = 1.02, 200_000  # what the format may add to the tensors: a share of them, and the graph
CLOSE = 1e-4  # of the largest output: other fusions, other order of sums (measured 1e-6)

Feeds = Sequence[Mapping[str, Any]]


def write_ort(graph: Path, feeds: Feeds) -> Variant:
    """Write ``model.ort`` and ``required_operators.config`` beside ``graph``.

    The file is optimized at the level ``basic``, which folds constants and nothing else, so it
    loads on any processor, in the browser and in a minimal build with the listed operators. Its
    weights are stored once and it computes what ``graph`` computes on ``feeds``.

    Raises:
        InputError: the tensors take more than the 2 GB that the format can hold.
        TieError: ONNX Runtime would store a weight twice.
        ExportError: ONNX Runtime cannot write it, or it computes something else.
    """
    # Its import sets up logging for a command line of its own.
    from onnxruntime.tools.ort_format_model import create_config_from_models

    target, config = graph.with_name(ORT), graph.with_name(OPERATORS)
    size = bytes_stored(read_model(graph))
    if size > PROTOBUF_LIMIT:
        raise InputError(f"{graph.name} holds more than 2 GB, which {ORT} cannot: leave out --ort.")
    save_optimized(graph, target, "BASIC", {"session.save_model_format": "ORT"})
    written = target.stat().st_size
    if written > OVERHEAD[0] * size + OVERHEAD[1]:
        raise TieError(f"{ORT} takes {written} bytes for tensors of {size}: one is stored twice.")
    check_same(graph, target, feeds)
    logging.getLogger("ort_format_model.utils").setLevel(logging.WARNING)
    create_config_from_models([target], config, False)
    lines = [line for line in config.read_text().splitlines() if not line.startswith("#")]
    config.write_text("\n".join([f"# what {ORT} needs: domain;opset;operators", *lines]) + "\n")
    return Variant("ort", ORT, portable=True)


def save_optimized(graph: Path, target: Path, level: str, entries: Mapping[str, str]) -> None:
    """Let ONNX Runtime's CPU provider write ``graph`` as it runs it at an optimization level.

    Raises:
        ExportError: it does not.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = getattr(
        onnxruntime.GraphOptimizationLevel, f"ORT_ENABLE_{level}"
    )
    options.optimized_model_filepath = str(target)
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    _open(graph, options)


def check_same(graph: Path, other: Path, feeds: Feeds) -> None:
    """Raise ExportError unless two files give the same outputs."""
    one, two = _open(graph), _open(other)
    for feed in feeds:
        for a, b in zip(one.run(None, feed), two.run(None, feed), strict=True):
            if a.shape != b.shape or np.abs(a - b).max(initial=0) > CLOSE * np.abs(a).max(
                initial=0
            ):
                raise ExportError(f"{other.name} does not compute what {graph.name} computes.")


def _open(path: Path, options: Any = None) -> Any:
    if options is None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's errors have no common class of their own
        raise ExportError(f"ONNX Runtime does not take {path.name}: {error}") from error
