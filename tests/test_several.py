"""Several precisions in one package: each file is that of an export in that precision alone."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from architectures import CASES, index_of, merge_all, model_of
from typer.testing import CliRunner

import ffmerge
from ffmerge.__main__ import app
from ffmerge.config import ExportConfig
from ffmerge.errors import InputError
from ffmerge.models.inputs import example_inputs
from ffmerge.models.manifest import Manifest, record_files
from ffmerge.runtime_tests.loaded import audit
from ffmerge.runtime_tests.results import model_bytes
from ffmerge.runtime_tests.validate import check_package

# transformers.js, utils/dtypes.js: what stands behind the name of a graph that it asks for
ASKED_FOR = {"fp32": "", "fp16": "_fp16", "q8": "_quantized", "q4": "_q4", "q4f16": "_q4f16"}
SESSIONS = {"bert": ["model"], "marian": ["encoder_model", "decoder_model_merged"]}
ALONE = {"bert": ["fp32", "q8", "q4f16"], "marian": ["q8"]}  # an export takes its time
LEAST = {"fp32": 0.999999, "fp16": 0.9999, "q8": 0.999, "q4": 0.97, "q4f16": 0.97}


def merged(name: str) -> Any:
    model = tiny.bert(layers=3)
    if name == "marian":
        model = model_of(*CASES[index_of("MarianMTModel")][:3])
    assert merge_all(model)
    return model


def written(folder: Path) -> Mapping[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "onnx").iterdir()}


@pytest.fixture(scope="module", params=list(SESSIONS))
def package(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp(request.param) / "package"
    ffmerge.export(merged(request.param), folder, ExportConfig(dtype=",".join(ASKED_FOR)))
    return request.param, folder


def test_transformers_js_finds_every_session_in_every_precision(package: tuple[str, Path]) -> None:
    name, folder = package
    asked = {f"{s}{suffix}.onnx" for s in SESSIONS[name] for suffix in ASKED_FOR.values()}
    assert written(folder).keys() == asked
    manifest = Manifest.read(folder)
    assert manifest.dtypes == ("fp32", "fp16", "int8", "int4", "q4f16")
    for dtype, suffix in zip(manifest.dtypes, ASKED_FOR.values(), strict=True):
        paths = [graph.path for graph in manifest.in_dtype(dtype).graphs]
        assert paths == [f"onnx/{session}{suffix}.onnx" for session in SESSIONS[name]]
        records = manifest.in_dtype(dtype).graphs
        assert all(bool(graph.rounding) == (dtype == "fp32") for graph in records)
        size = sum((folder / path).stat().st_size for path in paths)
        assert model_bytes(manifest, dtype) == size  # what is loaded of it, no other's
    card = (folder / "README.md").read_text()
    assert 'dtype: "fp32" }); // or fp16, q8, q4, q4f16' in card


def test_each_file_is_that_of_an_export_in_its_precision_alone(
    package: tuple[str, Path], tmp_path: Path
) -> None:
    name, folder = package
    found = written(folder)
    for dtype in ALONE[name]:
        config = ExportConfig(dtype=dtype, layout="transformers.js")
        ffmerge.export(merged(name), tmp_path / dtype, config)
        for file, content in written(tmp_path / dtype).items():
            assert found[file] == content, file


@pytest.mark.parametrize("dtype", [None, *ASKED_FOR])
def test_each_precision_is_loaded_and_computes_what_pytorch_does(
    package: tuple[str, Path], dtype: str | None
) -> None:
    name, folder = package
    model = merged(name)
    inputs = example_inputs(model)
    with torch.no_grad():
        expected = model(**inputs).logits.double().flatten()
    served = ffmerge.load_package(folder, dtype=dtype)
    got = served(**inputs).logits.double().flatten()
    alike = torch.nn.functional.cosine_similarity(expected, got, dim=0).item()
    assert alike >= LEAST[dtype or "fp32"]
    if dtype is None:
        assert torch.allclose(got, expected, atol=1e-5)  # measured 1.2e-7
    elif dtype != "fp32":
        assert not torch.allclose(got, expected, atol=1e-6)  # measured 1.2e-4 and more


def test_a_precision_it_does_not_have_is_refused(package: tuple[str, Path]) -> None:
    with pytest.raises(InputError, match="no int8-static: there is fp32, fp16, int8, int4, q4f16"):
        ffmerge.load_package(package[1], dtype="int8-static")


def test_audit_finds_no_weight_twice_and_every_tie(package: tuple[str, Path]) -> None:
    found = audit(package[1], load=False)
    assert found.bytes_duplicate == 0
    assert found.ties and found.ok
    assert len(found.files) == len(ASKED_FOR) * len(SESSIONS[package[0]])


def test_each_precision_is_judged_by_its_own_bounds(tmp_path: Path) -> None:
    folder = tmp_path / "package"
    config = ExportConfig(dtype="q8,fp32,q4")
    ffmerge.export(tiny.gpt2(layers=1), folder, config)
    found = ffmerge.validate(folder)
    assert found.ok, repr(found)
    bounds = {each.dtype: each.outputs[0].rtol for each in found.providers}
    assert bounds == {"int8": 5e-2, "fp32": 1e-5, "int4": 1e-1}
    assert all(each.footprint and each.generation for each in found.providers)
    page = (folder / "report.md").read_text()
    assert "int8, fp32, int4" in page and "| cpu, int4 |" in page
    assert "--dtype int8,fp32,int4" in page

    # the graph of int8 in the place of float32's: that one fails, the others hold
    shutil.copy(folder / "onnx/model_quantized.onnx", folder / "onnx/model.onnx")
    manifest = Manifest.read(folder)
    files = [file for file in record_files(folder) if file.path.startswith(("onnx/", "ref"))]
    replace(manifest, files=tuple(files)).write(folder)
    verdicts = {each.dtype: each.ok for each in check_package(folder).providers}
    assert verdicts == {"int8": True, "fp32": False, "int4": True}


def test_four_bits_rounded_by_data_are_those_of_both_precisions(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 97, (24, 16))
    rows = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    together = ExportConfig(dtype="fp32,q4,q4f16")
    ffmerge.export(tiny.gpt2(layers=1), tmp_path / "all", together, None, rows)
    alone: dict[str, bytes] = {}
    for dtype in ("q4", "q4f16"):
        config = ExportConfig(dtype=dtype, layout="transformers.js")
        ffmerge.export(tiny.gpt2(layers=1), tmp_path / dtype, config, None, rows)
        alone |= written(tmp_path / dtype)
    found = written(tmp_path / "all")
    del found["model.onnx"]
    assert found == alone


@pytest.mark.parametrize(
    ("given", "wrong"),
    [
        ({"dtype": "fp32,q9"}, "no dtype 'q9'"),
        ({"dtype": "fp32,"}, "no dtype ''"),
        ({"dtype": "q8,fp32,int8"}, "dtype int8 is there twice"),
        ({"dtype": "fp32,int8-static"}, "int8-static has no file name beside other precisions: "),
        ({"dtype": "int8-dynamic,fp32"}, "int8-dynamic has no file name"),
        ({"dtype": "int8-static,fp16", "profile": "npu"}, "export each into a folder of its own"),
        ({"dtype": "fp32,q8", "layout": "optimum"}, "the layout optimum has one name"),
        ({"dtype": "fp32,q8", "ort": True}, "--ort and --prepack are of one precision"),
        ({"dtype": "fp32,q8", "prepack": True}, "--ort and --prepack are of one precision"),
        ({"dtype": "fp32,fp16", "block": 64}, "have blocks"),
        ({"dtype": "fp32,q4", "budget": "6MB"}, "give --dtype int4"),
    ],
)
def test_what_one_folder_cannot_hold_is_refused(given: dict[str, Any], wrong: str) -> None:
    with pytest.raises(InputError, match=wrong) as raised:
        ExportConfig(**given)
    assert str(raised.value).endswith(".")


def test_the_command_takes_them_in_one_word_or_in_several(tmp_path: Path) -> None:
    tiny.bert(layers=1).save_pretrained(tmp_path / "model")
    run = CliRunner().invoke
    model, found = str(tmp_path / "model"), []
    for name, words in (("a", ["--dtype=fp32, q8"]), ("b", ["--dtype", "fp32", "--dtype", "q8"])):
        result = run(app, ["export", model, str(tmp_path / name), *words, "--json"])
        assert result.exit_code == 0, result.output
        found.append([file["path"] for file in json.loads(result.stdout)["files"]])
    assert found[0] == found[1]
    assert {"onnx/model.onnx", "onnx/model_quantized.onnx"} <= {*found[0]}
