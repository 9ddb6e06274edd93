"""What audit says of exporters' files, of broken ones, and of the same after ``share``."""

import json
import resource
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from graphs import build, normal, run
from transformers import ViTConfig, ViTForImageClassification

from ffmerge.errors import InputError
from ffmerge.models import manifest
from ffmerge.models.record import Tie
from ffmerge.passes.graph.audit import audit
from ffmerge.passes.graph.contract import write_ties
from ffmerge.passes.graph.run import share_file

FFN = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
TIES = [
    Tie(f"vit.layers.1.mlp.{name}", tuple(f"vit.layers.{i}.mlp.{name}" for i in (1, 2, 3)))
    for name in FFN
]


def export(path: Path, wide: int, optimize: bool, separate: bool = False) -> torch.Tensor:
    """Export a ViT of 4 layers whose layers 1 to 3 share a 64 x ``wide`` FFN; return an input.

    ``separate`` gives the three layers equal parameters instead of the same ones.
    """
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=64, intermediate_size=wide, num_hidden_layers=4, num_attention_heads=4,
        image_size=16, patch_size=8, num_labels=5,
    )  # fmt: skip
    model = ViTForImageClassification(config).eval()
    layers = model.vit.layers
    for layer in layers:
        for bias in (layer.mlp.fc1.bias, layer.mlp.fc2.bias):
            torch.nn.init.normal_(bias)  # zeros would be equal in all layers
    for index in (2, 3):
        if separate:
            layers[index].mlp.load_state_dict(layers[1].mlp.state_dict())
        else:
            layers[index].mlp = layers[1].mlp
    pixels = torch.randn(1, 3, 16, 16)
    torch.onnx.export(model, (pixels,), dynamo=True, optimize=optimize, verbose=False).save(path)
    return pixels


def record(path: Path, ties: list[Tie]) -> None:
    model = ir.load(path)
    write_ties(model, ties)
    ir.save(model, path)


def rescued(path: Path, pixels: torch.Tensor, atol: float = 2e-6) -> None:
    """After ``share`` the audit has nothing to say and the outputs are the same."""
    target = path.with_name("shared.onnx")
    result = share_file(path, target)
    found = audit(target)
    assert found.ok, found.to_json()
    assert found.bytes_total == found.bytes_unique == result.bytes_after
    one, other = (run(str(p), pixel_values=pixels.numpy())[0] for p in (path, target))
    assert np.abs(one - other).max() <= atol  # seen: 0.0, logits of 0.2 to 0.3


def test_transposes_of_a_large_tied_ffn_hide_its_ties(tmp_path):
    path = tmp_path / "raw.onnx"
    pixels = export(path, wide=256, optimize=False)  # 16,384 elements
    found = audit(path)
    assert (found.basis, found.basis_reason) == ("graph", "not loaded")
    assert found.unshared_at_load == ()  # what a load copies is seen by loading: test_loaded.py
    record(path, TIES)
    checks = {check.group: check for check in audit(path).ties}
    assert len(checks) == 4
    assert not checks["vit.layers.1.mlp.fc1.weight"].ok
    assert "hidden behind Transpose node" in checks["vit.layers.1.mlp.fc1.weight"].reason
    assert checks["vit.layers.1.mlp.fc1.bias"].ok
    rescued(path, pixels)


def test_copies_of_a_small_tied_ffn_are_named(tmp_path):
    path = tmp_path / "raw.onnx"
    pixels = export(path, wide=128, optimize=True)  # 8,192 elements: folded once per layer
    found = audit(path)
    sizes = [d for d in found.duplicates if d.bytes == 2 * 64 * 128 * 4]
    assert not found.ok and len(sizes) == 2  # fc1 and fc2, two copies too many of each
    assert all(len(d.names) == 3 and d.kind == "identical" for d in sizes)
    assert found.bytes_duplicate == sum(d.bytes for d in found.duplicates)
    assert found.bytes_unique == found.bytes_total - found.bytes_duplicate
    rescued(path, pixels)


def test_equal_but_separate_parameters_are_duplicates(tmp_path):
    path = tmp_path / "raw.onnx"
    pixels = export(path, wide=256, optimize=False, separate=True)
    found = audit(path)
    names = {d.names: d for d in found.duplicates}
    for tie in TIES:
        assert names[tie.members].kind == "identical"
    # two of three layers: 64 x 256 twice, biases of 256 and 64
    twice = 2 * (2 * 64 * 256 + 256 + 64) * 4
    assert sum(d.bytes for d in found.duplicates if "mlp" in d.names[0]) == twice
    record(path, TIES)
    checks = audit(path).ties
    assert [c.ok for c in checks] == [False] * 4
    assert "vit.layers.2.mlp.fc1.weight" in checks[0].reason
    rescued(path, pixels)


def test_one_transpose_is_no_copy_but_hides_the_tie(tmp_path):
    path = tmp_path / "m.onnx"
    model = build(
        "(float[2,4] x) => (float[2,4] y) {t = Transpose(W) a = MatMul(x, t) y = MatMul(a, t)}",
        W=normal(4, 4),
    )
    ir.save(model, path)
    found = audit(path)
    assert found.ok and (found.bytes_total, found.bytes_duplicate) == (64, 0)
    assert [(h.name, h.node, h.uses) for h in found.hidden] == [("W", "n0", 2)]
    record(path, [Tie("W", ("W", "V"))])
    found = audit(path)
    assert not found.ok
    reason = "W is hidden behind Transpose node n0; quantizers do not see it"
    assert json.loads(json.dumps(found.to_json()))["ties"] == [
        {"group": "W", "ok": False, "reason": reason}
    ]


def test_constants_and_transposed_pairs_count(tmp_path):
    w = normal(3, 5)
    model = build(
        """(float[2,5] x) => (float[2,5] y) {
        k = Constant<value = float[3] {1, 2, 3}>()
        a = MatMul(x, V)  b = Add(a, k)  c = Add(b, K)  y = MatMul(c, W)}""",
        W=w,
        V=w.T.copy(),
        K=np.float32([1, 2, 3]),
    )
    ir.save(model, tmp_path / "m.onnx")
    found = audit(tmp_path / "m.onnx").to_json()
    assert found["duplicates"] == (
        {"names": ("W", "V"), "bytes": 60, "kind": "transposed"},
        {"names": ("K", "k"), "bytes": 12, "kind": "identical"},
    )
    assert (found["bytes_total"], found["bytes_unique"], found["bytes_duplicate"]) == (144, 72, 72)
    assert found["ok"] is False
    json.dumps(found)


def package(folder: Path, ties: tuple[Tie, ...]) -> None:
    manifest.Manifest(
        versions={}, source={}, model_type="vit", task="t", dtype="fp32", opset=20, parameters=0,
        parameter_bytes=0, bytes_total=0, bytes_unique=0, merge=None, ties=ties, skipped=(),
        graphs=(), files=(),
    ).write(folder)  # fmt: skip


def test_a_folder_is_held_to_its_manifest(tmp_path):
    """A tool may have dropped the metadata and un-shared the tie since."""
    shared = build(
        "(float[2,4] x) => (float[2,4] y) {a = MatMul(x, W) y = MatMul(a, W)}", W=normal(4, 4)
    )
    (tmp_path / "onnx").mkdir()
    ir.save(shared, tmp_path / "onnx" / "model.onnx")
    assert audit(tmp_path).ties == ()
    package(tmp_path, (Tie("W", ("W", "V")),))
    found = audit(tmp_path)
    assert (
        found.ok and found.files == ("onnx/model.onnx",) and [t.group for t in found.ties] == ["W"]
    )

    broken = build(
        "(float[2,4] x) => (float[2,4] y) {a = MatMul(x, W) y = MatMul(a, V)}",
        W=normal(4, 4),
        V=normal(4, 4),
    )
    ir.save(broken, tmp_path / "model.onnx")
    found = audit(tmp_path)
    assert not found.ok and found.ties[0].reason == "stored 2 times: initializers W, V"
    assert found.duplicates[0].names == ("model.onnx:W", "model.onnx:V")
    package(tmp_path, (Tie("gone", ("gone",)),))
    assert audit(tmp_path).ties[0].reason == "none of its names is an initializer"


EMBED = Tie(
    "shared", ("shared", "encoder.embed", "decoder.embed", "lm_head"),
    {"encoder_model.onnx": 1, "decoder_model.onnx": 2},
)  # fmt: skip


def two_graphs(folder: Path, decoder: str = "lm_head") -> None:
    """Write an encoder that looks ``shared`` up, a decoder that also multiplies by it."""
    w = normal(64, 64)
    encoder = build("(int64[2] i) => (float[2,64] e) {e = Gather(shared, i)}", shared=w)
    both = build(
        f"(int64[2] i) => (float[2,64] y) {{e = Gather(shared, i)  y = MatMul(e, {decoder})}}",
        **{"shared": w, **({} if decoder == "shared" else {decoder: w})},
    )
    for name, model in (("encoder_model", encoder), ("decoder_model", both)):
        ir.save(model, folder / f"{name}.onnx", external_data=f"{name}.onnx_data")
    package(folder, (EMBED,))


def test_a_tie_counts_its_places_in_each_graph(tmp_path):
    two_graphs(tmp_path, "shared")
    assert [(t.group, t.ok) for t in audit(tmp_path).ties] == [("shared", True)]
    again = manifest.Manifest.read(tmp_path).ties
    assert again == (EMBED,) and again[0].places_in("decoder_model_quantized.onnx") == 1
    two_graphs(tmp_path, "other")
    reason = "shared is stored again, as it is or transposed, as other"
    assert [(t.ok, t.reason) for t in audit(tmp_path).ties] == [(False, reason)]
    package(tmp_path, (Tie("shared", EMBED.members, {**EMBED.places, "encoder_model.onnx": 2}),))
    two = audit(tmp_path / "encoder_model.onnx").ties
    assert [t.reason for t in two] == ["shared stands for 2 places but is used 1 times: n0"]


def test_copies_across_graphs_used_together(tmp_path):
    two_graphs(tmp_path, "shared")
    (tmp_path / "onnx").mkdir()
    for name in ("decoder_model_int8.onnx", "onnx/decoder_model.onnx"):  # alternatives
        model = build("(int64[2] i) => (float[2,64] e) {e = Gather(V, i)}", V=normal(64, 64))
        ir.save(model, tmp_path / name)
    package(tmp_path, ())
    (found,) = audit(tmp_path).duplicates
    names = ("decoder_model.onnx:shared", "encoder_model.onnx:shared")
    assert (found.names, found.bytes, found.kind) == (names, 64 * 64 * 4, "across files")

    relocate(tmp_path / "encoder_model.onnx", "decoder_model.onnx_data")  # the same bytes
    assert audit(tmp_path).duplicates == ()


def saved(folder: Path) -> Path:
    """Write a model with 64 x 64 external weights; return its path."""
    model = build(
        "(float[2,64] x) => (float[2,64] y) {a = MatMul(x, W) y = MatMul(a, V)}",
        W=normal(64, 64),
        V=normal(64, 64, seed=1),
    )
    ir.save(model, folder / "m.onnx", external_data="m.onnx_data")
    return folder / "m.onnx"


def relocate(path: Path, location: str) -> None:
    proto = onnx.load(path, load_external_data=False)
    for tensor in proto.graph.initializer:
        next(e for e in tensor.external_data if e.key == "location").value = location
    path.write_bytes(proto.SerializeToString())


def test_graphs_that_read_one_data_file_are_compared(tmp_path: Path) -> None:
    """Though one is named as the other with a suffix, as are those for several profiles."""
    path = saved(tmp_path)
    proto, data = onnx.load(path, load_external_data=False), tmp_path / "m.onnx_data"
    other = tmp_path / "m_web.onnx"
    onnx.save(proto, other)
    assert audit(tmp_path).duplicates == ()
    (moved,) = [tensor for tensor in proto.graph.initializer if tensor.name == "V"]
    place = {entry.key: entry for entry in moved.external_data}
    start, end = data.stat().st_size, int(place["offset"].value) + int(place["length"].value)
    data.write_bytes(data.read_bytes() + data.read_bytes()[int(place["offset"].value) : end])
    place["offset"].value = str(start)
    onnx.save(proto, other)
    (found,) = audit(tmp_path).duplicates
    assert (found.names, found.bytes) == (("m.onnx:V", "m_web.onnx:V"), 64 * 64 * 4)


def test_external_data_is_read(tmp_path):
    found = audit(saved(tmp_path))
    assert found.ok and found.bytes_total == 2 * 64 * 64 * 4


def test_more_tensors_than_open_files(tmp_path):
    count = 80
    text = " ".join(f"a{i} = Add(a{i - 1}, W{i})" for i in range(1, count))
    weights = {f"W{i}": normal(100, seed=i) for i in range(1, count)}
    model = build(f"(float[100] a0) => (float[100] a{count - 1}) {{{text}}}", **weights)
    ir.save(model, tmp_path / "m.onnx", external_data="d")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    in_use = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (in_use + 20, hard))
    try:
        assert audit(tmp_path / "m.onnx").bytes_total == (count - 1) * 400
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.unlink(), "does not exist"),
        (lambda p: p.write_bytes(b""), "no version, opset or output"),
        (lambda p: p.write_bytes(b"garbage" * 50), "truncated or not ONNX"),
        (lambda p: p.write_bytes(p.read_bytes()[:-40]), "truncated or not ONNX"),
        (lambda p: p.write_bytes(p.read_bytes()[:100]), "truncated or not ONNX"),
        (lambda p: (p.unlink(), p.mkdir()), "holds no .onnx file"),
        (lambda p: p.with_name("m.onnx_data").unlink(), "'m.onnx_data', is missing"),
        (lambda p: p.with_name("m.onnx_data").write_bytes(b"1" * 20000), "is too short: 20000"),
        (lambda p: relocate(p, "../m.onnx_data"), "outside the folder"),
        (lambda p: relocate(p, "sub/../../m.onnx_data"), "outside the folder"),
        (lambda p: relocate(p, str(p.with_name("m.onnx_data"))), "outside the folder"),
        (lambda p: relocate(p, "link"), "or is below a link"),
        (lambda p: relocate(p, "hard"), "hard link"),
    ],
)
def test_a_broken_file_is_one_clear_sentence(tmp_path, damage, message):
    (tmp_path / "model").mkdir()
    path = saved(tmp_path / "model")
    shutil.copy(tmp_path / "model" / "m.onnx_data", tmp_path / "m.onnx_data")
    (tmp_path / "model" / "link").symlink_to(tmp_path / "m.onnx_data")
    if message == "hard link":
        (tmp_path / "model" / "hard").hardlink_to(tmp_path / "m.onnx_data")
    damage(path)
    with pytest.raises(InputError) as caught:
        audit(path)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("texts", [[], [b"one"]])
def test_texts_that_are_fewer_than_a_shape_says(texts, tmp_path):
    tensor = onnx.TensorProto(name="T", dims=[2], data_type=onnx.TensorProto.STRING)
    tensor.string_data.extend(texts)
    proto = ir.to_proto(build("(float[4] x) => (float[4] y) {y = Add(x, W)}", W=normal(4)))
    proto.graph.initializer.append(tensor)
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(InputError, match=f"tensor 'T' is not what its shape says: {len(texts)} te"):
        audit(tmp_path / "m.onnx")


def test_a_tensor_shorter_than_its_shape(tmp_path):
    proto = ir.to_proto(
        build("(float[4] x) => (float[4] y) {y = Add(x, W)}", W=np.float32([1, 2, 3, 4]))
    )
    proto.graph.initializer[0].raw_data = b"1234"
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(InputError, match="tensor 'W' is not what its shape says"):
        audit(tmp_path / "m.onnx")


def test_a_node_without_an_output(tmp_path):
    proto = ir.to_proto(build("(float[4] x) => (float[4] y) {y = Add(x, W)}", W=normal(4)))
    proto.graph.node.add(op_type="Identity", name="dead", input=["W"])
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(InputError, match="Identity 'dead' has no output"):
        audit(tmp_path / "m.onnx")
