"""Packages made by hand: y = x W + b, the reference computed in numpy."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

from ffmerge.models.manifest import GraphRecord, Manifest, record_files, reference_key
from ffmerge.models.probe import Array, InputSpec, Probe, stored_elements

CASES = ({"batch_size": 1}, {"batch_size": 3})


def linear_package(
    folder: Path,
    weight: Array,
    bias: Array,
    served_weight: Array | None = None,
    served_bias: Array | None = None,
    cases: tuple[dict[str, int], ...] = CASES,
    **fields: Any,
) -> Manifest:
    """Write a package of ``x @ weight + bias``; ``served_*`` is what the graph holds."""
    served = {
        "weight": weight if served_weight is None else served_weight,
        "bias": bias if served_bias is None else served_bias,
    }
    nodes = [
        helper.make_node("MatMul", ["x", "weight"], ["product"]),
        helper.make_node("Add", ["product", "bias"], ["logits"]),
    ]
    probe = Probe((InputSpec("x", "float32", ("batch_size", weight.shape[0])),), cases)
    reference = {}
    for case in range(len(cases)):
        logits = probe.draw(case)["x"].astype(np.float64) @ weight + bias
        reference[reference_key("model.onnx", case, "logits")] = np.ascontiguousarray(
            stored_elements(logits.astype(np.float32), name="logits")
        )
    return write_package(folder, nodes, served, reference, probe, **fields)


def write_package(
    folder: Path,
    nodes: list[onnx.NodeProto],
    weights: dict[str, Array],
    reference: dict[str, Array],
    probe: Probe,
    external: bool = True,
    **fields: Any,
) -> Manifest:
    """Write a package of one input ``x``, one output ``logits``, and (external) weights."""
    width = int(probe.inputs[0].shape[1])
    shapes = {"x": ["batch_size", width], "logits": ["batch_size", None]}
    inputs, outputs = (
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shapes[name])]
        for name in ("x", "logits")
    )
    initializers = [numpy_helper.from_array(w, name) for name, w in weights.items()]
    graph = helper.make_graph(nodes, "hand", inputs, outputs, initializers)
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])
    folder.mkdir()
    onnx.save(
        model,
        folder / "model.onnx",
        save_as_external_data=external,
        location="model.onnx_data",
        size_threshold=0,
    )
    save_file(reference, folder / "reference.safetensors")
    size = sum(w.nbytes for w in weights.values())
    defaults: dict[str, Any] = {
        "versions": {"ffmerge": "0"},
        "source": {},
        "model_type": "linear",
        "task": "image-classification",
        "dtype": "fp32",
        "opset": 20,
        "parameters": sum(w.size for w in weights.values()),
        "parameter_bytes": size,
        "bytes_total": size,
        "bytes_unique": size,
        "merge": None,
        "ties": (),
        "skipped": (),
        "graphs": (GraphRecord("model.onnx", ("logits",), probe),),
        "files": record_files(folder),
    }
    manifest = Manifest(**{**defaults, **fields})
    manifest.write(folder)
    return manifest


def regraphed(manifest: Manifest, **fields: Any) -> Manifest:
    """Return the manifest of a package of one graph with other fields of that graph."""
    return replace(manifest, graphs=(replace(manifest.graphs[0], **fields),))
