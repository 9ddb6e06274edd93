"""What ``share`` wrote and ONNX Runtime does not load is not kept."""

import os
import signal
import subprocess
import sys

import onnx_ir as ir
import pytest
from graphs import build, normal

from ffmerge.config import ShareConfig
from ffmerge.errors import CheckFailed
from ffmerge.passes.graph import loads, run
from ffmerge.passes.graph.loads import refusal

PRODUCT = "(float[n,600] x) => (float[n,600] y) { y = MatMul(x, W) }"


@pytest.fixture
def source(tmp_path):
    ir.save(build(PRODUCT, W=normal(600, 600)), tmp_path / "in.onnx")
    return tmp_path / "in.onnx"


def broken(model, *given):
    """Share, and name an operator that no runtime has, as a wrong pass would."""
    result = share_model(model, *given)
    model.graph[0].op_type = "Product"
    return result


share_model = run.share_model


@pytest.mark.parametrize("external", [False, True], ids=["one file", "with data"])
def test_a_file_that_does_not_load_is_not_kept(source, monkeypatch, external):
    if external:
        ir.save(ir.load(source), source, external_data="in.data")
    before = sorted(source.parent.iterdir())
    monkeypatch.setattr(run, "share_model", broken)
    with pytest.raises(CheckFailed, match=r"but not what became of it.*Product") as error:
        run.share_file(source, source.with_name("out.onnx"))
    assert "\n" not in str(error.value) and "partial" not in str(error.value)
    assert sorted(source.parent.iterdir()) == before
    run.share_file(source, source.with_name("out.onnx"), load=False)
    assert "Product" in refusal(source.with_name("out.onnx"))


def test_a_file_that_the_runtime_dies_of_is_not_kept(source, monkeypatch):
    kill = f"os.kill(os.getpid(), {signal.SIGSEGV:d})"
    dies = f"import os, sys\nif sys.argv[1].endswith('out.onnx'): {kill}"
    monkeypatch.setattr(loads, "_LOAD", dies)
    with pytest.raises(CheckFailed, match=f"it died of signal {signal.SIGSEGV:d}"):
        run.share_file(source, source.with_name("out.onnx"))
    assert os.listdir(source.parent) == ["in.onnx"]


def test_what_the_runtime_did_not_take_before_is_no_failure(source):
    model = ir.load(source)
    model.graph[0].op_type, model.graph[0].domain = "Product", "nobody.knows"
    model.opset_imports["nobody.knows"] = 1
    ir.save(model, source)
    assert refusal(source)
    run.share_file(source, source.with_name("out.onnx"))
    assert source.with_name("out.onnx").exists()


def test_the_command_exits_with_1(source):
    code = (
        "import sys, ffmerge.__main__ as m\n"
        "from ffmerge.passes.graph import loads\n"
        "loads.refusal = lambda path: 'no' if path.name == 'out.onnx' else None\n"
        "m.main(['share', *sys.argv[1:]])"
    )
    words = [sys.executable, "-c", code, str(source), str(source.with_name("out.onnx"))]
    done = subprocess.run([*words, "--dtype", "int8"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("ffmerge: ONNX Runtime loads ") and "Traceback" not in done.stderr
    assert os.listdir(source.parent) == ["in.onnx"]


def test_every_precision_of_a_plain_file_passes(source):
    for dtype in ("int8", "int4", "fp16"):
        target = source.with_name(f"{dtype}.onnx")
        assert run.share_file(source, target, ShareConfig(dtype=dtype)).files
