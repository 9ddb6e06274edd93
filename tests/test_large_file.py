"""The benchmark of large files, on a small one."""

import large_file
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphs import run

from ffmerge.passes.graph.run import share_file


def test_memory_does_not_grow_with_the_file_and_copies_go(tmp_path):
    """256 MB of weights of 4 MB each: what is added is a tensor and a few blocks."""
    found = {}
    for weights in (8, 64):
        (tmp_path / str(weights)).mkdir()
        found[weights] = large_file.measure(tmp_path / str(weights), weights, width=1024)
        folder = tmp_path / str(weights)
        assert found[weights]["bytes"] == weights * 4 << 20
        assert (folder / "shared.onnx_data").stat().st_size == weights * 2 << 20
    growth = found[64]["anonymous"] - found[8]["anonymous"]
    assert growth < 0.25 * found[64]["bytes"]  # measured: under 2 %
    kinds = {node.op_type for node in ir.load(folder / "shared.onnx").graph}
    assert kinds == {"MatMul", "Gemm"}  # the transposed are read through transB
    onnx.checker.check_model(str(folder / "shared.onnx"))
    assert "x the copy" in large_file.table(found[64])


@pytest.mark.slow
def test_more_than_two_gigabytes_of_distinct_weights(tmp_path, monkeypatch):
    """The last weights lie beyond 2^31 bytes; ONNX Runtime computes the same with both files."""
    monkeypatch.setattr(large_file, "KINDS", ("own", "turned"))
    large_file.write_large(tmp_path / "in.onnx", 136)
    result = share_file(tmp_path / "in.onnx", tmp_path / "out.onnx")
    assert result.bytes_after > 1 << 31
    last = list(ir.load(tmp_path / "out.onnx").graph.initializers.values())[-1].const_value
    assert last.offset > 1 << 31
    x = np.random.default_rng(1).standard_normal((1, large_file.WIDTH)).astype(np.float32)
    one, other = (run(str(tmp_path / name), x0=x)[0] for name in ("in.onnx", "out.onnx"))
    assert np.isfinite(one).all() and np.array_equal(one, other)
