"""Packages that generate: token by token the same as PyTorch, and without its weights."""

import json
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import pytest
import torch
from architectures import CASES, GENERATE, exported, index_of, model_of
from tiny import gpt2, vit

import ffmerge
from ffmerge.config import ExportConfig
from ffmerge.errors import InputError, RuntimeCheckError
from ffmerge.exporter.package import export
from ffmerge.models.examples import from_arrays
from ffmerge.models.manifest import Manifest
from ffmerge.passes.graph.audit import audit
from ffmerge.runtime_tests.validate import validate

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beam-4": {"num_beams": 4, "do_sample": False},
    "sampling": {"do_sample": True, "top_k": 0, "temperature": 2.0},
    "no cache": {"do_sample": False, "use_cache": False},
}
NEW = 8


def _inputs(model: Any, rows: int, length: int) -> dict[str, torch.Tensor]:
    """Return prompts of unlike length: padded on the left, for encoders on the right."""
    generator = torch.Generator().manual_seed(length)
    config = model.config
    if hasattr(config, "num_mel_bins"):
        shape = (rows, config.num_mel_bins, 2 * config.max_source_positions)
        return {"input_features": torch.randn(shape, generator=generator)}
    ids = torch.randint(3, 60, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(rows):
        padding = 2 * row % length
        if config.is_encoder_decoder:
            mask[row, length - padding :] = 0
        else:
            mask[row, :padding] = 0
    pad = config.pad_token_id or 0
    return {"input_ids": torch.where(mask == 1, ids, pad), "attention_mask": mask}


def _generate(model: Any, inputs: dict[str, torch.Tensor], **settings: Any) -> torch.Tensor:
    torch.manual_seed(7)
    tokens = {"max_new_tokens": NEW, "min_new_tokens": NEW, "pad_token_id": 0}
    ids: torch.Tensor = model.generate(**inputs, **tokens, **settings)
    return ids


Case = tuple[Any, Path]


@pytest.fixture(params=GENERATE)
def served(request: pytest.FixtureRequest) -> Case:
    model, package = exported(index_of(request.param))
    return model, package.path


def _tiny(name: str, **settings: Any) -> Any:
    """Return a case's model with one layer on each side."""
    _, config, known, _, _ = CASES[index_of(name)]
    return model_of(name, config, {**known, "encoder_layers": 1, "decoder_layers": 1, **settings})


@pytest.mark.parametrize("way", WAYS)
def test_generate_gives_the_tokens_of_pytorch(served: Case, way: str) -> None:
    model, path = served
    loaded = ffmerge.load_package(path)
    assert type(loaded).__name__ == type(model).__name__
    seen = set()
    for rows, length in ((1, 1), (3, 7), (2, 40)):  # one token, padded rows, a long prompt
        inputs = _inputs(model, rows, length)
        expected = _generate(model, inputs, **WAYS[way])
        assert torch.equal(_generate(loaded, inputs, **WAYS[way]), expected)
        seen.update(expected.unique().tolist())
    if way == "sampling":  # the others may repeat one token: the weights are random
        assert len(seen) > 15


def test_no_weight_of_pytorch_is_held(served: Case) -> None:
    _, path = served
    loaded = ffmerge.load_package(path)
    assert {p.device.type for p in loaded.parameters()} == {"meta"}
    assert loaded.device.type == "cpu"


def test_forward_continues_a_cache(served: Case) -> None:
    """Two calls with the cache of the first give what one call gives."""
    model, path = served
    loaded = ffmerge.load_package(path)
    if model.config.is_encoder_decoder:
        inputs = _inputs(model, 2, 5)
        decoder = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])
        whole = loaded(**inputs, decoder_input_ids=decoder)
        first = loaded(**inputs, decoder_input_ids=decoder[:, :3])
        then = loaded(
            **inputs, encoder_outputs=(first.encoder_last_hidden_state,),
            decoder_input_ids=decoder[:, 3:], past_key_values=first.past_key_values,
        )  # fmt: skip
        with torch.no_grad():
            expected = model(**inputs, decoder_input_ids=decoder).logits
    else:
        inputs = {"input_ids": torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])}
        whole = loaded(**inputs)
        first = loaded(input_ids=inputs["input_ids"][:, :3])
        then = loaded(input_ids=inputs["input_ids"][:, 3:], past_key_values=first.past_key_values)
        with torch.no_grad():
            expected = model(**inputs).logits
    assert then.past_key_values.get_seq_length() == 4
    assert (whole.logits - expected).abs().max() < 5e-6  # measured 9.5e-7
    assert (then.logits[:, -1] - expected[:, -1]).abs().max() < 5e-6  # measured 9.5e-7


def test_forward_counts_positions_as_pytorch_does(served: Case) -> None:
    """Padded on the left and told no positions, PyTorch counts the padding, so does the package."""
    model, path = served
    inputs = _inputs(model, 3, 7)
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.tensor([[3, 4, 5]] * 3)
    with torch.no_grad():
        expected = model(**inputs).logits
    got = ffmerge.load_package(path)(**inputs).logits
    real = torch.ones(got.shape[:2], dtype=torch.bool)
    if not model.config.is_encoder_decoder:
        real = inputs["attention_mask"].bool()
    assert (got - expected)[real].abs().max() < 5e-6  # measured 7.7e-7


def test_the_package_keeps_its_promises(served: Case) -> None:
    _, path = served
    found = audit(path)
    assert found.ok
    result = validate(path)
    assert result.ok, [p.reason for p in result.providers]
    assert {o.graph for p in result.providers for o in p.outputs} == {
        graph.path for graph in Manifest.read(path).graphs
    }


def test_the_task_metric_is_that_of_pytorch(served: Case) -> None:
    """Perplexity over the labels, padded ones ignored; the loss is PyTorch's own."""
    model, path = served
    inputs = _inputs(model, 3, 7)
    if model.config.is_encoder_decoder:
        labels = torch.randint(3, 60, (3, 4), generator=torch.Generator().manual_seed(1))
        labels[2, 2:] = -100
        given = {**inputs, "decoder_input_ids": torch.full((3, 4), 5), "labels": labels}
    else:  # padded on the right: what a padded position foretells is nobody's
        inputs = given = {name: x.flip(-1) for name, x in inputs.items()}
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    with torch.no_grad():
        loss = model(**{**given, "labels": labels}).loss
    data = from_arrays({name: x.numpy() for name, x in given.items()})
    metric = validate(path, data=data).metric
    if "Whisper" in type(model).__name__:
        assert metric is None  # speech is not measured by perplexity here
        return
    assert metric is not None and metric.examples == 3
    assert metric.value == pytest.approx(float(loss.exp()), rel=4e-6)  # measured 4.7e-7


def test_inputs_and_outputs_are_called_as_optimum_calls_them(served: Case) -> None:
    model, path = served
    names = {
        file.name: (
            [node.name for node in session.get_inputs()],
            [node.name for node in session.get_outputs()],
            {dim for node in session.get_inputs() for dim in node.shape[:1]},
        )
        for file in path.glob("*.onnx")
        for session in [ort.InferenceSession(file)]
    }
    assert all(first <= {"batch_size", 1} for *_, first in names.values())  # 1: the flag
    if not model.config.is_encoder_decoder:
        inputs, outputs, _ = names["model.onnx"]
        assert inputs[:3] == ["input_ids", "attention_mask", "position_ids"]
        assert inputs[3:5] == ["past_key_values.0.key", "past_key_values.0.value"]
        assert outputs[:3] == ["logits", "present.0.key", "present.0.value"]
        return
    sides = [f"{s}.{part}" for s in ("decoder", "encoder") for part in ("key", "value")]
    assert set(names) == {
        "encoder_model.onnx", "decoder_model.onnx", "decoder_with_past_model.onnx",
        "decoder_model_merged.onnx",
    }  # fmt: skip
    inputs, outputs, _ = names["decoder_model_merged.onnx"]
    assert [n for n in inputs if ".0." in n] == [f"past_key_values.0.{side}" for side in sides]
    assert outputs[:5] == ["logits", *(f"present.0.{side}" for side in sides)]
    assert {"input_ids", "encoder_hidden_states", "use_cache_branch"} <= set(inputs)
    assert "encoder_hidden_states" not in names["decoder_with_past_model.onnx"][0]


def test_all_graphs_read_one_data_file(served: Case) -> None:
    """What encoder, decoder and decoder with past share is on disk once."""
    model, path = served
    distinct = {
        (tuple(p.shape), p.detach().numpy().tobytes()) for p in model.parameters()
    }  # sinusoidal positions of encoder and decoder are equal and trained by nobody
    size = sum(len(content) for _, content in distinct)
    written = (path / "model.onnx_data").stat().st_size
    assert [p.name for p in path.glob("*data*")] == ["model.onnx_data"]
    assert written <= size  # measured 0.995 to 0.999 of it: small tensors stand in the graphs


def test_without_a_cache(tmp_path: Path) -> None:
    model = gpt2(layers=2)
    package = export(model, tmp_path / "package", ExportConfig(task="text-generation"))
    assert [graph.outputs for graph in package.manifest.graphs] == [("logits",)]
    loaded = ffmerge.load_package(package.path)
    inputs = _inputs(model, 3, 7)
    assert torch.equal(_generate(loaded, inputs), _generate(model, inputs, use_cache=False))


def test_an_encoder_decoder_without_a_cache(tmp_path: Path) -> None:
    model = _tiny("MarianMTModel")
    package = export(model, tmp_path / "package", ExportConfig(task="text2text-generation"))
    assert [graph.path for graph in package.manifest.graphs] == [
        "encoder_model.onnx", "decoder_model.onnx",
    ]  # fmt: skip
    loaded = ffmerge.load_package(package.path)
    inputs = _inputs(model, 3, 7)
    assert torch.equal(
        _generate(loaded, inputs, num_beams=2), _generate(model, inputs, num_beams=2)
    )


def test_other_classes_and_forms(tmp_path: Path) -> None:
    model = vit(layers=2)
    export(model, tmp_path / "package", ExportConfig(ort=True, prepack=True))
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(pixels).logits
    for kind in ("onnx", "ort", "prepacked"):
        got = ffmerge.load_package(tmp_path / "package", kind=kind)(pixels).logits
        assert (got - expected).abs().max() < 2e-6  # measured 4.8e-7


def test_the_layout_of_transformers_js(tmp_path: Path) -> None:
    model = _tiny("MarianMTModel")
    config = ExportConfig(layout="transformers.js", dtype="int8")
    package = export(model, tmp_path / "package", config)
    files = {p.relative_to(package.path).as_posix() for p in package.path.rglob("*.onnx*")}
    assert files == {
        "onnx/encoder_model_quantized.onnx", "onnx/decoder_model_merged_quantized.onnx",
    }  # fmt: skip
    assert audit(package.path).ok
    assert validate(package.path).ok
    inputs = _inputs(model, 2, 5)
    shape = _generate(ffmerge.load_package(package.path), inputs).shape
    assert shape == _generate(model, inputs).shape


def test_transformers_js_is_told_of_data_beside_a_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ffmerge.exporter.write.PROTOBUF_LIMIT", 1000)  # really 2 GB
    package = export(vit(layers=2), tmp_path / "package", ExportConfig(layout="transformers.js"))
    assert (package.path / "onnx" / "model.onnx_data").stat().st_size > 100_000
    config = json.loads((package.path / "config.json").read_text())
    told = config["transformers.js_config"]["use_external_data_format"]
    assert told == {"model.onnx": True}
    assert validate(package.path).ok


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    export(vit(layers=2), tmp_path / "package")
    with pytest.raises(InputError, match=r"is no package, as it holds no ffmerge\.json"):
        ffmerge.load_package(tmp_path)
    with pytest.raises(RuntimeCheckError, match="WebGpuExecutionProvider"):
        ffmerge.load_package(tmp_path / "package", provider="webgpu")
    with pytest.raises(InputError, match=r"holds no .*'ort'"):
        ffmerge.load_package(tmp_path / "package", kind="ort")
    data = tmp_path / "package" / "model.onnx_data"
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(InputError, match="is not the file that"):
        ffmerge.load_package(tmp_path / "package")


def test_all_graphs_agree_on_the_form_of_a_quantized_weight(tmp_path: Path) -> None:
    """The table the encoder looks up is the matrix the decoder multiplies by: stored once."""
    model = _tiny("MarianMTModel", vocab_size=900, decoder_vocab_size=900)
    config = ExportConfig(task="text2text-generation", dtype="int8")
    export(model, tmp_path / "package", config)
    places = {}
    for path in (tmp_path / "package").glob("*.onnx"):
        table = onnx.load(path, load_external_data=False).graph.initializer
        (entry,) = (t for t in table if t.name == "model.shared.weight")
        assert entry.data_type == onnx.TensorProto.INT8
        places[path.name] = {e.key: e.value for e in entry.external_data}["offset"]
    assert len(places) == 2 and len(set(places.values())) == 1
    result = validate(tmp_path / "package")
    assert result.ok, [p.reason for p in result.providers]


def test_a_chunked_feed_forward_takes_any_length(tmp_path: Path) -> None:
    model = _tiny("BertForMaskedLM", chunk_size_feed_forward=4)
    export(model, tmp_path / "package")
    assert model.bert.encoder.layer[0].chunk_size_feed_forward == 4
    ids = torch.arange(24).reshape(3, 8)
    with torch.no_grad():
        expected = model(ids).logits
    loaded = ffmerge.load_package(tmp_path / "package")
    assert (loaded(ids).logits - expected).abs().max() < 1e-6  # measured 1.0e-7
    assert loaded(ids[:, :7]).logits.shape == (3, 7, 60)
