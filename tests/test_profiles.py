"""``export --for``: what each provider's graphs are made of, what is refused, the same results.

What WebGPU itself computes of them is in test_webgpu.py, and in a browser in test_web.py.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import tiny
import torch
from architectures import CASES, index_of, merge_all, model_of
from graphs import build, ops
from test_fused import DECODERS, FAST, LAYERS, SIZES, check_writes_the_same, drawn
from transformers import BertModel, PhiConfig, PhiForCausalLM

import ffmerge
from ffmerge.config import ExportConfig
from ffmerge.errors import InputError
from ffmerge.exporter import convert
from ffmerge.exporter.fused import NotFused
from ffmerge.exporter.graphs import graphs
from ffmerge.exporter.half_cache import halve_cache
from ffmerge.exporter.multihead import check_multihead
from ffmerge.exporter.package import export
from ffmerge.models.manifest import Manifest
from ffmerge.models.tasks import fit
from ffmerge.passes.graph.audit import audit
from ffmerge.passes.graph.infer import infer_types
from ffmerge.profiles import PROFILES
from ffmerge.runtime_tests.parity import check_parity, parity_of
from ffmerge.runtime_tests.reference import read_reference
from ffmerge.runtime_tests.results import OutputParity
from ffmerge.runtime_tests.runtimes.base import LEVEL
from ffmerge.runtime_tests.runtimes.registry import find_runtime
from ffmerge.runtime_tests.tolerance import for_dtype
from ffmerge.runtime_tests.validate import check_package

HALF, FLOAT = ir.DataType.FLOAT16, ir.DataType.FLOAT
ALONE = ("GPT-2",)  # each head has keys of its own


def graph_of(package: Any, dtype: str | None = None) -> ir.Model:
    (record,) = package.manifest.in_dtype(dtype).graphs
    return ir.load(package.path / record.path)


def kept(graph: ir.Model) -> set[ir.DataType | None]:
    """Return the types of the keys and values that a decoder takes and gives."""
    values = [*graph.graph.inputs, *graph.graph.outputs]
    return {v.dtype for v in values if str(v.name).startswith(("past_key_values.", "present."))}


@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in DECODERS]
)
def test_for_webgpu_a_decoder_writes_what_pytorch_writes(name: str, tmp_path: Path) -> None:
    """Rows padded on the left by unlike amounts, longer than the window; greedy, beams, drawn."""
    model = drawn(DECODERS[name]())
    package = export(model, tmp_path / "package", ExportConfig(profile="webgpu"))
    assert package.manifest.profile == "webgpu" and package.manifest.opset == 23
    assert not package.manifest.skipped
    graph = graph_of(package)
    found = ops(graph)
    kind = "MultiHeadAttention" if name in ALONE else "GroupQueryAttention"
    assert found[kind] == LAYERS and not {"Attention", "Softmax"} & set(found)
    assert bool(found["SkipSimplifiedLayerNormalization"]) == (name != "GPT-2")
    assert all(output.ok for output in check_parity(package.path, package.manifest))
    assert audit(package.path).ok
    check_writes_the_same(model, ffmerge.load_package(package.path))


def partly_rotated() -> Any:
    """Phi rotates a part of each head: no operator does, and heads lie apart behind it."""
    return drawn(PhiForCausalLM(PhiConfig(**SIZES, partial_rotary_factor=0.5)))


def test_heads_that_lie_apart_are_turned_for_the_operator(tmp_path: Path) -> None:
    model = partly_rotated()
    package = export(model, tmp_path / "package", ExportConfig(profile="webgpu"))
    found = ops(graph_of(package))
    assert found["GroupQueryAttention"] == LAYERS and not {"Attention", "Softmax"} & set(found)
    assert not package.manifest.skipped
    assert all(output.ok for output in check_parity(package.path, package.manifest))
    check_writes_the_same(model, ffmerge.load_package(package.path))


def test_an_encoder_for_webgpu_reads_both_ways(tmp_path: Path) -> None:
    package = export(tiny.bert(layers=2), tmp_path / "package", ExportConfig(profile="webgpu"))
    found = ops(graph_of(package))
    assert found["MultiHeadAttention"] == 2 and not {"Attention", "Softmax"} & set(found)
    assert all(output.ok for output in check_parity(package.path, package.manifest))


@pytest.mark.parametrize("profile", ["portable", "webgpu"])
@pytest.mark.parametrize(("name", "left"), [("Llama", True), ("Gemma 3", False)])
def test_rows_of_data_may_be_padded(profile: str, name: str, left: bool, tmp_path: Path) -> None:
    """Nobody reads what a decoder makes of padding; all else is compared.

    Behind a text it is longer than the window, so that the last of it has nothing to attend to.
    """
    model = drawn(DECODERS[name]())
    ids, mask = np.random.default_rng(0).integers(3, 97, (4, 9)), np.ones((4, 9), np.int64)
    for row in range(4):
        mask[row, : 2 * row] = 0
    if not left:
        mask = mask[:, ::-1].copy()
    data = {"input_ids": ids * mask, "attention_mask": mask}
    package = export(model, tmp_path / "package", ExportConfig(profile=profile), data=data)
    (graph,) = package.manifest.graphs
    reference = read_reference(package.path)
    session = find_runtime("cpu").open(package.path / graph.path)

    def right() -> list[bool]:
        found = parity_of(graph, session, reference, LEVEL, for_dtype("fp32"))
        return [output.ok for output in found]

    assert all(right())
    case = len(graph.probe.cases)  # the real one
    logits = reference.expected(graph, case, "logits").reshape(4, -1, 97)
    if logits.shape[1] == 9:
        logits[3, 5] += 1  # padding
        assert all(right())
    logits[3 if left else 0, -1] += 1
    assert right() == [False] + [True] * (len(graph.outputs) - 1)


def test_what_an_encoder_makes_of_padding_is_not_compared(tmp_path: Path) -> None:
    """All elements of tokens are, and no others are counted."""
    mask = (np.arange(9) < [[9], [7], [4], [5]]).astype(np.int64)
    ids = np.random.default_rng(0).integers(3, 60, (4, 9)) * mask
    data = {"input_ids": ids, "attention_mask": mask}
    model = BertModel(tiny.bert(layers=2).config, add_pooling_layer=False).eval()
    package = export(model, tmp_path / "package", data=data)
    (graph,) = package.manifest.graphs
    reference, case = read_reference(package.path), len(graph.probe.cases)
    session = find_runtime("cpu").open(package.path / graph.path)

    def judged() -> OutputParity:
        return parity_of(graph, session, reference, LEVEL, for_dtype("fp32"))[0]

    states = reference.expected(graph, case, judged().name).reshape(4, 9, -1)
    tokens = sum(
        int(reference.feeds(graph, each)["attention_mask"].sum()) for each in range(case + 1)
    )
    assert judged().compared == tokens * states.shape[-1]
    states[2, 4] += 1
    assert judged().ok
    states[2, 3] += 1
    assert not judged().ok


@pytest.mark.parametrize("name", ["MarianMTModel", "T5ForConditionalGeneration"])
def test_what_is_kept_of_an_encoder_is_read_as_it_lies(name: str, tmp_path: Path) -> None:
    """Of two layers, both steps: 4 in the encoder and the first step's, 4 in later ones."""
    model = model_of(*CASES[index_of(name)][:3])
    assert merge_all(model)
    config = ExportConfig(profile="webgpu", dtype="fp32,fp16")
    package = export(model, tmp_path / "package", config)
    assert not package.manifest.skipped and audit(package.path).ok
    for dtype, kind in (("fp32", FLOAT), ("fp16", HALF)):
        manifest = package.manifest.in_dtype(dtype)
        encoder, decoder = (ir.load(package.path / record.path) for record in manifest.graphs)
        assert ops(encoder)["MultiHeadAttention"] == 2 and ops(decoder)["MultiHeadAttention"] == 8
        assert not {"Attention", "Softmax"} & {*ops(encoder), *ops(decoder)}
        assert kept(decoder) == {kind}
    assert [each.reason for each in check_package(package.path).providers] == [None, None]
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 0]])
    settings: dict[str, Any] = {
        "input_ids": ids, "attention_mask": (ids > 0).long(), "do_sample": False,
        "max_new_tokens": 8, "min_new_tokens": 8,
    }  # fmt: skip
    loaded = ffmerge.load_package(package.path)
    assert loaded.generate(**settings).tolist() == model.generate(**settings).tolist()


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any]]:
    """Return a merged decoder and its package for WebGPU in three precisions."""
    torch.manual_seed(0)
    model = drawn(DECODERS["Qwen3"]())
    assert merge_all(model)
    target = tmp_path_factory.mktemp("several") / "package"
    yield model, export(model, target, ExportConfig(profile="webgpu", dtype="fp32,fp16,q4f16"))


def test_keys_and_values_stay_float16_between_the_steps(several: tuple[Any, Any]) -> None:
    """No step casts what is kept, and each precision of a folder is given its own type."""
    _, package = several
    assert audit(package.path).ok
    for dtype, kind in (("fp32", FLOAT), ("fp16", HALF), ("q4f16", HALF)):
        graph = graph_of(package, dtype)
        assert kept(graph) == {kind}
        found = ops(graph)
        assert found["GroupQueryAttention"] == LAYERS
        for node in graph.graph:
            if node.op_type == "GroupQueryAttention":
                assert str(node.inputs[3].name).startswith("past_key_values.")
                assert {value.dtype for value in node.inputs[3:5]} == {kind}
        specs = package.manifest.in_dtype(dtype).graphs[0].probe.inputs
        past = {spec.dtype for spec in specs if spec.name.startswith("past_key_values.")}
        assert past == {"float16" if kind == HALF else "float32"}
        (served,) = package.manifest.served(dtype).values()
        assert served.probe.inputs == specs
        assert Manifest.read(package.path).in_dtype(dtype).graphs == (
            package.manifest.in_dtype(dtype).graphs
        )


def test_greedy_decoding_with_a_float16_cache(several: tuple[Any, Any]) -> None:
    model, package = several
    ids = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12]])
    settings: dict[str, Any] = {
        "attention_mask": (ids > 0).long(), "do_sample": False, "max_new_tokens": 12,
        "min_new_tokens": 12, "pad_token_id": 0,
    }  # fmt: skip
    expected = model.generate(input_ids=ids, **settings)
    loaded = ffmerge.load_package(package.path, dtype="fp16")
    found = loaded.generate(input_ids=ids, **settings)
    assert len(expected[:, 5:].unique()) > 4  # not one token for ever
    assert found.tolist() == expected.tolist()
    step = loaded(input_ids=ids, attention_mask=settings["attention_mask"])
    assert step.past_key_values.layers[0].keys.dtype == torch.float16
    with torch.no_grad():
        exact = model(input_ids=ids[1:]).logits
    # measured 0.0066 of logits up to 6.2; float16 keeps 11 bits
    assert (step.logits[1:] - exact).abs().max() < 0.02


def test_for_cuda_a_decoder_is_of_standard_operators_in_float16(tmp_path: Path) -> None:
    """As for the CPU, but for the cache: ONNX Runtime's CUDA has kernels for these operators."""
    model = drawn(DECODERS["Llama"]())
    assert merge_all(model)
    package = export(model, tmp_path / "cuda", ExportConfig(profile="cuda", dtype="fp16"))
    graph = graph_of(package)
    found = ops(graph)
    assert {node.domain for node in graph.graph} == {""} and found["Attention"] == LAYERS
    assert kept(graph) == {HALF}
    assert found["Split"] == LAYERS  # of one product for queries, keys and values
    for node in graph.graph:  # types of values are their own: none is cast to what it is
        if node.op_type == "Cast":
            assert node.inputs[0].dtype != node.outputs[0].dtype
    assert all(output.ok for output in check_parity(package.path, package.manifest))
    assert audit(package.path).ok and not package.manifest.skipped


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (("tpu", "fp32", None), "no profile 'tpu': there is portable, cpu, cuda, webgpu"),
        (("cuda", "int8-static", None), "cuda has no kernels for int8-static: choose one of fp32"),
        (("webgpu", "fp32,int8-dynamic", None), "webgpu has no kernels for int8-dynamic"),
        (("webgpu", "fp32", 20), "for webgpu the opset is 23, not 20"),
    ],
)
def test_what_a_provider_lacks_is_refused(settings: tuple[str, str, int], told: str) -> None:
    profile, dtype, opset = settings
    with pytest.raises(InputError, match=told):
        ExportConfig(profile=profile, dtype=dtype, opset=opset)


@pytest.mark.parametrize("profile", ["cpu", "webgpu"])
def test_int8_is_in_blocks_where_rows_have_no_kernels(profile: str, tmp_path: Path) -> None:
    config = ExportConfig(profile=profile, dtype="int8")
    package = export(tiny.vit(64, 128, 2), tmp_path / "package", config)
    found = ops(graph_of(package))
    rows, blocks = found["MatMulInteger"], found["MatMulNBits"]
    assert (rows > 0, blocks > 0) == (profile == "cpu", profile != "cpu")
    assert set(package.manifest.int8.values()) == {"rows" if profile == "cpu" else "blocks"}


def test_a_profile_has_its_layout_and_opset() -> None:
    layouts = {name: ExportConfig(profile=name).file_layout for name in PROFILES}
    others = {name: "optimum" for name in PROFILES if name != "webgpu"}
    assert layouts == {**others, "webgpu": "transformers.js"}
    assert ExportConfig(profile="webgpu", layout="optimum").file_layout == "optimum"
    opsets = {name: profile.opset for name, profile in PROFILES.items()}
    assert opsets == {"portable": 20, "cpu": 23, "cuda": 23, "webgpu": 23, "npu": 21}


def test_a_mask_that_shows_later_tokens_is_not_left_to_the_operator(tmp_path: Path) -> None:
    """Of shared keys it lets no token read a later one; such a model gets the plain graph."""
    model = drawn(DECODERS["Llama"]())
    task = fit(None, model, lambda: ())
    (graph,) = graphs(model, task)
    package = export(model, tmp_path / "package", ExportConfig(profile="cpu"))
    translated = ir.load(package.path / "model.onnx")
    check_multihead(translated, graph)  # as it is, it can be
    pair = replace(graph, probe=replace(graph.probe, cases=({"decoder_sequence_length": 1},)))
    with pytest.raises(NotFused, match="elsewhere than in a decoder alone"):
        check_multihead(translated, pair)
    (mask,) = {n.inputs[3] for n in translated.graph if n.op_type == "Attention"}
    shown = ir.node("Mul", [mask, ir.Value(name="nothing")])
    shown.inputs[1].const_value = ir.tensor(np.zeros(1, np.float32), name="nothing")
    translated.graph.register_initializer(shown.inputs[1])
    shown.outputs[0].shape = mask.shape
    for node in list(mask.consumers()):
        if node.op_type == "Attention":
            node.replace_input_with(3, shown.outputs[0])
    translated.graph.insert_after(mask.producer(), shown)
    with pytest.raises(NotFused, match="a mask lets a token read later ones"):
        check_multihead(translated, graph)


def test_a_cache_that_something_else_reads_stays_float32() -> None:
    """The graphs of a pair hand it on to each other: all take and give it alike, or none."""
    cast = named_as_kept(
        build(
            """(float[b,2] a) => (float[b,2] z) {
            half = Cast <to = 10> (a)  more = Add (half, half)  z = Cast <to = 1> (more) }"""
        )
    )
    plain = named_as_kept(build("(float[b,2] a) => (float[b,2] z) { z = Relu (a) }"))
    before = ops(cast)
    assert not halve_cache([cast, plain])
    assert (ops(cast), kept(cast), kept(plain)) == (before, {FLOAT}, {FLOAT})
    assert halve_cache([cast])
    assert (ops(cast), kept(cast)) == ({"Add": 1}, {HALF})


def test_a_cache_whose_keys_are_its_values_stays_float32() -> None:
    """One float16 value cannot have the names of two outputs."""
    model = named_as_kept(
        build(
            """(float[b,2] a) => (float[b,2] z, float[b,2] v) {
            half = Cast <to = 10> (a)  more = Add (half, half)
            z = Cast <to = 1> (more)  v = Cast <to = 1> (more) }"""
        )
    )
    model.graph.outputs[1].name = "present.0.value"
    assert not halve_cache([model])
    assert [value.name for value in model.graph.outputs] == ["present.0.key", "present.0.value"]
    assert kept(model) == {FLOAT}


def test_that_a_cache_stays_float32_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert, "halve_cache", lambda models: False)
    given = ExportConfig(dtype="fp16", profile="cuda")
    package = export(tiny.gpt2(layers=1), tmp_path / "package", given)
    assert [skip.name for skip in package.manifest.skipped] == ["cache"]
    assert package.manifest.graphs[0].probe.cache == "float32"


def named_as_kept(model: ir.Model) -> ir.Model:
    infer_types(model)
    model.graph.inputs[0].name = "past_key_values.0.key"
    model.graph.outputs[0].name = "present.0.key"
    return model
