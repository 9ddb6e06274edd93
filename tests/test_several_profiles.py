"""``export --for cpu,portable``: a graph for each profile, one data file, each weight once."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import tiny
import torch
from architectures import CASES, index_of, merge_all, model_of
from graphs import ops
from test_fused import DECODERS, check_writes_the_same, drawn
from typer.testing import CliRunner

import ffmerge
from ffmerge.__main__ import app
from ffmerge.config import ExportConfig
from ffmerge.errors import InputError
from ffmerge.exporter import convert
from ffmerge.exporter.fused import NotFused
from ffmerge.exporter.package import Package
from ffmerge.models.inputs import example_inputs
from ffmerge.models.manifest import Manifest, Variant, record_files
from ffmerge.passes.graph import resident
from ffmerge.passes.graph.audit import audit
from ffmerge.runtime_tests.parity import check_parity
from ffmerge.runtime_tests.results import model_bytes
from ffmerge.runtime_tests.rows import output_rows
from ffmerge.runtime_tests.runtimes.registry import find_runtime
from ffmerge.runtime_tests.validate import kinds_on

PROFILES = ("cpu", "portable", "webgpu")
SMALL = 256  # bytes below which a tensor stays in its graph


def made(name: str) -> Any:
    torch.manual_seed(0)
    model = drawn(DECODERS["Llama"]()) if name == "llama" else tiny.bert(layers=3)
    assert merge_all(model)
    return model


@pytest.fixture(scope="module", params=["llama", "bert"])
def several(
    request: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Any, Package]]:
    """Return a merged model, and its package for three profiles; its tables count as large."""
    model, target = made(request.param), tmp_path_factory.mktemp(request.param) / "package"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(resident, "LARGE", 0)
        yield model, ffmerge.export(model, target, ExportConfig(profile=",".join(PROFILES)))


def placed(folder: Path, file: str) -> dict[str, tuple[int, int]]:
    """Return where the tensors of a graph lie in the data file, and their bytes, as onnx reads."""
    found = {}
    for tensor in onnx.load(folder / file, load_external_data=False).graph.initializer:
        given = {entry.key: entry.value for entry in tensor.external_data}
        if given:
            assert given["location"] == "model.onnx_data"
            found[tensor.name] = (int(given.get("offset", 0)), int(given["length"]))
    return found


def check_outputs(package: Package) -> None:
    """Every output of every graph is PyTorch's."""
    found = check_parity(package.path, package.manifest)
    assert all(output.ok for output in found)
    paths = {each.path for name in package.manifest.profiles
             for each in package.manifest.in_profile(name).graphs}  # fmt: skip
    assert {output.graph for output in found} == paths


def test_the_data_file_has_each_weight_once(several: tuple[Any, Package]) -> None:
    """As it is in PyTorch or transposed, no matter how many graphs read it."""
    model, package = several
    data = (package.path / "model.onnx_data").read_bytes()
    parameters = {p.data_ptr(): p.detach().numpy() for p in model.parameters()}
    for array in parameters.values():
        if array.nbytes >= SMALL:
            found = data.count(array.tobytes())
            if array.ndim > 1:
                found += data.count(np.ascontiguousarray(array.T).tobytes())
            assert found == 1, array.shape
    weights = sum(array.nbytes for array in parameters.values())
    assert len(data) <= 1.15 * weights  # measured 1.07 (Llama) and 1.02: each starts at 64 bytes
    found = audit(package.path)
    assert found.ok and found.ties
    places = [placed(package.path, f"model{each}.onnx") for each in ("", "_portable", "_webgpu")]
    for other in places[1:]:
        for name in places[0].keys() & other.keys():
            assert other[name] == places[0][name], name


def test_the_graphs_are_those_of_their_profiles(several: tuple[Any, Package]) -> None:
    _, package = several
    manifest = package.manifest
    assert manifest.profiles == PROFILES
    assert "attention" not in {skip.name for skip in manifest.skipped}
    expected = ["model.onnx", "model_portable.onnx", "model_webgpu.onnx"]
    found = [manifest.in_profile(each).graphs[0].path for each in PROFILES]
    assert found == expected
    cpu, portable, webgpu = (ops(ir.load(package.path / file)) for file in expected)
    assert cpu["Attention"] == webgpu["GroupQueryAttention"] + webgpu["MultiHeadAttention"] > 0
    assert portable["Softmax"] == cpu["Attention"] and not portable["Attention"]
    card = (package.path / "README.md").read_text()
    for profile, file in zip(PROFILES, expected, strict=True):
        assert f"`{file}` (for {profile})" in card
    data = (package.path / "model.onnx_data").stat().st_size
    for profile, file in zip(PROFILES[1:], expected[1:], strict=True):
        size = (package.path / file).stat().st_size
        assert data + size <= model_bytes(manifest, profile) < data + size + 200_000


def test_an_encoders_first_graph_is_that_of_a_package_of_its_own(tmp_path: Path) -> None:
    for profile in ("cpu", "cpu,portable"):
        ffmerge.export(made("bert"), tmp_path / profile, ExportConfig(profile=profile))
    alone, together = tmp_path / "cpu", tmp_path / "cpu,portable"
    assert (alone / "model.onnx").read_bytes() == (together / "model.onnx").read_bytes()
    data = (together / "model.onnx_data").read_bytes()
    assert data.startswith((alone / "model.onnx_data").read_bytes())


@pytest.mark.parametrize("profile", [None, *PROFILES])
def test_each_graph_computes_what_pytorch_does(
    several: tuple[Any, Package], profile: str | None
) -> None:
    model, package = several
    inputs = example_inputs(model)
    with torch.no_grad():
        expected = model(**inputs).logits
    served = ffmerge.load_package(package.path, profile=profile)
    # measured 1.6e-6
    assert torch.allclose(served(**inputs).logits, expected, atol=1e-5)
    if served.can_generate():
        check_writes_the_same(model, served)
        given = served(**inputs, logits_to_keep=2).logits
        assert torch.allclose(given, expected[:, -2:], atol=1e-5)


def test_the_manifest_is_read_as_it_was_written(several: tuple[Any, Package]) -> None:
    _, package = several
    manifest = Manifest.read(package.path)
    assert manifest == package.manifest
    assert (manifest.profile, manifest.dtypes, manifest.kinds) == ("cpu", ("fp32",), PROFILES)
    assert all(graph.rounding for each in PROFILES for graph in manifest.in_profile(each).graphs)
    with pytest.raises(InputError, match="no graphs for cuda: there are those for cpu, portable,"):
        ffmerge.load_package(package.path, profile="cuda")
    with pytest.raises(InputError, match="the package has no fp16: there is fp32"):
        ffmerge.load_package(package.path, dtype="fp16", profile="cpu")


def test_validate_checks_every_graph_and_finds_the_broken_one(
    several: tuple[Any, Package], tmp_path: Path
) -> None:
    _, package = several
    folder, run = tmp_path / "package", CliRunner().invoke
    shutil.copytree(package.path, folder)
    result = run(app, ["validate", str(folder), "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["providers"]
    assert [each["profile"] for each in found] == list(PROFILES)
    assert all(each["memory"]["rss_bytes"] and each["outputs"] for each in found)
    page = (folder / "report.md").read_text()
    assert "| cpu, portable |" in page and "--for cpu,portable,webgpu" in page
    assert "--opset" not in page  # each has its own
    assert ", fp32, for cpu, portable, webgpu. **" in page and "ONNX opset" not in page
    assert "ONNX opset" not in (folder / "report.html").read_text()

    broken = onnx.load(folder / "model_portable.onnx", load_external_data=False)
    softmax = next(node for node in broken.graph.node if node.op_type == "Softmax")
    softmax.op_type = "Identity"
    del softmax.attribute[:]
    onnx.save(broken, folder / "model_portable.onnx")
    manifest = Manifest.read(folder)
    listed = {file.path for file in manifest.files}
    files = [file for file in record_files(folder) if file.path in listed]
    replace(manifest, files=tuple(files)).write(folder)
    result = run(app, ["validate", str(folder), "--json"])
    assert result.exit_code == 1
    found = json.loads(result.stdout)["providers"]
    assert [each["ok"] for each in found] == [True, False, True]
    assert found[1]["reason"].startswith("model_portable.onnx: logits")


def test_the_models_own_rounding_is_told_of_every_graph(several: tuple[Any, Package]) -> None:
    _, package = several
    (graph,) = package.manifest.graphs
    coarse = replace(graph, rounding=dict.fromkeys(graph.outputs, 1.0))
    manifest = replace(package.manifest, graphs=(coarse,))
    rows = output_rows(check_parity(package.path, manifest), manifest)
    assert len({name.partition("\n")[2].partition(",")[0] for name, _, _ in rows}) == len(PROFILES)
    assert all("times the model's own rounding" in difference for _, difference, _ in rows)


@pytest.mark.parametrize(
    ("profiles", "runtime", "checked"),
    [
        (PROFILES, "cpu", PROFILES),
        (PROFILES, "webgpu", ["webgpu"]),
        (PROFILES, "web-webgpu", ["webgpu"]),
        (PROFILES, "cuda", ["portable"]),
        (PROFILES, "openvino", ["portable"]),
        (("cpu", "cuda"), "cuda-tf32", ["cuda"]),
        (("cpu", "cuda"), "wasm", ("cpu", "cuda")),
        (("webgpu",), "openvino", ("fp32",)),
    ],
)
def test_elsewhere_what_a_provider_is_given_is_checked(
    profiles: tuple[str, ...],
    runtime: str,
    checked: Any,
    several: tuple[Any, Package],
) -> None:
    first, *others = profiles
    variants = tuple(
        Variant(each, f"{each}.onnx", True, "model.onnx", "float32") for each in others
    )
    manifest = replace(several[1].manifest, profile=first, variants=variants)
    assert kinds_on(find_runtime(runtime), manifest) == checked


def test_codes_by_data_are_those_of_all_graphs(tmp_path: Path) -> None:
    """As of one profile alone; a weight is there once, with its scales."""
    ids = np.random.default_rng(0).integers(3, 97, (24, 16))
    rows = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    for profile in ("portable", "portable,cpu"):
        config = ExportConfig(profile=profile, dtype="int4")
        package = ffmerge.export(made("llama"), tmp_path / profile, config, None, rows)
    alone, folder = tmp_path / "portable", tmp_path / "portable,cpu"
    graph = "model.onnx"
    assert (alone / graph).read_bytes() == (folder / graph).read_bytes()
    data = (folder / "model.onnx_data").read_bytes()
    before = (alone / "model.onnx_data").read_bytes()
    assert data.startswith(before) and len(data) - len(before) < 2000
    first, other = placed(folder, graph), placed(folder, "model_cpu.onnx")
    named = {name for name in first if name.endswith(("weight", "weight/scale"))}
    assert len(named) > 10 and all(other[name] == first[name] for name in named)
    config = json.loads((folder / "genai_config.json").read_text())
    assert config["model"]["decoder"]["filename"] == "model_genai.onnx"
    check_outputs(package)


@pytest.mark.parametrize(("profile", "form"), [("cpu,portable", "rows"), ("cpu,cuda", "blocks")])
def test_int8_is_in_a_form_that_all_have_kernels_for(
    profile: str, form: str, tmp_path: Path
) -> None:
    config = ExportConfig(profile=profile, dtype="int8")
    package = ffmerge.export(tiny.vit(64, 128, 2), tmp_path / "package", config)
    assert set(package.manifest.int8.values()) == {form} and len(package.manifest.int8) == 2
    assert audit(package.path).ok
    check_outputs(package)


def test_each_takes_keys_and_values_of_its_own_type(tmp_path: Path) -> None:
    """Those of cuda stay float16; where all graphs have the operator, products are joined."""
    config = ExportConfig(profile="cuda,cpu", dtype="fp16")
    package = ffmerge.export(made("llama"), tmp_path / "package", config)
    kinds, splits = {}, {}
    for profile in ("cuda", "cpu"):
        (record,) = package.manifest.in_profile(profile).graphs
        (served,) = package.manifest.served(profile).values()
        assert served.probe == record.probe and served.optional == record.optional
        kinds[profile] = {s.dtype for s in record.probe.inputs if s.name.startswith("past")}
        splits[profile] = ops(ir.load(package.path / record.path))["Split"]
    assert kinds == {"cuda": {"float16"}, "cpu": {"float32"}}
    assert splits["cuda"] == splits["cpu"] > 0
    assert audit(package.path).ok
    check_outputs(package)


def test_graphs_of_a_pair_share_it_too(tmp_path: Path) -> None:
    """Eight graphs, of which four run; the parts of a merged decoder are those of its profile."""
    model = model_of(*CASES[index_of("T5ForConditionalGeneration")][:3])
    assert merge_all(model)
    package = ffmerge.export(model, tmp_path / "package", ExportConfig(profile="portable,cpu"))
    assert len(list(package.path.glob("*.onnx"))) == 8
    *_, merged = package.manifest.in_profile("cpu").graphs
    parts = ("decoder_model_cpu.onnx", "decoder_with_past_model_cpu.onnx")
    assert (merged.path, merged.parts) == ("decoder_model_merged_cpu.onnx", parts)
    served = {"encoder_model_cpu.onnx", "decoder_model_merged_cpu.onnx"}
    assert set(package.manifest.served("cpu")) == served
    assert audit(package.path).ok
    check_outputs(package)
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 0]])
    settings: dict[str, Any] = {
        "input_ids": ids, "attention_mask": (ids > 0).long(), "do_sample": False,
        "max_new_tokens": 8, "min_new_tokens": 8,
    }  # fmt: skip
    for profile in ("portable", "cpu"):
        loaded = ffmerge.load_package(package.path, profile=profile)
        assert loaded.generate(**settings).tolist() == model.generate(**settings).tolist()


def test_every_graph_of_a_pair_loads(tmp_path: Path) -> None:
    """Also the steps behind the first, whose turned heads nothing reads any more for WebGPU."""
    model = model_of(*CASES[index_of("WhisperForConditionalGeneration")][:3])
    config = ExportConfig(profile="webgpu,portable", dtype="int8")
    check_outputs(ffmerge.export(model, tmp_path / "package", config))


def test_what_a_profile_cannot_have_is_told_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(graph: Any) -> None:
        raise NotFused("because")

    monkeypatch.setattr(convert, "check_fused", refuse)
    config = ExportConfig(profile="portable,cpu")
    package = ffmerge.export(tiny.bert(layers=1), tmp_path / "package", config)
    (skip,) = [each for each in package.manifest.skipped if each.name == "attention"]
    assert skip.reason == "in cpu, plain products, as --for portable has it: because"
    portable, cpu = (onnx.load(package.path / f"model{each}.onnx", load_external_data=False)
                     for each in ("", "_cpu"))  # fmt: skip
    assert portable != cpu
    for node in cpu.graph.node:
        if node.op_type == "Sum":  # before a layer norm
            node.op_type = "Add"
    assert portable == cpu


@pytest.mark.parametrize(
    ("given", "wrong"),
    [
        ({"profile": "cpu,tpu"}, "no profile 'tpu'"),
        ({"profile": "cpu,"}, "no profile ''"),
        ({"profile": "cpu,portable,cpu"}, "profile cpu is there twice"),
        ({"profile": "portable,npu", "dtype": "fp32"}, "npu fixes every size"),
        ({"profile": "cpu,portable", "dtype": "fp32,q8"}, "one --dtype, or one --for"),
        ({"profile": "cpu,cuda", "dtype": "int8-dynamic"}, "cuda has no kernels for int8-dynamic"),
        ({"profile": "cpu,webgpu", "layout": "transformers.js"}, "names for the graphs of one"),
        ({"profile": "cpu,webgpu", "opset": 23}, "an opset of its own"),
        ({"profile": "cpu,portable", "ort": True}, "are of one profile"),
        ({"profile": "cpu,portable", "prepack": True}, "are of one profile"),
        ({"profile": "cpu,portable", "dtype": "int4", "budget": "6MB"}, "are of one profile"),
    ],
)
def test_what_one_data_file_cannot_hold_is_refused(given: dict[str, Any], wrong: str) -> None:
    with pytest.raises(InputError, match=wrong) as raised:
        ExportConfig(**given)
    assert str(raised.value).endswith(".")


def test_blanks_around_a_name_are_none_of_it() -> None:
    """Of one as of several."""
    webgpu = ExportConfig(profile=" webgpu ", dtype="fp16")
    assert (webgpu.profiles, webgpu.file_layout) == (("webgpu",), "transformers.js")
    assert ExportConfig(profile="cpu , portable").profiles == ("cpu", "portable")


def test_python_takes_them_as_the_command_does() -> None:
    for names in (["cpu", "portable"], ("cpu", "portable"), ["cpu,portable"]):
        assert ExportConfig(profile=names).profiles == ("cpu", "portable")
    assert ExportConfig(dtype=["fp32", "q8"]).dtypes == ("fp32", "int8")
    for none in ({"profile": []}, {"dtype": ()}, {"dtype": "int4", "budget": 6_000_000}):
        with pytest.raises(InputError):
            ExportConfig(**none)


@pytest.mark.parametrize("given", [["--for=cpu,portable"], ["--for", "cpu", "--for", "portable"]])
def test_compress_takes_one(given: list[str], tmp_path: Path) -> None:
    """The last of several was taken, and not a word said."""
    words = ["compress", str(tmp_path), str(tmp_path / "out"), "--data", str(tmp_path), *given]
    refused = CliRunner().invoke(app, words)
    assert isinstance(refused.exception, InputError)
    assert "one profile" in str(refused.exception)


def test_the_command_takes_them_in_one_word_or_in_several(tmp_path: Path) -> None:
    tiny.bert(layers=1).save_pretrained(tmp_path / "model")
    run, model, found = CliRunner().invoke, str(tmp_path / "model"), []
    words = {"a": ["--for=cpu, portable"], "b": ["--for", "cpu", "--for", "portable"]}
    for name, given in words.items():
        result = run(app, ["export", model, str(tmp_path / name), *given, "--json"])
        assert result.exit_code == 0, result.output
        value = json.loads(result.stdout)
        found.append([file["path"] for file in value["files"]])
        assert [each["kind"] for each in value["variants"]] == ["portable"]
    assert found[0] == found[1]
    assert {"model.onnx", "model_portable.onnx", "model.onnx_data"} <= {*found[0]}
    refused = run(app, ["export", model, str(tmp_path / "c"), "--for", "cpu,npu"])
    assert isinstance(refused.exception, InputError) and not (tmp_path / "c").exists()
