"""Packages against PyTorch: outputs, bytes, names, determinism, and what a kill leaves."""

import gc
import logging
import os
import re
import signal
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
import transformers
from architectures import CASES, index_of, model_of
from reference.tasks import REFERENCES
from tiny import ABOVE, BELOW, FAMILIES, bert, gpt2, vit
from torch._subclasses import FakeTensor

from ffmerge.config import ExportConfig, MergeConfig
from ffmerge.errors import ExportError, InputError
from ffmerge.exporter.fused import FUNCTION
from ffmerge.exporter.graphs import graphs
from ffmerge.exporter.package import Package, export
from ffmerge.exporter.plan import make_plan
from ffmerge.files import write_json
from ffmerge.models import checkpoint, tasks
from ffmerge.models.manifest import Manifest
from ffmerge.passes.graph.audit import audit
from ffmerge.passes.graph.read import read_model
from ffmerge.passes.weights.merge import merge_
from ffmerge.runtime_tests.reference import read_reference
from ffmerge.runtime_tests.validate import validate


def _empty_past(inputs: dict[str, np.ndarray], d: int) -> dict[str, np.ndarray]:
    """Return a prompt's inputs of the tiny GPT-2 with a cache: 6 layers, 4 heads."""
    rows, width = len(inputs["input_ids"]), d // 4
    names = [f"past_key_values.{i}.{part}" for i in range(6) for part in ("key", "value")]
    positions = np.broadcast_to(np.arange(inputs["input_ids"].shape[1]), inputs["input_ids"].shape)
    past = {n: np.zeros((rows, 4, 0, width), np.float32) for n in names}
    return {**inputs, "position_ids": positions, **past}


def _inputs(name: str, batch: int, length: int = 13) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(batch)
    if name == "vit":
        return {"pixel_values": generator.standard_normal((batch, 3, 16, 16)).astype("f")}
    mask = (np.arange(length) < length - np.arange(batch)[:, None]).astype(np.int64)
    inputs = {"input_ids": generator.integers(0, 97, (batch, length)), "attention_mask": mask}
    if name == "bert":
        inputs["token_type_ids"] = generator.integers(0, 2, (batch, length))
    return inputs


Case = tuple[str, Any, Package]


@pytest.fixture(scope="module", params=[(n, s) for n in FAMILIES for s in (ABOVE, BELOW)], ids=str)
def merged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    name, (d, f) = request.param
    model = FAMILIES[name](d, f)
    merge_(model, _inputs(name, 8), MergeConfig(window=(1, 4), method="permute"))
    return name, model, export(model, tmp_path_factory.mktemp(name) / "package")


def test_outputs_equal_pytorch(merged: Case) -> None:
    name, model, package = merged
    d = model.config.hidden_size
    session = ort.InferenceSession(package.path / "model.onnx")
    for batch, length in ((1, 1), (2, 13), (5, 8)):
        inputs = _inputs(name, batch, length if batch == 1 else max(length, batch + 1))
        with torch.no_grad():
            expected = model(**{k: torch.from_numpy(v) for k, v in inputs.items()}).logits.numpy()
        (got,) = session.run(["logits"], _empty_past(inputs, d) if name == "gpt2" else inputs)
        assert np.abs(got - expected).max() < 5e-6  # measured 8.3e-7


def test_every_distinct_parameter_is_stored_once_under_its_name(merged: Case) -> None:
    _, model, package = merged
    stored = read_model(package.path / "model.onnx").graph.initializers
    names = {name for name, _ in model.named_parameters()}  # tied ones under their first name
    # PyTorch parameters that take no part in the output are not stored; all others by name
    assert names <= set(stored)
    for name, parameter in model.named_parameters():
        values = stored[name].const_value.numpy()
        expected = parameter.detach().numpy()
        assert np.array_equal(values, expected) or np.array_equal(values, expected.T)
    shared = sum(stored[name].const_value.nbytes for name in names)
    assert shared == sum(p.nbytes for p in model.parameters()) == package.manifest.parameter_bytes
    constants = sum(v.const_value.nbytes for k, v in stored.items() if k not in names)
    assert constants < 1000  # shapes and scalars: measured 133 to 621


def test_audit_finds_nothing(merged: Case) -> None:
    _, _, package = merged
    found = audit(package.path)
    assert found.ok
    ties = {check.group for check in found.ties}
    assert len(ties) == 4 + ("transformer.wte.weight" in ties)  # 4 tensors of the FFN, GPT-2's head
    assert all(check.ok for check in found.ties)


def test_manifest_describes_every_file(merged: Case) -> None:
    _, _, package = merged
    manifest = Manifest.read(package.path)
    on_disk = {p.name: p.stat().st_size for p in package.path.iterdir()}
    assert on_disk.pop("ffmerge.json")
    assert {file.path: file.bytes for file in manifest.files} == on_disk
    manifest.check_files(package.path)
    assert manifest.merge is not None
    assert manifest.merge.groups[0].layers == (1, 2, 3, 4)


def test_no_path_of_this_machine_is_in_a_package(merged: Case) -> None:
    _, _, package = merged
    for path in package.path.iterdir():
        content = path.read_bytes()
        for trace in (b"site-packages", b"/tmp", os.getcwd().encode(), str(Path.home()).encode()):
            assert trace not in content, (path.name, trace)


_TWICE = """
import sys, numpy as np, tiny
from ffmerge.exporter.package import export
from ffmerge.models import checkpoint, tasks
from ffmerge.config import MergeConfig
from ffmerge.passes.weights.merge import merge_
model = tiny.gpt2(layers=2)
merge_(model, {"input_ids": np.arange(90).reshape(9, 10)}, MergeConfig(k=2, method="permute"))
checkpoint.save(model, sys.argv[1] + "/checkpoint")
export(model, sys.argv[1] + "/package")
"""


def test_same_input_same_bytes_under_any_hash_seed(tmp_path: Path) -> None:
    folders = []
    for seed in ("1", "2"):
        environment = {
            **os.environ,
            "PYTHONHASHSEED": seed,
            "PYTHONPATH": str(Path(__file__).parent),
        }
        folders.append(tmp_path / seed)
        folders[-1].mkdir()
        command = [sys.executable, "-c", _TWICE, str(folders[-1])]
        subprocess.run(command, check=True, env=environment, capture_output=True)
    first, second = ({p.relative_to(f): p for p in f.rglob("*") if p.is_file()} for f in folders)
    assert set(first) == set(second)
    assert {"model.onnx", "model.onnx_data", "config.json", "ffmerge.json"} <= {
        p.name for p in first
    }
    for relative, path in first.items():
        assert path.read_bytes() == second[relative].read_bytes(), relative


_KILLED = """
import os, signal, sys, tiny
from ffmerge.exporter.package import Manifest, export
Manifest.write = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
export(tiny.vit(layers=2), sys.argv[1])
"""


def test_a_killed_export_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", _KILLED, str(tmp_path / "package")]
    done = subprocess.run(command, env=environment, capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "package").exists()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".package.partial-")
    assert not (left / "ffmerge.json").exists()
    with pytest.raises(InputError, match=r"is no package, as it holds no ffmerge\.json"):
        Manifest.read(left)
    (tmp_path / "package").mkdir()  # as ffmerge compress has one below what it writes
    write_json(tmp_path / "package" / "ffmerge.json", {})
    with pytest.raises(InputError, match=f"give {re.escape(str(tmp_path / 'package'))}"):
        Manifest.read(tmp_path)


def test_a_failed_export_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Manifest, "write", full)
    with pytest.raises(InputError, match="No space left on device"):
        export(vit(layers=2), tmp_path / "package")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not serve text-generation"):
        export(vit(layers=2), tmp_path / "a", ExportConfig(task="text-generation"))
    with pytest.raises(InputError, match="task 'dreaming' is not served"):
        export(vit(layers=2), tmp_path / "b", ExportConfig(task="dreaming"))
    with pytest.raises(ExportError, match="float32"):
        export(gpt2(layers=2).half(), tmp_path / "c")
    assert list(tmp_path.iterdir()) == []


def test_what_the_optimizer_notes_is_not_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a pooling head by PyTorch's own attention it says which constants it leaves."""
    export(model_of(*CASES[index_of("SiglipModel")][:3]), tmp_path / "package")
    noted = [each for each in caplog.records if each.name.startswith(("onnxscript", "torch.onnx"))]
    assert [each.message for each in noted if each.levelno >= logging.WARNING] == []


def test_a_checkpoint_travels_through(tmp_path: Path) -> None:
    """Saved, loaded and exported, the tie is still one initializer."""
    model = vit(layers=4)
    merge_(model, _inputs("vit", 4), MergeConfig(window=(0, 3), method="average"))
    checkpoint.save(model, tmp_path / "checkpoint")
    package = export(
        checkpoint.load(tmp_path / "checkpoint"),
        tmp_path / "package",
        source=tmp_path / "checkpoint",
    )
    assert [len(tie.members) for tie in package.manifest.ties] == [4] * 4
    assert list(package.manifest.source["files"]) == ["model.ffmerge.safetensors"]


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("BertForMaskedLM", "fill-mask"),  # its head's bias stands in two places, one never used
        ("DeiTForImageClassification", "image-classification"),  # optimum has no task for it
        ("Phi3ForCausalLM", "text-generation-with-past"),  # fused gate and up projection
        ("BertModel", "feature-extraction"),
        ("BertForQuestionAnswering", "question-answering"),
    ],
)
def test_other_tasks_and_families(name: str, task: str, tmp_path: Path) -> None:
    _, config, settings, _, _ = next(
        case
        for case in CASES
        if case[0] == name or (name.startswith("Bert") and "BertFor" in case[0])
    )
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config)(**settings)).eval()
    merge_(model, None, MergeConfig(window=(0, 1), method="average"))
    package = export(model, tmp_path / "package")
    assert package.manifest.task == task
    assert audit(package.path).ok
    outputs = [o for p in validate(package.path).providers for o in p.outputs]
    named = {o.name for o in outputs if not o.name.startswith("present.")}
    assert named == set(tasks.OUTPUTS[tasks.base(task)])
    for output in outputs:
        assert output.max_abs is not None and output.max_abs < 5e-6  # measured 7.2e-7


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "OlmoForCausalLM"])
@pytest.mark.parametrize("dtype", ["fp32", pytest.param("int4", marks=pytest.mark.slow)])
def test_no_weight_is_held_when_the_package_is_made(dtype: str, name: str, tmp_path: Path) -> None:
    """A process that exports one model after another must not add them up.

    Rotated positions slice, and the optimizer's rule for slices is held by no other node.
    """
    model = model_of(*CASES[index_of(name)][:3])
    weights = [weakref.ref(parameter) for parameter in model.parameters()]
    export(model, tmp_path / "package", ExportConfig(dtype=dtype))
    del model
    gc.collect()
    assert [w() for w in weights if w() is not None] == []


# four graphs take most of a minute
@pytest.mark.parametrize("name", ["digits", pytest.param("numerals", marks=pytest.mark.slow)])
def test_static_int8_takes_its_ranges_from_the_data(name: str, tmp_path: Path) -> None:
    """Every graph of the package has ranges of its own, also a later step of a decoder."""
    reference = REFERENCES[name]
    model = checkpoint.load(reference.folder)
    config = ExportConfig(dtype="int8-static")
    package = export(model, tmp_path / "p", config, data=reference.load("test"))
    for record in package.manifest.graphs:
        if not record.parts:
            graph = read_model(package.path / record.path).graph
            assert sum(node.op_type == "QuantizeLinear" for node in graph) > 10
    assert validate(package.path).ok
    with pytest.raises(InputError, match="int8-static takes its ranges from data"):
        export(model, tmp_path / "q", config)
    assert not (tmp_path / "q").exists()


def test_static_int8_is_not_compared_on_the_rows_that_gave_its_ranges() -> None:
    pixels = np.random.default_rng(0).standard_normal((40, 3, 16, 16)).astype(np.float32)
    plan = make_plan(
        vit(layers=2), ExportConfig(dtype="int8-static"), None, {"pixel_values": pixels}
    )
    compared = {row.tobytes() for row in plan.rows["pixel_values"]}
    ranging = {row.tobytes() for each in plan.calibration["model"] for row in each["pixel_values"]}
    assert len(compared) == len(ranging) == 20
    assert not compared & ranging
    assert compared | ranging == {row.tobytes() for row in pixels}


@pytest.mark.parametrize("profile", ["portable", "cpu"])
def test_pytorch_computes_nothing_twice(profile: str, tmp_path: Path) -> None:
    """Each input once, and once in float64, by which it is seen that answers are alike, too.

    Beside what is computed with another attention, to see whether that gives the same.
    """
    processor = transformers.ViTImageProcessor(size={"height": 16, "width": 16})
    processor.save_pretrained(tmp_path)
    model, seen = vit(layers=2), list[tuple[bytes, bool]]()

    def look(_: Any, __: Any, given: dict[str, Any]) -> None:
        pixels = given["pixel_values"]
        own = model.config._attn_implementation != FUNCTION
        if own and not isinstance(pixels, FakeTensor):  # of a trace, in which nothing is computed
            exact = (pixels + 0).dtype == torch.float64
            seen.append((pixels.numpy().astype(np.float32).tobytes(), exact))

    model.register_forward_pre_hook(look, with_kwargs=True)
    export(model, tmp_path / "p", ExportConfig(profile=profile), source=tmp_path)
    (graph,) = Manifest.read(tmp_path / "p").graphs
    stored = read_reference(tmp_path / "p")
    cases = [stored.feeds(graph, case)["pixel_values"].tobytes() for case in range(4)]
    for case in cases:
        assert (seen.count((case, False)), seen.count((case, True))) == (1, 1)


def test_a_model_in_training_is_exported_as_it_is_used(tmp_path: Path) -> None:
    model = bert(layers=2)
    assert model.config.hidden_dropout_prob > 0
    files = [export(m, tmp_path / str(m.training)).path for m in (model, model.train())]
    one, other = ((file / "model.onnx").read_bytes() for file in files)
    assert one == other


def test_an_answer_is_to_the_same_inputs_only() -> None:
    model = vit(layers=2)
    (graph,) = graphs(model, "image-classification")
    feeds = graph.probe.draw(1)
    changed = {"pixel_values": feeds["pixel_values"].copy()}
    changed["pixel_values"][0, 0, 0, 0] += 1
    wide = {"pixel_values": feeds["pixel_values"].astype(np.float64)}
    known = graph.knowing(feeds, {"logits": torch.ones(1)})
    for other in (changed, wide, {**feeds, "labels": np.zeros(1)}, graph.probe.draw(2)):
        assert not known.answers[-1].is_to(other, False)
    assert not known.answers[-1].is_to(feeds, True)
    np.testing.assert_array_equal(known.answer(changed)["logits"], graph.run(changed)["logits"])
    assert known.answer({"pixel_values": feeds["pixel_values"].copy()})["logits"] == [1]
    assert known.run(feeds)["logits"].shape == (len(feeds["pixel_values"]), 7)


def test_the_source_is_the_folder_that_a_model_was_loaded_from(tmp_path: Path) -> None:
    checkpoint.save(vit(layers=2), tmp_path / "model")
    processor = transformers.ViTImageProcessor(size={"height": 16, "width": 16})
    processor.save_pretrained(tmp_path / "model")
    package = export(checkpoint.load(tmp_path / "model"), tmp_path / "p")
    assert (tmp_path / "p" / "preprocessor_config.json").exists()
    assert list(package.manifest.source["files"])
    assert repr(package).startswith(f"<Package {tmp_path / 'p'}: image-classification, fp32, ")
    assert "<td>model.onnx_data" in package._repr_html_()
