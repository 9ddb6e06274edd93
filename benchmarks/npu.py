"""How much of a package is of a known size, once ONNX Runtime's basic optimizations are done.

``python benchmarks/npu.py PACKAGE`` prints it for each graph: an NPU takes only nodes whose sizes
are all known. ``ffmerge validate`` says how far the same package is from PyTorch.
"""

import sys
import tempfile
from pathlib import Path

import onnx
import onnxruntime

from ffmerge.models.manifest import Manifest


def known_sizes(path: Path) -> tuple[int, int]:
    """Return how many values of a graph have a known size, and how many there are.

    Those are all that its nodes give, after ONNX Runtime's basic optimizations.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(Path(folder) / "model.onnx")
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", "data"
        )
        onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        onnx.shape_inference.infer_shapes_path(options.optimized_model_filepath)
        graph = onnx.load(options.optimized_model_filepath, load_external_data=False).graph
    given = {name for node in graph.node for name in node.output if name}
    known = set()
    for value in (*graph.value_info, *graph.output):
        shape = value.type.tensor_type.shape
        if value.type.tensor_type.HasField("shape") and all(
            side.HasField("dim_value") for side in shape.dim
        ):
            known.add(value.name)
    return len(given & known), len(given)


if __name__ == "__main__":
    package = Path(sys.argv[1])
    for record in Manifest.read(package).graphs:
        known, values = known_sizes(package / record.path)
        print(f"{record.path}: {known} of {values} values have a known size")
