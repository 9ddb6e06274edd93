"""What ONNX Runtime makes of the weights when it loads a model, seen in a fresh process."""

import json

import numpy as np
import onnx_ir as ir
import pytest
from graphs import build, normal
from test_audit import TIES, export, record
from test_resident import tied
from typer.testing import CliRunner

from ffmerge.__main__ import app
from ffmerge.passes.graph.audit import audit
from ffmerge.passes.graph.run import share_file, share_model
from ffmerge.runtime_tests.loaded import look


@pytest.fixture
def command(monkeypatch):
    """Run ``ffmerge audit``; return its exit code and JSON."""

    def call(path, *options):
        result = CliRunner().invoke(app, ["audit", str(path), "--json", *options])
        return result.exit_code, json.loads(result.stdout)

    return call


def test_the_transposes_of_a_tied_ffn_are_seen_and_gone_after_share(tmp_path, command):
    path = tmp_path / "raw.onnx"
    export(path, wide=256, optimize=False)
    record(path, TIES)
    code, found = command(path)
    assert (code, found["basis"], found["basis_reason"]) == (1, "loaded", "")
    named = {entry["name"]: entry for entry in found["unshared_at_load"]}
    size = 64 * 256 * 4
    assert set(named) == {
        t.name.replace("layers.1", "layers.3") for t in TIES if "weight" in t.name
    }
    for entry in named.values():
        assert (entry["copies"], entry["bytes"], len(entry["nodes"])) == (3, 2 * size, 3)
        assert "makes 3 tensors of it on loading" in entry["reason"]
    target = tmp_path / "shared.onnx"
    share_file(path, target)
    code, after = command(target)
    assert (code, after["basis"], after["unshared_at_load"]) == (0, "loaded", [])
    assert after["memory"]["shared.onnx"].keys() == {"rss_bytes", "anonymous_bytes", "freed_bytes"}


@pytest.mark.parametrize(
    ("text", "copies", "extra"),
    [
        # each constant of 16 x 16 floats is 1,024 bytes
        ("t = Transpose(W) a = MatMul(x, t) y = MatMul(a, W)", 2, 1024),
        ("t = Transpose(W) a = MatMul(x, t) u = Transpose(W) y = MatMul(a, u)", 2, 1024),
        ("r = Reshape(W, S) a = MatMul(x, r) y = MatMul(a, W)", 2, 1024),
        ("h = Cast<to=10>(W) f = Cast<to=1>(h) a = MatMul(x, f) y = MatMul(a, W)", 2, 1024),
        ("k = Add(W, W) a = MatMul(x, k) y = MatMul(a, W)", 2, 1024),
        ("k = Neg(W) a = MatMul(x, k) y = MatMul(a, k)", 1, 0),
        ("i = Identity(W) a = MatMul(x, i) y = MatMul(a, W)", 1, 0),
        ("s = Shape(x) r = Reshape(W, s) a = MatMul(x, W) y = Add(a, r)", 1, 0),
    ],
)
def test_the_constants_in_a_weights_place_are_counted(tmp_path, text, copies, extra):
    model = build(
        f"(float[n,16] x) => (float[n,16] y) {{{text}}}", W=normal(16, 16), S=np.array([16, 16])
    )
    ir.save(model, tmp_path / "m.onnx")
    found = [(u.name, u.copies, u.bytes) for u in look(tmp_path / "m.onnx").unshared]
    assert found == ([("W", copies, extra)] if extra else [])


@pytest.mark.parametrize(
    ("text", "copies"),
    [
        ("u = Slice(f, o, h) v = Slice(f, h, e) a = MatMul(l, u) b = MatMul(r, v)", 0),
        ("t = Neg(f) a = MatMul(x, f) b = MatMul(x, t)", 2),
    ],
)
def test_codes_are_there_once_where_their_floats_are(tmp_path, text, copies):
    """Two halves are one weight, as floats too; a whole beside its negative are two."""
    halves = {"o": np.array([0]), "h": np.array([32]), "e": np.array([64])}
    model = build(
        "(float[n,64] x, float[n,32] l, float[n,32] r) => (float[n,64] y) {"
        f"f = Cast<to=1>(W) {text} y = Add(a, b) }}",
        W=np.rint(40 * normal(64, 64)).astype(np.int8), **halves,
    )  # fmt: skip
    ir.save(model, tmp_path / "m.onnx")
    found = [(u.name, u.copies, u.bytes) for u in look(tmp_path / "m.onnx").unshared]
    assert found == ([("W", copies, 2 * 16384 - 4096)] if copies else [])


def test_copies_the_file_itself_has_are_not_the_runtimes(tmp_path):
    model = build(
        "(float[2,32] x) => (float[2,32] y) {a = MatMul(x, W) b = MatMul(a, V) y = MatMul(b, U)}",
        W=normal(32, 32), V=normal(32, 32), U=normal(32, 32).T.copy(),
    )  # fmt: skip
    ir.save(model, tmp_path / "m.onnx", external_data="data")
    assert look(tmp_path / "m.onnx").unshared == ()
    assert len(audit(tmp_path / "m.onnx", look).duplicates) == 2


def test_a_weight_packed_and_kept_shows_in_memory(tmp_path):
    model = tied().clone()
    share_model(model, resident=False)
    weight = model.graph.initializers["W"]
    weight.const_value = ir.tensor(normal(100_000, 64), name="W")  # 25.6 MB
    weight.shape = weight.const_value.shape
    widen(model)
    ir.save(model, tmp_path / "m.onnx", external_data="data")
    loaded = look(tmp_path / "m.onnx")
    assert [(u.name, u.copies, u.bytes) for u in loaded.unshared] == [("W", 2, 25_600_000)]
    assert loaded.rss_bytes > 1.9 * 25_600_000
    share_file(tmp_path / "m.onnx", tmp_path / "shared.onnx")
    loaded = look(tmp_path / "shared.onnx")
    assert loaded.unshared == () and loaded.rss_bytes < 1.1 * 25_600_000


def widen(model):
    """The graph of 5,000 rows, for 100,000."""
    for value in model.graph.initializers.values():
        if value.name.startswith("ffmerge.int64.5000"):
            value.const_value = ir.tensor(np.array([100_000]), name=value.name)
    model.graph.outputs[0].shape = ir.Shape([2, 3, 100_000])


def test_a_model_that_does_not_load_is_read(tmp_path, command):
    model = build(
        """(float[2,4] x) => (float[2,4] y) {
        t = Transpose(W) a = MatMul(x, t) b = MatMul(a, W) y = Relu(b)}""",
        W=normal(4, 4),
    )
    model.graph.node("n3").domain = "custom"
    model.opset_imports["custom"] = 1
    ir.save(model, tmp_path / "m.onnx")
    code, found = command(tmp_path / "m.onnx")
    assert (code, found["basis"], found["memory"]) == (0, "graph", {})
    assert "ONNX Runtime does not load the model" in found["basis_reason"]
    code, found = command(tmp_path / "m.onnx", "--no-load")
    assert (code, found["basis"], found["basis_reason"]) == (0, "graph", "not loaded")
