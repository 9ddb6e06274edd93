"""The graph in ONNX Runtime's format and with packed weights: same results, nothing twice."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from graphs import build, normal, run
from packages import linear_package
from tiny import gpt2, vit

import ffmerge.__main__ as command_line
from ffmerge.config import ExportConfig, MergeConfig, ShareConfig
from ffmerge.errors import ExportError, InputError, TieError
from ffmerge.exporter import ort_format
from ffmerge.exporter.ort_format import check_same, write_ort
from ffmerge.exporter.package import Package, export
from ffmerge.exporter.prepack import write_packed, write_prepacked
from ffmerge.models import checkpoint
from ffmerge.models.manifest import GraphRecord, Manifest, Variant
from ffmerge.models.probe import Probe
from ffmerge.passes.graph.audit import audit
from ffmerge.passes.graph.run import share_file
from ffmerge.passes.graph.write import write_models
from ffmerge.passes.weights.merge import merge_
from ffmerge.runtime_tests.footprint import measure_footprint


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Package:
    """GPT-2 with a tied head and four merged sublayers, with both variants."""
    model = gpt2(128, 512)
    random = np.random.default_rng(0)
    ids = random.integers(0, 97, (8, 13))
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    merge_(model, inputs, MergeConfig(window=(1, 4), method="permute"))
    target = tmp_path_factory.mktemp("variants") / "package"
    return export(model, target, ExportConfig(ort=True, prepack=True))


def test_the_manifest_names_the_variants_and_the_package_stays_whole(package):
    manifest = Manifest.read(package.path)
    assert manifest.variants == (
        Variant("ort", "model.ort", True, "model.onnx"),
        Variant("prepacked", "prepacked/model.onnx", False, "model.onnx"),
    )
    manifest.check_files(package.path)
    listed = {file.path for file in manifest.files}
    assert {"model.ort", "required_operators.config", "prepacked/model.onnx_data"} <= listed
    assert audit(package.path).ok
    value = json.loads((package.path / "ffmerge.json").read_text())
    del value["variants"]  # as written before there were any
    (package.path / "ffmerge.json").write_text(json.dumps(value))
    assert Manifest.read(package.path).variants == ()
    manifest.write(package.path)


@pytest.mark.parametrize("variant", ["model.ort", "prepacked/model.onnx"])
def test_a_variant_computes_the_same(package, variant):
    for case in range(len(package.manifest.graphs[0].probe.cases)):
        feeds = package.manifest.graphs[0].probe.draw(case)
        one, two = (run(str(package.path / name), **feeds) for name in ("model.onnx", variant))
        for a, b in zip(one, two, strict=True):
            assert np.abs(a - b).max() < 1e-5  # measured 2.4e-7


def test_shared_weights_stay_once_in_the_ort_file(package):
    """Three more copies of a sublayer would be 1.6 MB."""
    written = (package.path / "model.ort").stat().st_size
    assert written < package.manifest.parameter_bytes * 1.02 + 200_000


def test_every_operator_of_the_file_is_listed(package, tmp_path):
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "same.onnx")
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    ort.InferenceSession(package.path / "model.ort", options)
    needed = {node.op_type for node in onnx.load(tmp_path / "same.onnx").graph.node}
    lines = (package.path / "required_operators.config").read_text().splitlines()
    assert "/" not in "".join(lines)  # no path of the machine it was made on
    entries = [line.split(";") for line in lines if not line.startswith("#")]
    assert all(len(entry) == 3 and entry[1].isdigit() for entry in entries)
    assert {entry[0] for entry in entries} == {"ai.onnx"}  # no fused operator of one processor
    assert {op for entry in entries for op in entry[2].split(",")} == needed


def test_a_weight_that_would_be_stored_twice_is_refused(tmp_path):
    """Two reads through different transposes: folded, they are two tensors."""
    w = normal(64, 64, 64)
    text = """(float[64,64,64] x) => (float[64,64,64] a, float[64,64,64] b, float[64,64,64] c) {
        t = Transpose<perm=[1,0,2]>(W) u = Transpose<perm=[2,1,0]>(W)
        a = Mul(x, t) b = Mul(x, u) c = Mul(x, W)}"""
    write_models({tmp_path / "m.onnx": build(text, W=w)}, tmp_path / "m.onnx_data")
    with pytest.raises(TieError, match="stored twice"):
        write_ort(tmp_path, [GraphRecord("m.onnx", (), Probe((), ()))])


def test_more_than_the_format_holds_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(ort_format, "PROTOBUF_LIMIT", 1000)
    manifest = linear_package(tmp_path / "p", normal(64, 64), normal(64))
    with pytest.raises(InputError, match="more than 2 GB"):
        write_ort(tmp_path / "p", manifest.graphs)
    assert not (tmp_path / "p" / "model.ort").exists()


def test_another_result_is_refused(tmp_path):
    for name, seed in (("one", 0), ("two", 1)):
        manifest = linear_package(tmp_path / name, normal(64, 64, seed=seed), normal(64))
    paths = [tmp_path / name / "model.onnx" for name in ("one", "two")]
    check_same(paths[0], paths[0], manifest.graphs[0])
    with pytest.raises(ExportError, match="does not compute"):
        check_same(*paths, manifest.graphs[0])


@pytest.mark.parametrize(("dtype", "holds"), [("fp32", False), ("int8", True), ("fp16", True)])
def test_rounding_is_no_other_result(dtype, holds, tmp_path):
    """In fewer bits a last bit may turn what is rounded; in float32 a percent is another weight."""
    weight = normal(64, 64)
    paths = []
    for name, scale in (("one", 1), ("two", 1.01), ("other", -1)):
        manifest = linear_package(tmp_path / name, scale * weight, normal(64))
        paths.append(tmp_path / name / "model.onnx")
        if dtype != "fp32":
            share_file(paths[-1], paths[-1].with_name("less.onnx"), ShareConfig(dtype=dtype))
            paths[-1] = paths[-1].with_name("less.onnx")
    check_same(paths[0], paths[0], manifest.graphs[0])
    with pytest.raises(ExportError, match="does not compute"):
        check_same(paths[0], paths[2], manifest.graphs[0])
    if holds:
        check_same(paths[0], paths[1], manifest.graphs[0])
    else:
        with pytest.raises(ExportError, match="does not compute"):
            check_same(paths[0], paths[1], manifest.graphs[0])


@pytest.mark.skipif(
    not Path("/proc/self/smaps_rollup").exists(), reason="this system has no smaps_rollup"
)
def test_packed_weights_stay_in_the_file(tmp_path):
    """A weight of 17 MB: packed at load it is anonymous memory, packed in the file it is not."""
    folder = tmp_path / "p"
    manifest = linear_package(folder, normal(2048, 2048), normal(2048))
    (variant,) = write_prepacked(folder, manifest.graphs)
    replace(manifest, variants=(variant,)).write(folder)
    plain, packed = (measure_footprint(folder, kind=kind) for kind in ("onnx", "prepacked"))
    weight = 4 * 2048**2
    assert plain.anonymous_bytes > 0.9 * weight
    assert packed.anonymous_bytes < 0.1 * weight
    sizes = [
        Path(folder / path).stat().st_size for path in ("model.onnx_data", f"{variant.path}_data")
    ]
    assert sizes[1] > 1.9 * sizes[0]


def test_the_command_tells_what_packing_costs(tmp_path, monkeypatch, capsys):
    checkpoint.save(vit(64, 256), tmp_path / "vit")
    out = tmp_path / "package"
    line = ["ffmerge", "export", str(tmp_path / "vit"), str(out), "--ort", "--prepack"]
    monkeypatch.setattr("sys.argv", [*line, "--json"])
    with pytest.raises(SystemExit) as ended:
        command_line.main()
    assert not ended.value.code
    found = json.loads(capsys.readouterr().out)
    assert [v["portable"] for v in found["variants"]] == [True, False]
    assert list(found["costs"]) == ["onnx", "ort", "prepacked"]
    for path, cost in zip(
        ("model.onnx", "model.ort", "prepacked/model.onnx"), found["costs"].values(), strict=True
    ):
        files = [out / path, out / f"{path}_data"]
        assert cost["bytes"] == sum(file.stat().st_size for file in files if file.exists())
        assert cost["load_s"] > 0 and cost["median_ms"] > 0


def test_packed_weights_lie_at_whole_lines(tmp_path):
    """Behind 1,040 bytes they would not, and the kernel would end the process."""
    x, first, weight = normal(3, 16), normal(3, 260), normal(16, 16)
    model = build(
        """(float[3,16] x) => (float[3,260] z, float[3,16] y) {
        s = ReduceSum <keepdims = 0> (x)  z = Add (s, A)  y = MatMul (x, W) }""",
        A=first, W=weight,
    )  # fmt: skip
    graph, packed = tmp_path / "model.onnx", tmp_path / "prepacked" / "model.onnx"
    packed.parent.mkdir()
    ir.save(model, graph)
    write_packed(graph, packed)
    tensors = {t.name: t for t in onnx.load(packed, load_external_data=False).graph.initializer}
    places = {e.key: e.value for e in tensors["W"].external_data}
    places["packed"] = places.pop("prepacked_0").split("|")[1].split(";")[0]
    assert int(places["offset"]) % 64 == int(places["packed"]) % 64 == 0
    data = (packed.parent / "model.onnx_data").read_bytes()
    assert data[int(places["offset"]) :][: weight.nbytes] == weight.tobytes()
    for got, expected in zip(run(str(packed), x=x), (x.sum() + first, x @ weight), strict=True):
        # measured 2.4e-7
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
