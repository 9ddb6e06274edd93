"""Results that are kept in ``tests/golden``: how they are described, compared and written."""

import hashlib
import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from safetensors import safe_open

FOLDER = Path(__file__).parent / "golden"
SHOWN = 30  # differences that a failure lists
Check = Callable[..., None]  # the fixture `golden_result`: name, what is found, tolerance
_OPERATORS = "how many of each operator, by device"


def check(name: str, found: Any, write: bool, tolerance: float = 0.0) -> None:
    """Compare with the result of this name that is kept, or write it anew.

    Numbers with a fraction may differ by ``tolerance``; all else must be the same.
    """
    path = FOLDER / f"{name}.json"
    found = json.loads(json.dumps(found))
    if write:
        FOLDER.mkdir(exist_ok=True)
        path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return
    kept = json.loads(path.read_text(encoding="utf-8"))
    different = differences(kept, found, tolerance)
    told = "\n  ".join(different[:SHOWN])
    assert not different, (
        f"{len(different)} results are not those in {path.name}:\n  {told}\n"
        "If the change is meant: pytest tests/test_golden.py --write-golden, and look at the diff."
    )


def differences(kept: Any, found: Any, tolerance: float = 0.0, where: str = "") -> list[str]:
    """Return a line for each place where two JSON values differ, keys in another order included."""
    if isinstance(kept, dict) and isinstance(found, dict):
        lines = [f"{where}/{key}: is gone" for key in kept if key not in found]
        lines += [f"{where}/{key}: is new" for key in found if key not in kept]
        for key in kept:
            if key in found:
                lines += differences(kept[key], found[key], tolerance, f"{where}/{key}")
        if not lines and list(kept) != list(found):
            lines.append(f"{where}: the order was {list(kept)} and is {list(found)}")
        return lines
    if isinstance(kept, list) and isinstance(found, list) and len(kept) == len(found):
        lines = []
        for number, (one, other) in enumerate(zip(kept, found, strict=True)):
            lines += differences(one, other, tolerance, f"{where}/{number}")
        return lines
    if isinstance(kept, float) and isinstance(found, float) and abs(kept - found) <= tolerance:
        return []
    return [] if kept == found else [f"{where}: was {kept!r} and is {found!r}"]


def kinds(value: Any) -> Any:
    """Return a JSON value with the kind of each number and text in its place.

    Of a list the distinct kinds of its elements are left, in the order in which they come. Which
    operators a runtime computes with depends on the processor and is left out.
    """
    if isinstance(value, dict):
        return {key: _OPERATORS if key == "compute" else kinds(each) for key, each in value.items()}
    if isinstance(value, list):
        found: list[Any] = []
        for each in map(kinds, value):
            if each not in found:
                found.append(each)
        return found
    if value is None or isinstance(value, bool):
        return "null" if value is None else "boolean"
    return "text" if isinstance(value, str) else "number"


def package(folder: Path, values: bool) -> dict[str, Any]:
    """Describe a package: its files, its manifest, its graphs, and what it is compared with.

    With ``values`` each initializer has a part of its SHA-256 as well: where nothing but copying
    and rounding is done to the values of a checkpoint, they are the same on every machine.
    """
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*"))
    manifest = json.loads((folder / "ffmerge.json").read_text())
    return {
        "files": files,
        "manifest": kinds(manifest),
        "ties": manifest["ties"],
        "skipped": manifest["skipped"],
        "graphs": {name: _graph(folder / name, values) for name in files if name.endswith(".onnx")},
        "reference": _reference(folder / "reference.safetensors"),
    }


def _graph(path: Path, values: bool) -> dict[str, Any]:
    """Describe a graph; operators are joined, in order, to lines."""
    model = onnx.load(path)
    graph = model.graph
    return {
        "opsets": {opset.domain: opset.version for opset in model.opset_import},
        "metadata": [entry.key for entry in model.metadata_props],
        "inputs": [_value(value) for value in graph.input],
        "outputs": [_value(value) for value in graph.output],
        "initializers": [_tensor(tensor, values) for tensor in graph.initializer],
        "ops": textwrap.wrap(" ".join(_ops(graph)), 96),
    }


def _ops(graph: onnx.GraphProto) -> list[str]:
    """Return the operators of a graph in order, each followed by those of its subgraphs."""
    found = []
    for node in graph.node:
        found.append(node.op_type)
        for attribute in node.attribute:
            if attribute.HasField("g"):
                found += ["(", *_ops(attribute.g), ")"]
    return found


def _value(value: onnx.ValueInfoProto) -> str:
    kind = value.type.tensor_type
    shape = [size.dim_param or size.dim_value for size in kind.shape.dim]
    return f"{value.name}: {onnx.TensorProto.DataType.Name(kind.elem_type)} {shape}"


def _tensor(tensor: onnx.TensorProto, values: bool) -> str:
    kind = onnx.TensorProto.DataType.Name(tensor.data_type)
    told = f"{tensor.name}: {kind} {list(tensor.dims)}"
    if not values:
        return told
    data = np.ascontiguousarray(numpy_helper.to_array(tensor)).tobytes()
    return f"{told} {hashlib.sha256(data).hexdigest()[:12]}"


def _reference(path: Path) -> dict[str, str]:
    """Return kind and shape of what a package is compared with, by name."""
    with safe_open(path, "np") as file:
        parts = {name: file.get_slice(name) for name in sorted(file.keys())}
        return {name: f"{p.get_dtype()} {p.get_shape()}" for name, p in parts.items()}
