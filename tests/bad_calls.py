"""Calls that ffmerge refuses: command lines, calls of the Python API, and what they name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from graphs import build, normal
from packages import linear_package
from tiny import vit
from tiny_wider import seeded, t5

import ffmerge
from ffmerge.config import ValidateConfig

_DATA = "--data {in}/data.npz"
_MERGE, _K2 = "merge {in}/vit {out}/new", "--k 2 --data {in}/data.npz"

# Each with the files of `prepare` in {in}; it may write into {out}.
COMMANDS = [
    "inspect {in}/nothing",
    "inspect {in}/empty",
    "inspect {in}/file",
    "inspect {in}/mamba",
    "inspect {in}/other-code",
    "merge {in}/nothing {out}/new " + _K2,
    "merge {in}/mamba {out}/new " + _K2,
    "merge {in}/experts {out}/new --k 2 --method average",
    "merge {in}/truncated {out}/new " + _K2,
    "merge {in}/merged {out}/new " + _K2,
    "merge {in}/no-weights {out}/new " + _K2,
    "merge {in}/pickled {out}/new " + _K2,
    "merge {in}/no-json {out}/new " + _K2,
    "merge {in}/vit {in}/empty " + _K2,
    "merge {in}/vit {in}/file/below " + _K2,
    "merge {in}/vit /proc/ffmerge --window 1-2 --method average",
    f"{_MERGE} --window 1-3 {_DATA}",
    f"{_MERGE} --window 1-1 {_DATA}",
    f"{_MERGE} --window 2-1 {_DATA}",
    f"{_MERGE} --window one {_DATA}",
    f"{_MERGE} --window 0-1 --window 1-2 {_DATA}",
    f"{_MERGE} --window layers:0-1 --window middle:0-1 {_DATA}",
    f"{_MERGE} --window layers:0-1 --stack layers --stack middle {_DATA}",
    f"{_MERGE} --k 4 {_DATA}",
    f"{_MERGE} --k 1 {_DATA}",
    f"{_MERGE} {_DATA}",
    f"{_MERGE} --k 2 --window 1-2 {_DATA}",
    f"{_MERGE} --k 2",
    f"{_MERGE} --window 0-1",
    f"{_MERGE} {_K2} --stack decoder",
    f"{_MERGE} {_K2} --method magic",
    f"{_MERGE} {_K2} --criterion taste",
    f"{_MERGE} {_K2} --task dreaming",
    f"{_MERGE} {_K2} --device xpu",
    f"{_MERGE} {_K2} --recover 2 --recover-parts some",
    f"{_MERGE} {_K2} --recover -1",
    f"{_MERGE} {_K2} --recover 2 --learning-rate 0",
    f"{_MERGE} {_K2} --recover 20 --learning-rate 1e30",
    f"{_MERGE} {_K2} --recover 2 --recover-labels --task feature-extraction",
    f"{_MERGE} --k 2 --method average --recover 2",
    f"{_MERGE} --budget -10% --method average",
    f"{_MERGE} --budget little {_DATA}",
    f"{_MERGE} --budget -90% {_DATA}",
    f"{_MERGE} --budget 1GB {_DATA}",
    f"{_MERGE} --budget -10% --sync {_DATA}",
    f"{_MERGE} --budget -10% --k 2 {_DATA}",
    f"{_MERGE} --k 2 --data {{in}}/other-shape.npz",
    f"{_MERGE} --k 2 --data {{in}}/lengths.npz",
    f"{_MERGE} --k 2 --data {{in}}/pickle.npz",
    f"{_MERGE} --k 2 --data {{in}}/file",
    f"{_MERGE} --k 2 --data {{in}}/nothing.txt",
    f"{_MERGE} --k 2 --data {{in}}/nothing.npz",
    f"{_MERGE} --k 2 --data {{in}}/colours.csv",
    "merge {in}/clip {out}/new --k 2 --method average",
    "merge {in}/t5 {out}/new --window 1-2 --method average",
    "merge {in}/t5 {out}/new --k 2 --stack encoder --stack middle --method average",
    "compare {in}/vit --k 4 " + _DATA,
    "compare {in}/vit --k 2 --method magic " + _DATA,
    "compare {in}/merged --k 2 " + _DATA,
    "export {in}/nothing {out}/new",
    "export {in}/truncated {out}/new",
    "export {in}/vit {in}/empty",
    "export {in}/vit /proc/ffmerge",
    "export {in}/vit {out}/new --task text-generation",
    "export {in}/vit {out}/new --task dreaming",
    "export {in}/vit {out}/new --opset 3",
    "export {in}/vit {out}/new --dtype int3",
    "export {in}/vit {out}/new --layout boxes",
    "export {in}/vit {out}/new --data {in}/ids.npz",
    "share {in}/nothing.onnx {out}/new.onnx",
    "share {in}/bad.onnx {out}/new.onnx",
    "share {in}/empty.onnx {out}/new.onnx",
    "share {in}/good.onnx {in}/good.onnx",
    "share {in}/good.onnx {out}/new.onnx --dtype int3",
    "share {in}/good.onnx {out}/new.onnx --opset 3",
    "share {in}/good.onnx {out}/new.onnx --opset 99",
    "share {in}/old.onnx {out}/new.onnx --dtype int8",
    "share {in}/future.onnx {out}/new.onnx",
    "share {in}/broken-tie.onnx {out}/new.onnx",
    "share {in}/unreadable-ties.onnx {out}/new.onnx",
    "audit {in}/nothing",
    "audit {in}/empty",
    "audit {in}/bad.onnx",
    "audit {in}/twice.onnx",
    "audit {in}/cycle.onnx",
    "audit {in}/outside.onnx",
    "audit {in}/backslash.onnx",
    "audit {in}/absent.onnx",
    "validate {in}/nothing",
    "validate {in}/vit",
    "validate {in}/empty --provider abacus",
    "validate {in}/package --provider tpu",
    "validate {in}/package --similarity {in}/file",
    "validate {in}/package --similarity {in}/vit/config.json",
    "validate {in}/package --against {in}/package",
    "validate {in}/changed",
    "validate {in}/cut",
    "validate {in}/old-schema",
    "validate {in}/other-keys",
    "validate {in}/no-graph",
    "validate {in}/no-reference",
    "similarity {in}/vit --tokens 1 " + _DATA,
    "similarity {in}/vit --batch-size 0 " + _DATA,
    "similarity {in}/vit --data {in}/nothing.npz",
    "similarity {in}/vit --out {in}/empty " + _DATA,
    "similarity {in}/mamba --data {in}/ids.npz",
    "demo --out {in}/empty",
    "run {in}/nothing.yaml",
    "run {in}/option.yaml",
    "run {in}/command.yaml",
    "run {in}/value.yaml",
    "run {in}/list.yaml",
]

_RECIPES = {
    "option": "- merge: {model: a, out: b, windows: 1-2}",
    "command": "- export: {model: a, out: b}\n- fly: {}",
    "value": "- merge: {model: a, out: b, k: yes}",
    "list": "- merge: 3",
}
_PLAIN = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 60}
_TEXT = "(float[4] x) => (float[4] y) {a = Add(x, W) y = Add(a, V)}"


def prepare(base: Path) -> None:
    """Write what the calls name into the new folder ``base``."""
    base.mkdir()
    _checkpoints(base)
    _data(base)
    _graphs(base)
    _packages(base)
    for name, text in _RECIPES.items():
        (base / f"{name}.yaml").write_text(text)
    (base / "empty").mkdir()
    (base / "file").write_text("x")


def _checkpoints(base: Path) -> None:
    ffmerge.save(vit(32, 64, layers=3), base / "vit")
    ffmerge.save(_merged(), base / "merged")
    for name in ("truncated", "no-weights", "pickled", "no-json", "other-code"):
        shutil.copytree(base / "vit", base / name)
    weights = base / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5000])
    (base / "no-weights" / "model.safetensors").unlink()
    (base / "pickled" / "model.safetensors").rename(base / "pickled" / "pytorch_model.bin")
    (base / "no-json" / "config.json").write_text("{")
    config = {"model_type": "unheard-of", "auto_map": {"AutoConfig": "code.Config"}}
    (base / "other-code" / "config.json").write_text(json.dumps(config))
    t5(3, 2).save_pretrained(base / "t5")
    seeded("MambaForCausalLM", "MambaConfig", state_size=4, **_PLAIN).save_pretrained(
        base / "mamba"
    )
    seeded(
        "MixtralForCausalLM", "MixtralConfig", num_attention_heads=4, num_key_value_heads=4,
        intermediate_size=48, num_local_experts=2, **_PLAIN,
    ).save_pretrained(base / "experts")  # fmt: skip
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 4}  # fmt: skip
    seeded(
        "CLIPModel", "CLIPConfig", vision_config={**sizes, "image_size": 16, "patch_size": 4},
        text_config={**sizes, "vocab_size": 60, "max_position_embeddings": 20, "eos_token_id": 1},
    ).save_pretrained(base / "clip")  # fmt: skip


def _merged() -> Any:
    model = vit(32, 64, layers=3)
    ffmerge.merge_(model, None, ffmerge.MergeConfig(window=(0, 1), method="average"))
    return model


def _data(base: Path) -> None:
    pixels, labels = normal(8, 3, 16, 16), np.arange(8) % 7
    np.savez(base / "data.npz", pixel_values=pixels, labels=labels)
    np.savez(base / "other-shape.npz", pixel_values=normal(8, 3, 8, 8), labels=labels)
    np.savez(base / "lengths.npz", pixel_values=pixels, labels=labels[:5])
    np.savez(base / "pickle.npz", labels=np.array([{"x": 1}], dtype=object))
    np.savez(base / "ids.npz", input_ids=np.arange(64).reshape(8, 8) % 60)
    (base / "colours.csv").write_text("colour\nred\n")


def _graphs(base: Path) -> None:
    w, v = normal(4), normal(4, seed=1)
    tied = build(_TEXT, W=w, V=v)
    tied.metadata_props["ffmerge.ties"] = json.dumps([{"name": "W", "members": ["W", "V"]}])
    unreadable = build(_TEXT, W=w, V=v)
    unreadable.metadata_props["ffmerge.ties"] = "{"
    future, twice, cycle = (ir.to_proto(build(_TEXT, W=w, V=v)) for _ in range(3))
    future.opset_import[0].version = 99
    twice.graph.initializer.add().CopyFrom(twice.graph.initializer[0])
    cycle.graph.node[0].input[0] = "y"
    product = "(float[2,64] x) => (float[2,64] y) {y = MatMul(x, W)}"
    models = {
        "good": ir.to_proto(build(_TEXT, W=w, V=v)),
        "old": ir.to_proto(build(product, 12, W=normal(64, 64))),
        "broken-tie": ir.to_proto(tied), "unreadable-ties": ir.to_proto(unreadable),
        "future": future, "twice": twice, "cycle": cycle,
        "outside": _external("../secret"), "backslash": _external("..\\secret"),
        "absent": _external("gone"),
    }  # fmt: skip
    for name, proto in models.items():
        (base / f"{name}.onnx").write_bytes(proto.SerializeToString())
    (base / "bad.onnx").write_bytes(b"\x08\x09 not a model")
    (base / "empty.onnx").write_bytes(b"")


def _external(location: str) -> onnx.ModelProto:
    """Return a model whose weight is in another file."""
    proto = ir.to_proto(build(_TEXT, W=normal(4), V=normal(4)))
    weight = onnx.TensorProto(name="W", data_type=onnx.TensorProto.FLOAT, dims=[4])
    weight.data_location = onnx.TensorProto.EXTERNAL
    weight.external_data.add(key="location", value=location)
    proto.graph.initializer[0].CopyFrom(weight)
    return proto


def _packages(base: Path) -> None:
    names = ("package", "changed", "cut", "old-schema", "other-keys", "no-graph", "no-reference")
    for name in names:
        linear_package(base / name, normal(4, 3), normal(3))
    data = (base / "package" / "model.onnx_data").read_bytes()
    (base / "changed" / "model.onnx_data").write_bytes(data[::-1])
    (base / "cut" / "model.onnx_data").write_bytes(data[:-1])
    value = json.loads((base / "package" / "ffmerge.json").read_text())
    _write(base / "old-schema", value | {"schema": 1})
    _write(base / "other-keys", value | {"colour": "red"})
    _write(base / "no-graph", value | {"graphs": []})
    listed = [file for file in value["files"] if file["path"] != "reference.safetensors"]
    _write(base / "no-reference", value | {"files": listed})
    (base / "no-reference" / "reference.safetensors").unlink()


def _write(folder: Path, value: dict[str, Any]) -> None:
    (folder / "ffmerge.json").write_text(json.dumps(value))


def _untied(base: Path, out: Path) -> None:
    model = _merged()
    fc1 = model.vit.layers[1].mlp.fc1
    fc1.weight = torch.nn.Parameter(fc1.weight.detach().clone())
    ffmerge.save(model, out / "new")


def _images(rows: int = 8) -> dict[str, Any]:
    return {"pixel_values": normal(rows, 3, 16, 16)}


# name -> what is called with the folders {in} and {out}
PYTHON: dict[str, Callable[[Path, Path], Any]] = {
    "merge_ a window beyond": lambda base, out: ffmerge.merge_(
        vit(32, 64, layers=3), _images(), ffmerge.MergeConfig(window=(1, 3))
    ),
    "merge_ without data": lambda base, out: ffmerge.merge_(
        vit(32, 64, layers=3), None, ffmerge.MergeConfig(k=2)
    ),
    "merge_ twice": lambda base, out: ffmerge.merge_(
        _merged(), _images(), ffmerge.MergeConfig(k=2)
    ),
    "merge_ of a path": lambda base, out: ffmerge.merge_(
        "mixer", _images(), ffmerge.MergeConfig(k=2)
    ),
    "export of a path": lambda base, out: ffmerge.export("mixer", out / "new"),
    "save of a path": lambda base, out: ffmerge.save("mixer", out / "new"),
    "clone of a path": lambda base, out: ffmerge.clone_sharing_parameters("mixer"),
    "save a broken tie": _untied,
    "load nothing": lambda base, out: ffmerge.load(base / "nothing"),
    "export float16": lambda base, out: ffmerge.export(vit(32, 64, 2).half(), out / "new"),
    "share int3": lambda base, out: ffmerge.share(
        build(_TEXT, W=normal(4), V=normal(4)), config=ffmerge.ShareConfig(dtype="i3")
    ),
    "load_package nothing": lambda base, out: ffmerge.load_package(base / "empty"),
    "load_package changed": lambda base, out: ffmerge.load_package(base / "changed"),
    "validate tpu": lambda base, out: ffmerge.validate(
        base / "package", ValidateConfig(providers=("tpu",))
    ),
    "validate tpu as text": lambda base, out: ffmerge.validate(
        base / "package", ValidateConfig(providers="cpu, tpu")
    ),
}  # fmt: skip
