"""Files made to read what is not theirs, and broken ones, are refused in one sentence."""

import gc
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphs import build, normal, run
from onnx import TensorProto, helper
from packages import linear_package

from ffmerge.errors import InputError
from ffmerge.files import open_inside
from ffmerge.models.manifest import Manifest, Variant
from ffmerge.passes.graph.audit import audit
from ffmerge.passes.graph.read import MappedTensor, read_model
from ffmerge.passes.graph.run import share_file
from ffmerge.passes.graph.tensors import values_of
from ffmerge.runtime_tests.validate import validate

SECRET = np.full((8, 8), 7, np.float32).tobytes()


def attack(folder: Path, location: str) -> Path:
    """Return a model in ``folder/model`` whose weight is read from ``location``."""
    (folder / "model" / "sub").mkdir(parents=True)
    (folder / "secret").write_bytes(SECRET)
    (folder / "model" / "good").write_bytes(SECRET)
    weight = TensorProto(name="W", data_type=TensorProto.FLOAT, dims=[8, 8])
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value=location)
    model = build("(float[8] x) => (float[8] y) {y = MatMul(x, W)}", W=normal(8, 8))
    proto = ir.to_proto(model)
    proto.graph.initializer[0].CopyFrom(weight)
    path = folder / "model" / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


def refused(path: Path, message: str) -> None:
    """Neither command reads it; nothing is written, nothing is changed."""
    before = {p: p.read_bytes() for p in path.parent.rglob("*") if p.is_file()}
    for command in (audit, lambda p: share_file(p, p.with_name("out.onnx"))):
        with pytest.raises(InputError) as caught:
            command(path)
        assert message in str(caught.value) and "\n" not in str(caught.value)
        assert str(path) in str(caught.value)
    assert {p: p.read_bytes() for p in path.parent.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    "location",
    ["../secret", "/etc/hostname", "sub/../../secret", "C:/secret", "//host/secret"],
)
def test_cve_2022_25882_directory_traversal(tmp_path, location):
    refused(attack(tmp_path, location), "is outside the folder")


@pytest.mark.parametrize("location", ["junk/../../secret", "./junk/../../secret", "..", "sub/.."])
def test_cve_2024_27318_traversal_behind_a_folder(tmp_path, location):
    refused(attack(tmp_path, location), "is outside the folder")


@pytest.mark.parametrize("location", [r"..\secret", "sub\\..\\..\\secret", "good\0", "", "."])
def test_cve_2024_27318_other_spellings(tmp_path, location):
    refused(attack(tmp_path, location), "forward slashes")


@pytest.mark.parametrize("target", ["../secret", "good"])
def test_cve_2026_27489_a_symlink(tmp_path, target):
    path = attack(tmp_path, "link")
    (path.parent / "link").symlink_to(target)
    refused(path, "is or is below a link")


@pytest.mark.parametrize("target", ["..", "sub"])
def test_cve_2026_27489_a_symlink_in_a_parent(tmp_path, target):
    path = attack(tmp_path, "link/secret")
    (path.parent / "sub" / "secret").write_bytes(SECRET)
    (path.parent / "link").symlink_to(target)
    refused(path, "is or is below a link")


def test_cve_2026_34446_a_hard_link(tmp_path):
    path = attack(tmp_path, "hard")
    (path.parent / "hard").hardlink_to(tmp_path / "secret")
    refused(path, "is a hard link")


def test_what_is_no_file_is_refused_without_waiting(tmp_path):
    path = attack(tmp_path, "pipe")
    os.mkfifo(path.parent / "pipe")
    with pytest.raises(InputError, match="is not a file"):
        audit(path)
    (path.parent / "pipe").unlink()
    (path.parent / "pipe").mkdir()
    with pytest.raises(InputError, match="is not a file"):
        audit(path)


def test_a_swap_after_the_check_has_no_effect(tmp_path):
    path = attack(tmp_path, "good")
    model = read_model(path)
    (path.parent / "good").unlink()
    (path.parent / "good").symlink_to("../secret")
    (tmp_path / "secret").write_bytes(bytes(len(SECRET)))
    tensor = model.graph.initializers["W"].const_value
    assert isinstance(tensor, MappedTensor) and values_of(tensor).tobytes() == SECRET
    assert tensor.tobytes() == SECRET


def test_a_swap_between_check_and_open_is_refused(tmp_path, monkeypatch):
    """A folder that becomes a link before it is opened is not followed."""
    path = attack(tmp_path, "sub/secret")
    (path.parent / "sub" / "secret").write_bytes(SECRET)
    opened = os.open

    def swap(name: object, *arguments: object, **options: object) -> int:
        if name == "sub":
            shutil.rmtree(path.parent / "sub")
            (path.parent / "sub").symlink_to("..")
        return opened(name, *arguments, **options)

    monkeypatch.setattr(os, "open", swap)
    with pytest.raises(InputError, match="is or is below a link"):
        open_inside(path.parent, "sub/secret")


def test_descriptors_are_closed(tmp_path):
    path = attack(tmp_path, "good")
    gc.collect()  # models of other tests
    before = len(os.listdir("/proc/self/fd"))
    model = read_model(path)
    assert len(os.listdir("/proc/self/fd")) == before + 1
    del model
    gc.collect()
    (path.parent / "link").symlink_to("good")
    for location in ("link", "gone", "sub", "sub/gone"):
        with pytest.raises(InputError):
            os.close(open_inside(path.parent, location))
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_manifest_notices_a_data_file_cut_or_swapped(tmp_path):
    manifest = linear_package(tmp_path / "p", normal(4, 3), normal(3))
    data = tmp_path / "p" / "model.onnx_data"
    content = data.read_bytes()
    manifest.check_files(tmp_path / "p")
    for other in (content[:-1], content + b"0", content[::-1]):
        data.write_bytes(other)
        with pytest.raises(InputError, match=r"model\.onnx_data is not the file"):
            manifest.check_files(tmp_path / "p")
    data.rename(tmp_path / "data")
    data.symlink_to("../data")
    with pytest.raises(InputError, match="is or is below a link"):
        manifest.check_files(tmp_path / "p")
    data.unlink()
    (tmp_path / "data").write_bytes(content)
    data.hardlink_to(tmp_path / "data")
    with pytest.raises(InputError, match="is a hard link"):
        manifest.check_files(tmp_path / "p")
    data.unlink()
    with pytest.raises(InputError, match="is missing"):
        manifest.check_files(tmp_path / "p")
    files = [{**vars(manifest.files[0]), "path": "junk/../../data"}]
    outside = Manifest(**{**vars(manifest), "files": (type(manifest.files[0])(**files[0]),)})
    with pytest.raises(InputError, match="is outside"):
        outside.check_files(tmp_path / "p")


def write(tmp_path: Path, proto: onnx.ModelProto) -> Path:
    path = tmp_path / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


def test_a_cycle(tmp_path):
    proto = ir.to_proto(build("(float[4] x) => (float[4] y) {a = Relu(x) b = Relu(a) y = Relu(b)}"))
    proto.graph.node[0].input[0] = "b"
    refused(write(tmp_path, proto), "cycle")


@pytest.mark.parametrize("what", ["initializer", "value", "both", "inner"])
def test_a_name_given_twice(tmp_path, what):
    proto = ir.to_proto(
        build("(float[4] x) => (float[4] y) {a = Add(x, W) y = Relu(a)}", W=normal(4))
    )
    if what == "initializer":
        proto.graph.initializer.add().CopyFrom(proto.graph.initializer[0])
    elif what == "value":
        proto.graph.node[1].output.append("a")
    elif what == "both":
        proto.graph.node.append(helper.make_node("Relu", ["x"], ["W"]))
    else:
        output = helper.make_tensor_value_info("z", TensorProto.FLOAT, [4])
        twice = [helper.make_node("Relu", ["x"], ["z"]) for _ in "12"]
        body = helper.make_graph(twice, "body", [], [output])
        node = helper.make_node("If", ["c"], ["u"], then_branch=body, else_branch=body)
        proto.graph.node.append(node)
    refused(write(tmp_path, proto), "defined twice")


def test_an_unknown_domain_passes_untouched(tmp_path):
    w = normal(64, 64)
    text = "(float[2,64] x) => (float[2,64] y) {a = Relu(x) b = Relu(a) y = Add(b, V)}"
    proto = ir.to_proto(build(text, W=w, V=w))
    proto.opset_import.add(domain="com.example", version=3)
    node = proto.graph.node[1]
    node.op_type, node.domain = "Mystery", "com.example"
    node.input.append("W")
    node.attribute.append(helper.make_attribute("k", 3))
    assert not audit(write(tmp_path, proto)).ok
    share_file(tmp_path / "m.onnx", tmp_path / "out.onnx")
    after = onnx.load(tmp_path / "out.onnx").graph
    (mystery,) = [n for n in after.node if n.op_type == "Mystery"]
    assert mystery.domain == "com.example" and mystery.attribute[0].i == 3
    assert [t.name for t in after.initializer] == ["W"] and mystery.input[1] == "W"


def test_an_opset_from_the_future(tmp_path):
    """Audit reads it; share would rewrite operators whose meaning it does not know."""
    proto = ir.to_proto(build("(float[64] x) => (float[64] y) {y = Add(x, W)}", W=normal(64)))
    proto.opset_import[0].version = 99
    path = write(tmp_path, proto)
    assert audit(path).ok
    with pytest.raises(InputError, match="opset 99 is newer"):
        share_file(path, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


def test_zero_size_and_scalar_tensors(tmp_path):
    """Also as external data, where a length of 0 cannot be mapped."""
    text = """(float[4] x) => (float[4] y, float[N] e, float[N] f) {
        a = Add(x, S) y = Add(a, T) e = Relu(E) f = Relu(F)}"""
    scalar, empty = np.float32(1.5), np.zeros(0, np.float32)
    model = build(text, S=scalar, T=scalar, E=empty, F=empty)
    onnx.save(
        ir.to_proto(model), tmp_path / "m.onnx", save_as_external_data=True, location="d",
        size_threshold=0,
    )  # fmt: skip
    assert audit(tmp_path / "m.onnx").bytes_duplicate == 4
    share_file(tmp_path / "m.onnx", tmp_path / "out.onnx")
    y, e, f = run(str(tmp_path / "out.onnx"), x=np.ones(4, np.float32))
    assert np.array_equal(y, np.full(4, 4, np.float32)) and e.size == f.size == 0


@pytest.mark.parametrize("kind", ["graphs", "variants"])
def test_a_manifest_that_names_what_is_none_of_its_files_is_refused(tmp_path, kind):
    """Graphs and variants are opened by their path: what is not checked by its hash is not."""
    folder = tmp_path / "p"
    manifest = linear_package(folder, normal(4, 3), normal(3))
    (tmp_path / "secret").mkdir()
    for name in ("model.onnx", "model.onnx_data"):
        shutil.copyfile(folder / name, tmp_path / "secret" / name)
    outside = "../secret/model.onnx"
    if kind == "graphs":
        changed = replace(manifest, graphs=(replace(manifest.graphs[0], path=outside),))
    else:
        changed = replace(manifest, variants=(Variant("ort", outside, True, "model.onnx"),))
    changed.write(folder)
    with pytest.raises(InputError, match="is none of its files"):
        validate(folder)
    assert not (folder / "validation.json").exists()
