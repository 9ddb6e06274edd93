"""Which wrong scales validate finds: those of each quantized product doubled, one after another.

``python benchmarks/quality/doubled.py PACKAGE...`` with packages of one graph, of ``ffmerge export
--dtype int8`` or ``int4`` with data. Prints for each how many of its products are found.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import onnx
from onnx import numpy_helper

from ffmerge.models.manifest import GraphRecord, Manifest
from ffmerge.runtime_tests.parity import parity_of
from ffmerge.runtime_tests.reference import Reference, read_reference
from ffmerge.runtime_tests.runtimes.registry import find_runtime
from ffmerge.runtime_tests.tolerance import for_dtype, row_of


def is_found(model: Any, graph: GraphRecord, reference: Reference, row: str) -> bool:
    """Say whether an output of the model is out of its tolerance."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(model, path)
        session = find_runtime("cpu").open(path, "all")
        found = parity_of(graph, session, reference, "all", for_dtype(row))
    return not all(output.ok for output in found)


def main() -> None:
    """Double the scales of each product, and count."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("packages", nargs="+", type=Path)
    for folder in parser.parse_args().packages:
        manifest, reference = Manifest.read(folder), read_reference(folder)
        [graph] = manifest.graphs
        model = onnx.load(folder / graph.path)
        stored = {each.name: each for each in model.graph.initializer}
        products = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
        count = 0
        for node in products:
            scales = stored[node.input[2]]
            kept = scales.SerializeToString()
            doubled = numpy_helper.to_array(scales) * 2
            scales.CopyFrom(numpy_helper.from_array(doubled, scales.name))
            count += is_found(model, graph, reference, row_of(manifest))
            scales.ParseFromString(kept)
        print(f"{folder}: {count} of {len(products)} are found")


if __name__ == "__main__":
    main()
