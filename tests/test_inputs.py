"""Inputs that are derived: what a model of each kind is given, with no list of models."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
import transformers as tf
from architectures import ED, T5, B, I, S
from tiny import gpt2

import ffmerge
from ffmerge.config import ExportConfig
from ffmerge.errors import InputError
from ffmerge.exporter.graphs import Graph, graphs
from ffmerge.exporter.package import export
from ffmerge.exporter.plan import make_plan
from ffmerge.exporter.settle import any_size, check_repeats, stand_ins
from ffmerge.exporter.torch_onnx import SizeError
from ffmerge.models import tasks
from ffmerge.models.derive import input_specs, left_out, of_example
from ffmerge.models.inspection import inspect
from ffmerge.runtime_tests.validate import validate

TEXT = {**B, "max_position_embeddings": 20}
CLIP = {**S, **I, "num_frames": 4, "num_labels": 3}
SOUND = {
    **S, "vocab_size": 20, "conv_dim": [8, 8], "conv_kernel": [3, 3], "conv_stride": [2, 2],
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
SERIES = {
    "context_length": 8, "prediction_length": 4, "lags_sequence": [1, 2], "num_time_features": 2,
    "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
}  # fmt: skip
PATCHES = {
    "context_length": 16, "patch_length": 4, "patch_stride": 4, "num_input_channels": 2,
    "d_model": 16, "prediction_length": 4, "num_attention_heads": 2,
}  # fmt: skip
TEXT_SHAPE = ("batch_size", "sequence_length")


def model_of(name: str, config: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    return getattr(tf, name)(getattr(tf, config)(**settings)).eval()


# class, configuration, settings, what is read beside text, picture or sound, and the task
KINDS = [
    ("BrosForTokenClassification", "BrosConfig", {**TEXT, "dim_bbox": 8}, None, None),
    (
        "LiltForTokenClassification", "LiltConfig",
        {**TEXT, "hidden_size": 24, "channel_shrink_ratio": 2, "max_2d_position_embeddings": 30},
        {"bbox": (*TEXT_SHAPE, 4)}, "token-classification",
    ),
    (
        "XLMForTokenClassification", "XLMConfig",
        {"vocab_size": 60, "emb_dim": 32, "n_layers": 2, "n_heads": 2, "n_langs": 3},
        {"langs": TEXT_SHAPE}, "token-classification",
    ),
    ("XmodForMaskedLM", "XmodConfig", {**TEXT, "languages": ["en", "de"]},
     {"lang_ids": ("batch_size",)}, "fill-mask"),
    ("ErnieForMaskedLM", "ErnieConfig", {**TEXT, "use_task_id": True, "task_type_vocab_size": 3},
     {"task_type_ids": TEXT_SHAPE}, "fill-mask"),
    ("FNetForMaskedLM", "FNetConfig", TEXT, {}, "fill-mask"),
    ("WavLMForCTC", "WavLMConfig", {**SOUND, "feat_extract_norm": "layer"},
     {"attention_mask": ("batch_size", "samples")}, "automatic-speech-recognition"),
    ("HubertForSequenceClassification", "HubertConfig", {**SOUND, "feat_extract_norm": "group"},
     {}, "audio-classification"),
    (
        "Wav2Vec2BertForCTC", "Wav2Vec2BertConfig",
        {**S, "vocab_size": 20, "feature_projection_input_dim": 8, "conv_depthwise_kernel_size": 3},
        {"input_features": ("batch_size", "frames", 8), "attention_mask": ("batch_size", "frames")},
        "automatic-speech-recognition",
    ),
    ("ASTModel", "ASTConfig", {**S, "max_length": 24, "num_mel_bins": 16},
     {"input_values": ("batch_size", 24, 16)}, "feature-extraction"),
    ("VivitForVideoClassification", "VivitConfig", {**CLIP, "tubelet_size": [2, 4, 4]},
     {"pixel_values": ("batch_size", 4, 3, 16, 16)}, "video-classification"),
    ("VideoMAEForVideoClassification", "VideoMAEConfig", CLIP,
     {"pixel_values": ("batch_size", 4, 3, 16, 16)}, "video-classification"),
    ("PatchTSMixerForPrediction", "PatchTSMixerConfig", PATCHES,
     {"past_values": ("batch_size", 16, 2)}, "time-series-forecasting"),
    (
        "TimeSeriesTransformerForPrediction", "TimeSeriesTransformerConfig",
        {**SERIES, "input_size": 3},
        {"past_values": ("batch_size", 10, 3), "future_values": ("batch_size", 4, 3),
         "past_time_features": ("batch_size", 10, 2), "past_observed_mask": ("batch_size", 10, 3)},
        "time-series-forecasting",
    ),
    (
        "AutoformerForPrediction", "AutoformerConfig",
        {**SERIES, "moving_average": 3, "label_length": 4, "num_static_real_features": 2,
         "num_static_categorical_features": 1, "cardinality": [5], "embedding_dimension": [2]},
        {"past_values": ("batch_size", 10), "static_real_features": ("batch_size", 2),
         "static_categorical_features": ("batch_size", 1)}, "time-series-forecasting",
    ),
    ("MT5EncoderModel", "MT5Config", T5, {}, "feature-extraction"),
    ("CLIPVisionModelWithProjection", "CLIPVisionConfig", {**S, **I}, {}, "feature-extraction"),
    ("DPRContextEncoder", "DPRConfig", TEXT, {}, "feature-extraction"),
    ("MBartForSequenceClassification", "MBartConfig", ED, {"decoder_input_ids": None},
     "text-classification"),
    ("MT5ForQuestionAnswering", "MT5Config", T5, {"decoder_input_ids": None}, "question-answering"),
    ("M2M100Model", "M2M100Config", ED,
     {"decoder_input_ids": ("batch_size", "decoder_sequence_length")}, "feature-extraction"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "config", "settings", "reads", "task"), KINDS, ids=[each[0] for each in KINDS]
)
def test_inputs_and_task_of_every_kind(
    name: str, config: str, settings: dict[str, Any], reads: dict[str, Any] | None, task: str
) -> None:
    """The graph's inputs are those, and PyTorch runs on what is drawn for them, padded or not."""
    model = model_of(name, config, **settings)
    if reads is None:
        with pytest.raises(InputError, match=r"--example FILE.npz, which holds .* bbox"):
            inspect(model)
        return
    shapes = {spec.name: spec.shape for spec in input_specs(model)}
    for argument, shape in reads.items():
        assert shapes.get(argument) == shape
    assert tasks.infer(model) == task
    (graph,) = graphs(model, task)
    for case in range(len(graph.probe.cases)):
        outputs = graph.run(graph.probe.draw(case))
        assert outputs and all(np.isfinite(array).all() for array in outputs.values())
    assert sum(map(len, inspect(model).stacks.values())) >= 1


def test_what_cannot_be_derived_is_named(tmp_path: Path) -> None:
    model = model_of("DecisionTransformerModel", "DecisionTransformerConfig", hidden_size=32)
    with pytest.raises(InputError, match=r"--example FILE.npz.* states, actions"):
        export(model, tmp_path / "package")
    assert not (tmp_path / "package").exists()


def test_an_example_says_what_the_inputs_are(tmp_path: Path, run: Any) -> None:
    """A row of every input: other numbers of rows are served, and it is a case of validate."""
    settings = {"hidden_size": 32, "n_layer": 2, "n_head": 2, "state_dim": 5, "act_dim": 3}
    model = model_of("DecisionTransformerModel", "DecisionTransformerConfig", **settings)
    generator = np.random.default_rng(0)
    rows = {
        "states": generator.standard_normal((2, 4, 5)).astype("f"),
        "actions": generator.standard_normal((2, 4, 3)).astype("f"),
        "returns_to_go": generator.standard_normal((2, 4, 1)).astype("f"),
        "timesteps": np.tile(np.arange(4), (2, 1)),
        "attention_mask": np.ones((2, 4), np.int64),
    }
    np.savez(tmp_path / "example.npz", **rows)
    model.save_pretrained(tmp_path / "checkpoint")
    example = ("--example", tmp_path / "example.npz", "--json")
    code, told, _ = run("export", tmp_path / "checkpoint", tmp_path / "package", *example)
    assert code == 0 and "rewards" in told["defaults"]
    call = {name: torch.tensor(np.concatenate([x, x[:1]])) for name, x in rows.items()}
    with torch.no_grad():
        expected = model(**call)
    got = ffmerge.load_package(tmp_path / "package")(**call)
    assert set(got) >= {"state_preds", "action_preds", "return_preds"}
    for name, tensor in got.items():
        assert (tensor - expected[name]).abs().max() < 1e-5
    result = validate(tmp_path / "package")
    assert result.ok
    cases = {case.case for p in result.providers for o in p.outputs for case in o.cases}
    assert max(cases) == 3
    np.savez(tmp_path / "other.npz", **rows, colours=rows["states"])
    with pytest.raises(InputError, match="takes no colours"):
        export(model, tmp_path / "other", ExportConfig(example=tmp_path / "other.npz"))


def test_an_example_leaves_dynamic_what_a_rule_knows() -> None:
    model = model_of("BertForMaskedLM", "BertConfig", **TEXT)
    arrays = {"input_ids": np.ones((1, 5), np.int64), "position_ids": np.arange(5)[None]}
    ids, positions = of_example(model, arrays)
    assert ids.shape == TEXT_SHAPE and ids.high == 60
    assert positions.shape == ("batch_size", 5) and positions.high == 5


def test_arguments_that_keep_their_default_are_told() -> None:
    model = model_of("BertForMaskedLM", "BertConfig", **TEXT)
    assert left_out(model, input_specs(model)) == ("position_ids",)


def test_what_a_graph_reads_is_not_told_as_kept_at_its_default(tmp_path: Path) -> None:
    """A decoder's graph reads positions, which its configuration alone does not tell."""
    found = export(gpt2(layers=1), tmp_path / "package")
    session = ort.InferenceSession(tmp_path / "package" / "model.onnx")
    read = {each.name for each in session.get_inputs()}
    assert "position_ids" in read and read.isdisjoint(found.defaults)


@pytest.mark.parametrize("exact", [False, True])
def test_random_numbers_in_a_forward_pass_are_refused(exact: bool) -> None:
    """Informer's own attention looks at keys that it draws.

    Of so many that the same ones are not drawn twice: in 400 tries all answers were unlike.
    """
    many = {**SERIES, "context_length": 96, "init_std": 0.5}
    model = model_of("InformerForPrediction", "InformerConfig", **many, sampling_factor=1)
    (graph,) = graphs(model, "time-series-forecasting")
    with pytest.raises(InputError, match="draws random numbers"):
        check_repeats(graph, exact)


def test_what_float32_rounds_off_is_not_taken_for_random_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where the exact answer is another, one in float32 is asked for again."""
    (graph,) = graphs(model_of("BertModel", "BertConfig", **TEXT), "feature-extraction")
    run, asked = Graph.run, list[bool]()

    def far_off(self: Graph, feeds: Any, exact: bool = False) -> Any:
        asked.append(exact)
        return {name: array + exact for name, array in run(self, feeds, exact).items()}

    monkeypatch.setattr(Graph, "run", far_off)
    checked = check_repeats(graph, exact=True)
    assert asked == [True, False]
    known = checked.answer(graph.probe.draw(0), exact=True)["last_hidden_state"]
    rounded = checked.answer(graph.probe.draw(0))["last_hidden_state"]
    assert np.abs(known - 1 - rounded).max() < 1e-5  # measured 8e-7
    assert asked == [True, False]


def test_what_stands_for_an_input_is_what_pytorch_takes() -> None:
    """A box of zeros is none, a language 0 is not; XLM takes padding for what a mask would hide."""
    boxes = model_of("LayoutLMForTokenClassification", "LayoutLMConfig", **TEXT)
    settled = stand_ins(graphs(boxes, "token-classification")[0]).probe.inputs
    assert [spec.name for spec in settled if spec.needed] == ["input_ids"]
    settings = {"vocab_size": 60, "emb_dim": 32, "n_layers": 2, "n_heads": 2, "n_langs": 3}
    model = model_of("XLMForTokenClassification", "XLMConfig", **settings)
    graph = stand_ins(graphs(model, "token-classification")[0])
    assert [spec.name for spec in graph.probe.inputs if spec.needed] == ["input_ids", "langs"]
    ids, languages = np.array([[5, 6, 7], [8, 9, 2]]), np.ones((2, 3), np.int64)
    completed = graph.probe.complete({"input_ids": ids, "langs": languages})
    assert completed["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    with pytest.raises(InputError, match="langs is not given"):
        graph.probe.complete({"input_ids": ids})


@pytest.mark.parametrize(
    ("name", "config", "settings", "dynamic"),
    [
        ("Dinov2ForImageClassification", "Dinov2Config", {**S, **I, "mlp_ratio": 2}, True),
        (
            "ResNetForImageClassification", "ResNetConfig",
            {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "layer_type": "basic"},
            True,
        ),
        ("ViTForImageClassification", "ViTConfig", {**S, **I}, False),
    ],
)  # fmt: skip
def test_height_and_width_are_dynamic_where_the_model_takes_any(
    name: str, config: str, settings: dict[str, Any], dynamic: bool, tmp_path: Path
) -> None:
    model = model_of(name, config, **settings)
    package = export(model, tmp_path / "package")
    shape = package.manifest.graphs[0].probe.inputs[0].shape
    assert (shape[2:] == ("height", "width")) == dynamic
    side = int(settings.get("image_size", 224))
    for height, width in [(side, side), (2 * side, side)][: 1 + dynamic]:
        pixels = torch.randn(2, 3, height, width)
        with torch.no_grad():
            expected = model(pixels).logits
        got = ffmerge.load_package(package.path)(pixels).logits
        assert (got - expected).abs().max() < 1e-5


def test_the_size_is_that_of_the_processor(tmp_path: Path) -> None:
    """config.json has the size of pretraining; the processor's example is a case of validate."""
    model = model_of("ViTForImageClassification", "ViTConfig", **S, **I)
    model.save_pretrained(tmp_path / "checkpoint")
    colours = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3]}
    size = {"height": 16, "width": 16}
    processor = tf.ViTImageProcessor(size=size, **colours)
    processor.save_pretrained(tmp_path / "checkpoint")
    package = export(model, tmp_path / "package", source=tmp_path / "checkpoint")
    (graph,) = package.manifest.graphs
    assert graph.probe.made and graph.probe.real == 1
    result = validate(package.path)
    assert result.ok
    cases = [case for p in result.providers for o in p.outputs for case in o.cases]
    assert {case.case for case in cases} == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("name", "side", "rows"),
    [("ViT", 16, [1, 3, 8]), ("ViT", 152, [1, 3]), ("Dinov2", 152, [1, 2, 3])],
)
def test_two_large_pictures_are_compared_once(
    name: str, side: int, rows: list[int], tmp_path: Path
) -> None:
    """The example of the processor is two; of any size two that are drawn are larger."""
    settings = {**S, **I, "image_size": side, "patch_size": 8}
    model = model_of(f"{name}ForImageClassification", f"{name}Config", **settings)
    tf.ViTImageProcessor(size={"height": side, "width": side}).save_pretrained(tmp_path)
    (graph,) = make_plan(model, ExportConfig(), tmp_path, None).graphs
    assert [case["batch_size"] for case in graph.probe.cases] == rows
    assert graph.probe.real == 1
    (alone,) = make_plan(model, ExportConfig(), None, None).graphs
    assert len(alone.probe.cases) == 3


def test_what_holds_for_one_size_only_is_exported_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was traced is run at other sizes before it is trusted there."""

    def fails(*_: Any) -> None:
        raise SizeError("another size")

    monkeypatch.setattr("ffmerge.exporter.torch_onnx._check_sizes", fails)
    model = model_of("Dinov2ForImageClassification", "Dinov2Config", **S, **I, mlp_ratio=2)
    package = export(model, tmp_path / "package")
    (graph,) = package.manifest.graphs
    assert graph.probe.inputs[0].shape == ("batch_size", 3, 16, 16)
    assert validate(package.path).ok


def test_any_size_is_not_tried_where_positions_are_counted() -> None:
    model = model_of("ViTForImageClassification", "ViTConfig", **S, **I)
    (graph,) = graphs(model, "image-classification")
    assert any_size(graph) is graph


def test_inspect_never_says_that_weights_are_missing_which_are_there(tmp_path: Path) -> None:
    """The classifier of BART looks at the ids, so it cannot be followed without values."""
    model = model_of("BartForSequenceClassification", "BartConfig", **ED)
    model.save_pretrained(tmp_path / "whole")
    found = inspect(tmp_path / "whole")
    assert {name: len(members) for name, members in found.stacks.items()} == {
        "encoder": 2, "decoder": 2,
    }  # fmt: skip
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_text((tmp_path / "whole" / "config.json").read_text())
    with pytest.raises(InputError, match="give a checkpoint that holds them"):
        inspect(empty)


@pytest.mark.parametrize(
    "name",
    [
        "BartForSequenceClassification",
        pytest.param("T5ForQuestionAnswering", marks=pytest.mark.slow),
    ],
)
def test_another_head_of_an_encoder_decoder_is_one_graph(name: str, tmp_path: Path) -> None:
    """The decoder's ids are made in the graph; the last end of a text is what the head reads."""
    config, settings = ("BartConfig", ED) if name.startswith("Bart") else ("T5Config", T5)
    model = model_of(name, config, **settings)
    package = export(model, tmp_path / "package")
    session = ort.InferenceSession(package.path / "model.onnx")
    assert [i.name for i in session.get_inputs()] == ["input_ids", "attention_mask"]
    end = model.config.eos_token_id
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    ids[0, 8] = ids[1, 5] = end
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask)
    got = ffmerge.load_package(package.path)(input_ids=ids, attention_mask=mask)
    assert set(got) == set(tasks.OUTPUTS[package.manifest.task])
    for output, tensor in got.items():
        assert (tensor - expected[output]).abs().max() < 1e-5
    told = json.loads((package.path / "ffmerge.json").read_text())
    assert told["task"] == package.manifest.task
