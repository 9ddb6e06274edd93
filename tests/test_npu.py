"""``export --for npu``: one row of one size, 8 bits of weights and 16 of activations, and serving.

No NPU computes here: the graphs are looked at, and run by ONNX Runtime's CPU.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny
import torch
from architectures import CASES, index_of, merge_all, model_of
from npu import known_sizes
from tiny_wider import t5
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForTokenClassification,
    BertModel,
    ConvBertConfig,
    ConvBertModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    FNetConfig,
    FNetModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedTokenizerFast,
)

import ffmerge
from ffmerge.config import CompressConfig, ExportConfig
from ffmerge.errors import FfmergeWarning, InputError
from ffmerge.exporter.package import export
from ffmerge.exporter.plan import make_plan
from ffmerge.models.codes import range_scale
from ffmerge.models.data import as_examples
from ffmerge.models.manifest import Manifest
from ffmerge.passes.graph.audit import audit
from ffmerge.runtime_tests.reference import read_reference
from ffmerge.runtime_tests.validate import check_package

GPT2 = {
    "n_layer": 1, "n_head": 2, "n_embd": 32, "vocab_size": 97, "n_positions": 32, "num_labels": 3,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
NPU, NPU_FP32 = ExportConfig(profile="npu"), ExportConfig(profile="npu", dtype="fp32")


def texts(rows: int, length: int, seed: int = 0) -> dict[str, Any]:
    """Return rows of ids padded behind by unlike amounts."""
    mask = (np.arange(length) < length - np.arange(rows)[:, None] % length).astype(np.int64)
    ids = np.random.default_rng(seed).integers(3, 60, (rows, length)) * mask
    return {"input_ids": ids, "attention_mask": mask}


def shapes(path: Path) -> dict[str, list[int]]:
    """Return the sizes of a graph's inputs and outputs; 0 is one that is not known."""
    graph = onnx.load(path, load_external_data=False).graph
    values = [*graph.input, *graph.output]
    return {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}


@pytest.fixture(scope="module")
def encoder() -> Any:
    """Return a merged encoder whose states are as wide as its rows are long: 64."""
    model = BertModel(tiny.bert(layers=3).config).eval()
    assert merge_all(model)
    return model


@pytest.fixture(scope="module")
def package(encoder: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return export(encoder, tmp_path_factory.mktemp("npu") / "package", NPU, data=texts(12, 9))


def test_every_size_is_known_and_products_read_16_bits(package: Any) -> None:
    manifest = Manifest.read(package.path)
    assert (manifest.profile, manifest.dtypes, manifest.opset) == ("npu", ("int8-static",), 21)
    path = package.path / "model.onnx"
    found = shapes(path)
    assert found["input_ids"] == found["attention_mask"] == [1, 64]
    assert found["last_hidden_state"] == [1, 64, 64] and all(map(all, found.values()))
    known, values = known_sizes(path)
    assert known == values > 100
    model = onnx.load(path)
    held = {each.name: onnx.numpy_helper.to_array(each) for each in model.graph.initializer}
    made_by = {name: node for node in model.graph.node for name in node.output}
    products = 0
    for node in model.graph.node:
        if node.op_type == "MatMul":
            products += 1
            for name in node.input:
                codes, scale, *zero = made_by[name].input  # of a DequantizeLinear
                if codes in held:
                    assert held[codes].dtype == np.int8
                    assert len(held[scale]) == held[codes].shape[1]  # one for each channel
                else:
                    assert held[zero[0]].dtype == np.uint16
    assert products == 3 * (4 + 2 + 2)
    assert audit(package.path).ok and len(manifest.ties) > 0


def test_real_rows_are_compared_one_by_one(package: Any, encoder: Any) -> None:
    """Six rows of nine tokens in the file; PyTorch's outputs are those of 64."""
    result = check_package(package.path)
    assert result.ok, [output.reason for output in result.providers[0].outputs]
    (graph,) = Manifest.read(package.path).graphs
    reference = read_reference(package.path)
    assert reference.real(graph)["input_ids"].shape == (6, 9)
    cases = result.providers[0].outputs[0].cases
    assert [case.real for case in cases] == [False, False, False, True]
    given = {k: torch.tensor(v) for k, v in reference.feeds(graph, 3).items()}
    with torch.no_grad():
        expected = encoder(**given).last_hidden_state
    assert expected.shape == (6, 64, 64)
    assert np.allclose(reference.expected(graph, 3, "last_hidden_state"), expected.reshape(-1))
    trace = reference.trace(graph)
    assert trace and {value.shape[0] for value in trace if len(value.shape) == 3} == {1}


@pytest.mark.parametrize("length", [1, 5, 64])
def test_a_package_pads_what_it_is_given(length: int, encoder: Any, tmp_path: Path) -> None:
    loaded = ffmerge.load_package(export(encoder, tmp_path / "package", NPU_FP32).path)
    given = {name: torch.tensor(array) for name, array in texts(3, length).items()}
    for kept in (["input_ids", "attention_mask"], ["input_ids"]):
        asked = {name: given[name] for name in kept}
        found = loaded(**asked)
        with torch.no_grad():
            expected = encoder(**asked)
        for name in found:
            assert found[name].shape == expected[name].shape
            # measured 1.4e-6
            assert torch.allclose(found[name], expected[name], rtol=0, atol=1e-5)
    with pytest.raises(InputError, match="input_ids is 65 a row, and the package takes 64: cut"):
        loaded(input_ids=torch.ones(1, 65, dtype=torch.int64))


def test_classes_are_not_cut_as_tokens_are(tmp_path: Path) -> None:
    """Three classes of rows of two tokens."""
    model, given = tiny.bert(layers=1), texts(3, 2)
    loaded = ffmerge.load_package(export(model, tmp_path / "package", NPU_FP32).path)
    assert loaded(**{k: torch.tensor(v) for k, v in given.items()}).logits.shape == (3, 3)


def test_what_reads_no_mask_is_given_whole_rows(tmp_path: Path) -> None:
    """Padding would change what other tokens get."""
    config = FNetConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=1, intermediate_size=32,
        max_position_embeddings=16,
    )  # fmt: skip
    loaded = ffmerge.load_package(export(FNetModel(config).eval(), tmp_path / "p", NPU_FP32).path)
    ids = torch.arange(3, 19)[None]
    assert loaded(input_ids=ids).last_hidden_state.shape == (1, 16, 16)
    with pytest.raises(InputError, match="is 15 a row, and the package takes 16: it reads no mask"):
        loaded(input_ids=ids[:, :15])


def test_a_row_is_padded_as_the_configuration_says(tmp_path: Path) -> None:
    """The class is told at the last token that is none."""
    loaded_from = GPT2ForSequenceClassification(GPT2Config(**GPT2, pad_token_id=96)).eval()
    loaded = ffmerge.load_package(export(loaded_from, tmp_path / "p", NPU_FP32).path)
    ids = torch.arange(3, 13).reshape(2, 5)
    with torch.no_grad():
        expected = loaded_from(ids).logits
    # measured 3e-8; 0.05 where it was padded with 0
    assert torch.allclose(loaded(ids).logits, expected, rtol=0, atol=1e-5)


def test_what_reads_padding_in_spite_of_its_mask_is_said(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """A convolution of ConvBERT does; BERT's states are those of the tokens alone."""
    config = ConvBertConfig(
        hidden_size=32, embedding_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, vocab_size=97, max_position_embeddings=32,
    )  # fmt: skip
    with pytest.warns(FfmergeWarning, match="ConvBertModel depends on the padding"):
        export(ConvBertModel(config).eval(), tmp_path / "p", NPU_FP32)
    recwarn.clear()
    export(tiny.bert(layers=1), tmp_path / "q", NPU_FP32)
    assert not [each for each in recwarn if "padding" in str(each.message)]


def test_what_padding_would_hide_is_refused(encoder: Any, tmp_path: Path) -> None:
    loaded = ffmerge.load_package(export(encoder, tmp_path / "package", NPU_FP32).path)
    ids = torch.full((2, 5), 7)
    for mask, told in (
        (torch.ones(2, 4), "attention_mask is 2x4, and by the other inputs 2x5"),
        (torch.ones(3, 5), "attention_mask is 3x5, and by the other inputs 2x5"),
    ):
        with pytest.raises(InputError, match=told):
            loaded(input_ids=ids, attention_mask=mask.long())
    with pytest.raises(InputError, match="input_ids is one number a row, and the package takes 64"):
        loaded(input_ids=ids[0])
    with pytest.raises(InputError, match="no rows are given"):
        loaded(input_ids=ids[:0])


def test_pictures_are_of_the_size_of_the_checkpoint(tmp_path: Path) -> None:
    """Also where the model takes others."""
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4,
        num_labels=7,
    )  # fmt: skip
    model = Dinov2ForImageClassification(config).eval()
    pixels = np.random.default_rng(0).standard_normal((8, 3, 16, 16)).astype(np.float32)
    package = export(model, tmp_path / "p", NPU, data={"pixel_values": pixels})
    assert shapes(package.path / "model.onnx") == {"pixel_values": [1, 3, 16, 16], "logits": [1, 7]}
    assert check_package(package.path).ok
    loaded = ffmerge.load_package(package.path)
    assert loaded(pixel_values=torch.tensor(pixels)).logits.shape == (8, 7)
    for height in (12, 24):
        told = f"3x{height}x16 a row, and the package takes 3x16x16: resize pictures to that, or"
        with pytest.raises(InputError, match=told):
            loaded(pixel_values=torch.zeros(1, 3, height, 16))


def test_an_example_says_the_sizes(encoder: Any, tmp_path: Path) -> None:
    np.savez(tmp_path / "rows.npz", **texts(2, 24))
    config = ExportConfig(profile="npu", dtype="fp16", example=tmp_path / "rows.npz")
    package = export(encoder, tmp_path / "package", config)
    assert shapes(package.path / "model.onnx")["input_ids"] == [1, 24]
    assert check_package(package.path).ok
    np.savez(tmp_path / "long.npz", **texts(2, 65))
    config = ExportConfig(profile="npu", dtype="fp16", example=tmp_path / "long.npz")
    with pytest.raises(InputError, match="BertModel does not run on the inputs"):
        export(encoder, tmp_path / "long", config)
    model = GPT2ForSequenceClassification(GPT2Config(**GPT2)).eval()
    with pytest.raises(InputError, match=r"does not run on the inputs .* no padding token"):
        export(model, tmp_path / "two", NPU_FP32)


def test_a_metric_of_tokens_is_measured_without_padding(tmp_path: Path) -> None:
    config = BertConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        vocab_size=97, max_position_embeddings=32, num_labels=3,
    )  # fmt: skip
    model = BertForTokenClassification(config).eval()
    data = texts(12, 9)
    data["labels"] = np.where(data["attention_mask"], data["input_ids"] % 3, -100)
    package = export(model, tmp_path / "p", NPU_FP32, data=data)
    assert shapes(package.path / "model.onnx")["logits"] == [1, 32, 3]
    (result,) = check_package(package.path).providers
    with torch.no_grad():
        logits = model(**{k: torch.tensor(v) for k, v in data.items() if k != "labels"}).logits
    counted = data["labels"] >= 0
    accuracy = (logits.argmax(-1).numpy() == data["labels"])[counted].mean()
    assert result.sample is not None and result.sample.examples == 12
    assert result.sample.value == pytest.approx(accuracy) == package.manifest.metric.value


def test_the_tokenizer_of_a_package_cuts(encoder: Any, tmp_path: Path) -> None:
    """Text of the data is tokens of the checkpoint's tokenizer, cut to the size of a row."""
    words = {"<unk>": 0, "<pad>": 1, **{f"w{i}": i for i in range(2, 90)}}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", unk_token="<unk>", model_max_length=512
    )
    ffmerge.save(encoder, tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    lines = [" ".join(f"w{2 + (i * j) % 80}" for j in range(5 + 20 * i)) for i in range(1, 7)]
    (tmp_path / "lines.txt").write_text("\n".join(lines))
    data = str(tmp_path / "lines.txt")
    package = export(encoder, tmp_path / "package", NPU, tmp_path / "model", data=data)
    (graph,) = package.manifest.graphs
    assert read_reference(package.path).real(graph)["input_ids"].shape == (3, 64)
    padded = graph.probe.complete({"input_ids": np.array([[5, 6, 7]])})
    assert padded["input_ids"].tolist() == [[5, 6, 7] + [1] * 61]
    assert padded["attention_mask"].tolist() == [[1] * 3 + [0] * 61]
    about = json.loads((package.path / "tokenizer_config.json").read_text())
    assert about["model_max_length"] == 64
    read = PreTrainedTokenizerFast.from_pretrained(package.path)
    loaded = ffmerge.load_package(package.path)
    tokens = read(lines, truncation=True, padding=True, return_tensors="pt")
    assert loaded(tokens.input_ids, tokens.attention_mask).last_hidden_state.shape == (6, 64, 64)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"dtype": "int4"}, "npu has no kernels for int4: choose one of int8-static, fp16, fp32"),
        ({"dtype": "int8"}, "npu has no kernels for int8:"),
        ({"opset": 20}, "for npu the opset is 21, not 20"),
    ],
)
def test_what_an_npu_lacks_is_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        ExportConfig(profile="npu", **settings)


def test_what_has_no_form_of_one_size_is_refused(encoder: Any, tmp_path: Path) -> None:
    for model in (tiny.gpt2(layers=1), t5(1, 1)):
        with pytest.raises(InputError, match=r"fixes every size, and text.* puts token behind"):
            export(model, tmp_path / "p", NPU_FP32)
    with pytest.raises(InputError, match="int8-static takes its ranges from data: give --data"):
        export(encoder, tmp_path / "p", NPU)
    with pytest.raises(InputError, match="compress tries no precision for npu"):
        CompressConfig(profile="npu")
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("Wav2Vec2ForCTC", "no size is known for samples: give --example FILE.npz"),
        ("CLIPModel", "the inputs of CLIPModel are not rows of one batch"),
        ("WhisperForConditionalGeneration", "an encoder and its decoder have no form"),
    ],
)
def test_what_has_no_one_size_of_a_row_is_refused(name: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=told):
        export(model_of(*CASES[index_of(name)][:3]), tmp_path / "p", NPU_FP32)


def test_sound_is_of_the_length_of_an_example(tmp_path: Path) -> None:
    model = model_of(*CASES[index_of("Wav2Vec2ForCTC")][:3])
    samples = np.random.default_rng(0).standard_normal((3, 400)).astype(np.float32)
    np.savez(tmp_path / "rows.npz", input_values=samples)
    config = ExportConfig(profile="npu", dtype="fp32", example=tmp_path / "rows.npz")
    loaded = ffmerge.load_package(export(model, tmp_path / "p", config).path)
    given = torch.tensor(samples)
    with torch.no_grad():
        expected = model(given).logits
    # measured 2.2e-7
    assert torch.allclose(loaded(given).logits, expected, rtol=0, atol=1e-5)
    with pytest.raises(InputError, match="input_values is 300 a row, and the package takes 400"):
        loaded(given[:, :300])


def test_rows_of_the_data_fill_the_size_of_the_graph() -> None:
    """Those that are compared, and those that ranges are of: not the 64 tokens of other graphs."""
    config = BertConfig(**{**tiny.bert(layers=1).config.to_dict(), "max_position_embeddings": 128})
    ids = np.random.default_rng(0).integers(3, 60, (12, 100))
    rows = as_examples({"input_ids": ids, "attention_mask": np.ones_like(ids)})
    plan = make_plan(BertModel(config).eval(), NPU, None, rows)
    assert plan.rows["attention_mask"].sum(1).tolist() == [100] * len(plan.rows["input_ids"])
    for batch in plan.calibration["model"]:
        assert (batch["attention_mask"].sum(1) == 100).all()


def test_the_format_of_onnx_runtime_is_made_of_it(encoder: Any, tmp_path: Path) -> None:
    made = export(encoder, tmp_path / "p", replace(NPU_FP32, ort=True), data=texts(6, 9))
    assert [variant.kind for variant in made.manifest.variants] == ["ort"]
    assert check_package(made.path).ok


def test_a_range_in_16_bits() -> None:
    """-1 to 3 in 65,536 steps: zero is a quarter of them from below."""
    scale, zero = range_scale(-1.0, 3.0, 16)
    assert zero.dtype == np.uint16 and zero == 16384
    assert scale == np.float32(4 / 65535)
