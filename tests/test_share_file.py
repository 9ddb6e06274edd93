"""Files are shared whole or not at all, large ones too, and to the same bytes every time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphs import TWO_LAYERS, build, normal, run

import ffmerge
from ffmerge.errors import InputError, TieError
from ffmerge.passes.graph.run import share_file


def test_a_file_small_and_large(tmp_path):
    w = normal(64, 64)
    onnx.save(
        ir.to_proto(build(TWO_LAYERS, W1=w, B1=normal(64), W2=w, B2=normal(64))),
        tmp_path / "in.onnx",
    )
    feed = normal(2, 64, seed=2)
    before = run(str(tmp_path / "in.onnx"), x=feed)
    result = share_file(tmp_path / "in.onnx", tmp_path / "out" / "small.onnx")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["small.onnx"]
    assert result.bytes_after == (64 * 64 + 64) * 4
    assert np.array_equal(before, run(str(tmp_path / "out" / "small.onnx"), x=feed))

    large = normal(512, 512)
    text = TWO_LAYERS.replace("64", "512")
    onnx.save(
        ir.to_proto(build(text, W1=large, B1=normal(512), W2=large, B2=normal(512))),
        tmp_path / "large.onnx",
    )
    share_file(tmp_path / "large.onnx", tmp_path / "out" / "large.onnx")
    data = tmp_path / "out" / "large.onnx_data"
    assert data.stat().st_size == (512 * 512 + 512) * 4  # one weight, one bias, nothing else
    assert data.stat().st_mode & 0o777 == (tmp_path / "large.onnx").stat().st_mode & 0o777
    feed = normal(2, 512, seed=2)
    assert np.array_equal(
        run(str(tmp_path / "large.onnx"), x=feed), run(str(tmp_path / "out" / "large.onnx"), x=feed)
    )
    # external stays external, however small, and is read from where it was
    share_file(tmp_path / "out" / "large.onnx", tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx_data").read_bytes() == data.read_bytes()


def test_a_transposed_external_weight(tmp_path):
    w = normal(60, 50)
    text = """(float[2,50] x) => (float[2,60] a, float[2,60] b) {
        t = Transpose(W)  a = MatMul(x, t)  u = Transpose(W)  b = MatMul(x, u)}"""
    onnx.save(
        ir.to_proto(build(text, W=w)),
        tmp_path / "in.onnx",
        save_as_external_data=True,
        location="d",
    )
    share_file(tmp_path / "in.onnx", tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx_data").read_bytes() == w.T.tobytes(order="C")
    feed = normal(2, 50, seed=1)
    assert np.array_equal(
        run(str(tmp_path / "in.onnx"), x=feed), run(str(tmp_path / "out.onnx"), x=feed)
    )


def test_nothing_is_overwritten_and_nothing_left_behind(tmp_path, monkeypatch):
    model = build(
        TWO_LAYERS, W1=normal(64, 64), B1=normal(64), W2=normal(64, 64, seed=1), B2=normal(64)
    )
    source = tmp_path / "in.onnx"
    onnx.save(ir.to_proto(model), source)
    content = source.read_bytes()
    with pytest.raises(InputError, match="exists already"):
        share_file(source, source)
    (tmp_path / "out.onnx_data").write_bytes(b"")
    with pytest.raises(InputError, match=r"out\.onnx_data exists already"):
        share_file(source, tmp_path / "out.onnx")
    (tmp_path / "out.onnx_data").unlink()

    model.metadata_props["ffmerge.ties"] = json.dumps([{"name": "W1", "members": ["W1", "gone"]}])
    onnx.save(ir.to_proto(model), tmp_path / "tied.onnx")
    with pytest.raises(TieError):
        share_file(tmp_path / "tied.onnx", tmp_path / "out.onnx")

    del model.metadata_props["ffmerge.ties"]
    onnx.save(ir.to_proto(model), tmp_path / "ext.onnx", save_as_external_data=True, location="d")
    replace = os.replace

    def full(one, other):
        if other == tmp_path / "out.onnx":  # after the data is in place
            raise OSError(28, "No space left on device")
        replace(one, other)

    monkeypatch.setattr("ffmerge.passes.graph.write.os.replace", full)
    with pytest.raises(InputError, match="No space left on device"):
        share_file(tmp_path / "ext.onnx", tmp_path / "out.onnx")
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == ["d", "ext.onnx", "in.onnx", "tied.onnx"]
    assert source.read_bytes() == content


def test_the_same_bytes_under_any_hash_seed(tmp_path):
    w = normal(512, 600)
    text = """(float[2,3,512] x) => (float[2,3,600] y, float[2,3,600] z, float[512,600] s) {
        y = MatMul(x, W)  t = Transpose(V)  z = MatMul(x, t)  a = Relu(U)  s = Add(a, K)}"""
    k = np.float32(1.5)
    onnx.save(ir.to_proto(build(text, V=w.T.copy(), W=w, U=w, K=k)), tmp_path / "in.onnx")
    code = "import sys, pathlib; from ffmerge.passes.graph.run import share_file; "
    code += "share_file(*map(pathlib.Path, sys.argv[1:]))"
    paths = [str(Path(ffmerge.__file__).parents[1]), *sys.path]
    for seed in "12":
        (tmp_path / seed).mkdir()
        subprocess.run(
            [sys.executable, "-c", code, tmp_path / "in.onnx", tmp_path / seed / "m.onnx"],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(paths)},
            check=True,
        )
    for name in ("m.onnx", "m.onnx_data"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
    assert (tmp_path / "1" / "m.onnx_data").stat().st_size == w.nbytes


def test_the_public_verb_takes_files_and_models(tmp_path: Path) -> None:
    """``ffmerge.share`` is the command's: a file to a file, or a model where it is."""
    weight = normal(40, 40)
    text = "(float[2,40] x) => (float[2,40] y) { z = MatMul(x, W) y = MatMul(z, V) }"
    model = build(text, W=weight, V=weight)
    ir.save(model, tmp_path / "in.onnx")
    found = ffmerge.share(model)
    assert (found.bytes_before, found.bytes_after) == (2 * weight.nbytes, weight.nbytes)
    made = ffmerge.share(tmp_path / "in.onnx", tmp_path / "out.onnx", ffmerge.ShareConfig())
    assert made.bytes_after == weight.nbytes and made.files == (tmp_path / "out.onnx",)
    with pytest.raises(InputError, match="name it"):
        ffmerge.share(tmp_path / "in.onnx")
    with pytest.raises(InputError, match="keeps its opset"):
        ffmerge.share(model, config=ffmerge.ShareConfig(opset=17))
