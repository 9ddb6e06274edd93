"""A package's graph as ONNX Runtime's own file, and the list of operators a small build needs."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime

from ffmerge.errors import ExportError, InputError, TieError
from ffmerge.models.manifest import GraphRecord, Variant
from ffmerge.passes.graph.read import read_model
from ffmerge.passes.graph.tensors import bytes_stored
from ffmerge.passes.graph.write import PROTOBUF_LIMIT

OPERATORS = "required_operators.config"
OVERHEAD = 1.02, 200_000  # what the format may add to the tensors: a share of them, and the graph
# The norm of the difference of outputs over that of the outputs: by other fusions and another order
# of sums (measured 9e-7), and where what a product reads is rounded, which a last bit turns up or
# down (measured 0.028: a sentence encoder of six layers in int8; of another weight it is about 1)
CLOSE, CLOSE_ROUNDED = 1e-4, 0.2
ROUNDING = ("MatMulNBits", "DynamicQuantizeLinear", "QuantizeLinear")


def write_ort(folder: Path, records: Sequence[GraphRecord]) -> list[Variant]:
    """Write each graph as ``.ort`` beside it, and one ``required_operators.config`` for all.

    The files are optimized at the level ``basic``, which folds constants and nothing else, so
    they load on any processor, in the browser and in a minimal build with the listed operators.
    Their weights are stored once and they compute what the graphs compute.

    Raises:
        InputError: the tensors take more than the 2 GB that the format can hold.
        TieError: ONNX Runtime would store a weight twice.
        ExportError: ONNX Runtime cannot write it, or it computes something else.
    """
    # Its import sets up logging for a command line of its own.
    from onnxruntime.tools.ort_format_model import create_config_from_models

    targets = [(folder / record.path).with_suffix(".ort") for record in records]
    for record, target in zip(records, targets, strict=True):
        size = bytes_stored(read_model(folder / record.path))
        if size > PROTOBUF_LIMIT:
            raise InputError(
                f"{record.path} holds more than 2 GB, which {target.name} cannot: leave out --ort."
            )
        save_optimized(folder / record.path, target, "BASIC", {"session.save_model_format": "ORT"})
        written = target.stat().st_size
        if written > OVERHEAD[0] * size + OVERHEAD[1]:
            raise TieError(
                f"{target.name} takes {written} bytes for tensors of {size}: one is stored twice."
            )
        check_same(folder / record.path, target, record)
    logging.getLogger("ort_format_model.utils").setLevel(logging.WARNING)
    config = folder / OPERATORS
    create_config_from_models(targets, config, False)
    lines = [line for line in config.read_text().splitlines() if not line.startswith("#")]
    config.write_text("\n".join(["# what the .ort need: domain;opset;operators", *lines]) + "\n")
    return [
        Variant("ort", target.relative_to(folder).as_posix(), portable=True, graph=record.path)
        for record, target in zip(records, targets, strict=True)
    ]


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


def check_same(graph: Path, other: Path, record: GraphRecord) -> None:
    """Raise ExportError unless two files give the same outputs on the graph's probe."""
    close = CLOSE
    if _rounds(graph):
        close = CLOSE_ROUNDED
    one, two = _open(graph), _open(other)
    for case in range(len(record.probe.cases)):
        feed = record.probe.runs(record.probe.draw(case))[0]
        for a, b in zip(one.run(None, feed), two.run(None, feed), strict=True):
            if a.shape != b.shape or not np.linalg.norm(a - b) <= close * np.linalg.norm(a):
                raise ExportError(f"{other.name} does not compute what {graph.name} computes.")


def _rounds(path: Path) -> bool:
    """Tell whether a graph rounds what its products read, or all it computes."""
    graph = read_model(path).graph
    halves = [value for value in graph.initializers.values() if value.dtype == ir.DataType.FLOAT16]
    return bool(halves) or any(node.op_type in ROUNDING for node in graph.all_nodes())


def _open(path: Path, options: Any = None) -> Any:
    if options is None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's errors have no common class of their own
        raise ExportError(f"ONNX Runtime does not take {path.name}: {error}") from error
