"""``export --for cpu``: attention as one operator, the same results, or plain with the reason."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from graphs import build, normal, ops, run
from onnx_ir.passes.common import ShapeInferencePass
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import ffmerge
from ffmerge.config import ExportConfig, ShareConfig
from ffmerge.errors import InputError
from ffmerge.exporter import fused
from ffmerge.exporter.fused import NotFused, check_fused, fuse
from ffmerge.exporter.graphs import graphs
from ffmerge.exporter.last_logits import keep_last, offer_all
from ffmerge.exporter.package import export
from ffmerge.models.kv_cache import KEPT
from ffmerge.models.tasks import fit
from ffmerge.passes.graph.attention import scores_of, scores_put_out
from ffmerge.passes.graph.audit import audit
from ffmerge.passes.graph.run import share_file
from ffmerge.runtime_tests.parity import check_parity

LAYERS, WINDOW = 2, 4
SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
APART = {**SIZES, "head_dim": 16}
LAYER_TYPES = ["sliding_attention", "full_attention"]
DECODERS: dict[str, Any] = {
    "Llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "Gemma 3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**APART, sliding_window=WINDOW, layer_types=LAYER_TYPES)
    ),
    "Qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**APART)),
    "Mistral": lambda: MistralForCausalLM(MistralConfig(**APART, sliding_window=WINDOW)),
    "Phi-3": lambda: Phi3ForCausalLM(Phi3Config(**SIZES)),
    "GPT-2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=97, n_embd=32, n_inner=48, n_layer=LAYERS, n_head=4, n_positions=64,
            bos_token_id=1, eos_token_id=2,
        )
    ),
}  # fmt: skip
FAST = ("Llama", "Gemma 3")
WAYS: tuple[dict[str, Any], ...] = (
    {"do_sample": False},
    {"do_sample": False, "num_beams": 3},
    {"do_sample": True, "top_k": 0, "temperature": 2.0},
)


def drawn(model: Any) -> Any:
    """Return a model whose weights are all different and large enough to write unlike texts."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn(parameter.shape) * 0.15
    return model.eval()


def packed(name: str, folder: Path, **settings: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = drawn(DECODERS[name]())
    return model, export(model, folder / "package", ExportConfig(profile="cpu", **settings))


def check_writes_the_same(model: Any, loaded: Any) -> None:
    """Two decoders write the same ids in every way, one row of one token and padded rows."""
    for rows, length in ((1, 1), (3, 9)):
        ids = torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(rows))
        mask = torch.ones_like(ids)
        for row in range(rows):
            mask[row, : 3 * row % length] = 0
        for way in WAYS:
            written = []
            for each in (model, loaded):
                torch.manual_seed(7)
                written.append(
                    each.generate(
                        input_ids=ids * mask, attention_mask=mask, max_new_tokens=8,
                        min_new_tokens=8, pad_token_id=0, **way,
                    )
                )  # fmt: skip
            assert written[0].tolist() == written[1].tolist(), (rows, way)


@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in DECODERS]
)
def test_a_decoder_writes_what_pytorch_writes(name: str, tmp_path: Path) -> None:
    """Rows padded on the left by unlike amounts, longer than the window, and no padding at all."""
    model, package = packed(name, tmp_path)
    assert package.manifest.profile == "cpu" and package.manifest.opset == 23
    assert not [skip for skip in package.manifest.skipped if skip.name == "attention"]
    graph = ir.load(package.path / "model.onnx")
    attention = [node for node in graph.graph if node.op_type == "Attention"]
    assert len(attention) == LAYERS and "Softmax" not in ops(graph)
    assert all(len(node.inputs) == 6 and len(node.outputs) == 3 for node in attention)
    assert {node.domain for node in graph.graph} == {""}  # of the standard, all
    assert all(output.ok for output in check_parity(package.path, package.manifest))
    check_writes_the_same(model, ffmerge.load_package(package.path))


@pytest.mark.parametrize("settings", [{"profile": "cpu"}, {"layout": "transformers.js"}])
def test_logits_of_the_last_tokens_only(settings: dict[str, Any], tmp_path: Path) -> None:
    """Of 0 tokens means of all, as transformers and transformers.js have it."""
    model = drawn(DECODERS["Llama"]())
    package = export(model, tmp_path / "package", ExportConfig(**settings))
    (record,) = package.manifest.graphs
    session = onnxruntime.InferenceSession(
        package.path / record.path, providers=["CPUExecutionProvider"]
    )
    fed = [each.name for each in session.get_inputs()]
    assert (KEPT in fed) == (record.optional == ()) == ("layout" in settings)
    assert KEPT in fed or [e.name for e in session.get_overridable_initializers()] == [KEPT]
    ids = np.arange(3, 15).reshape(2, 6)
    feeds = {**record.probe.complete({"input_ids": ids}), KEPT: np.array(0)}
    whole = session.run(["logits"], feeds)[0]
    with torch.no_grad():
        expected = model(torch.tensor(ids)).logits.numpy()
    assert np.allclose(whole, expected, atol=1e-4)  # measured 2e-6
    loaded = ffmerge.load_package(package.path)
    for kept in (1, 4, 6):
        feeds[KEPT] = np.array(kept)
        some = session.run(["logits"], feeds)[0]
        assert some.shape[1] == kept and np.allclose(some, expected[:, -kept:], atol=1e-4)
        given = loaded(input_ids=torch.tensor(ids), logits_to_keep=kept).logits
        assert np.array_equal(given.detach().numpy(), some)


def test_what_is_behind_the_head_has_the_last_tokens_too() -> None:
    """The head is multiplied by for these alone; by hand, through a bias and a cap."""
    text = """(float[b,t,8] x) => (float[b,t,5] logits) {
        h = Neg(x) p = MatMul(h, W) q = Add(p, c) r = Tanh(q) logits = Mul(r, s) }"""
    model = shaped(text, W=normal(8, 5), c=normal(5, seed=1), s=np.array(3.0, np.float32))
    x = normal(2, 4, 8, seed=2)
    expected = run(model, x=x)[0]
    keep_last(model)
    product = next(node for node in model.graph if node.op_type == "MatMul")
    sliced = product.inputs[0]
    assert sliced is not None and sliced.producer() is not None
    assert sliced.producer().op_type == "Slice"
    for kept in (0, 1, 3, 9):
        found = run(model, x=x, **{KEPT: np.array(kept)})[0]
        assert np.array_equal(found, expected[:, -kept:])
    offer_all(model)
    assert np.array_equal(run(model, x=x)[0], expected)


@pytest.mark.parametrize(
    "body",
    [
        "h = Neg(x) p = MatMul(h, W) logits = Softmax<axis=1>(p)",  # tokens are mixed behind it
        "p = MatMul(x, W) logits = Add(p, c)",  # another number for each token
        "p = MatMul(x, W) q = Neg(p) z = ReduceSum(p) logits = Add(p, z)",  # another reads it
    ],
)
def test_where_the_head_cannot_be_cut_the_logits_are(body: str) -> None:
    text = f"(float[b,4,8] x) => (float[b,4,5] logits) {{ {body} }}"
    weights = {"W": normal(8, 5)} | ({"c": normal(4, 5, seed=1)} if "c)" in body else {})
    model = shaped(text, **weights)
    x = normal(2, 4, 8, seed=2)
    expected = run(model, x=x)[0]
    keep_last(model)
    assert np.array_equal(run(model, x=x, **{KEPT: np.array(2)})[0], expected[:, -2:])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["T5", "BERT", "ModernBERT"])
def test_other_models_attend_by_one_operator_too(kind: str, tmp_path: Path) -> None:
    if kind == "T5":
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
        model: Any = T5ForConditionalGeneration(
            T5Config(vocab_size=97, decoder_start_token_id=0, **sizes)
        )
    elif kind == "ModernBERT":  # its angles are those of all rows
        model = ModernBertForMaskedLM(
            ModernBertConfig(
                vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                num_attention_heads=4, max_position_embeddings=64, local_attention=WINDOW,
                pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
            )
        )  # fmt: skip
    else:
        model = BertForSequenceClassification(
            BertConfig(
                vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                num_attention_heads=4, max_position_embeddings=64,
            )
        )  # fmt: skip
    package = export(model.eval(), tmp_path / "package", ExportConfig(profile="cpu"))
    for record in package.manifest.graphs:
        assert "Softmax" not in ops(ir.load(package.path / record.path))
    assert all(output.ok for output in check_parity(package.path, package.manifest))


def planned(model: Any) -> Any:
    return graphs(model.eval(), fit(None, model, list))[0]


def test_what_the_operator_does_not_compute_is_plain() -> None:
    capped = Gemma2ForCausalLM(Gemma2Config(**APART, sliding_window=WINDOW))
    with pytest.raises(NotFused, match="scores are capped"):
        check_fused(planned(capped))
    sinks = {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": WINDOW}
    with pytest.raises(NotFused, match="logits is not what the model gives"):
        check_fused(planned(drawn(GptOssForCausalLM(GptOssConfig(**APART, **sinks)))))
    model = DECODERS["Llama"]()
    model._can_set_attn_implementation = lambda: False
    with pytest.raises(NotFused, match="LlamaForCausalLM computes its attention by code"):
        check_fused(planned(model))


def test_a_small_difference_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of random weights attention says little: a scale that is off by 1 % is enough."""
    check_fused(planned(DECODERS["Llama"]()))
    right = torch.onnx.ops.attention

    def off(*args: Any, scale: float, **more: Any) -> Any:
        return right(*args, scale=scale * 1.01, **more)

    monkeypatch.setattr(torch.onnx.ops, "attention", off)
    with pytest.raises(NotFused, match="logits"):
        check_fused(planned(DECODERS["Llama"]()))


def test_the_reason_is_in_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **more: Any) -> Any:
        raise NotFused("because")

    monkeypatch.setattr(fused, "attend", refuse)
    model, package = packed("GPT-2", tmp_path)
    ((name, reason),) = [
        (s.name, s.reason) for s in package.manifest.skipped if "because" in s.reason
    ]
    assert (name, reason) == ("attention", "plain products, as --for portable has it: because")
    assert ops(ir.load(package.path / "model.onnx"))["Softmax"] == LAYERS
    assert package.manifest.opset == 20
    assert all(output.ok for output in check_parity(package.path, package.manifest))
    assert model.config._attn_implementation == "sdpa"


def test_an_opset_without_the_operators_is_refused() -> None:
    with pytest.raises(InputError, match="for cpu the opset is 23, not 20"):
        ExportConfig(profile="cpu", opset=20)
    with pytest.raises(InputError, match="no profile 'gpu': there is portable, cpu"):
        ExportConfig(profile="gpu")
    assert ExportConfig(profile="cpu", opset=23).opset == 23


@pytest.mark.parametrize("dtype", ["int4", "int8", "int8-dynamic", "fp16"])
def test_a_fused_graph_is_quantized_and_keeps_its_ties(dtype: str, fused_file: Path) -> None:
    target = fused_file.with_name(f"{dtype}.onnx")
    result = share_file(fused_file, target, ShareConfig(dtype=dtype))
    assert result.ties and audit(target).ok
    assert ops(ir.load(target))["Attention"] == LAYERS
    feeds = {
        "input_ids": np.arange(3, 15).reshape(2, 6),
        "attention_mask": np.array([[0, 0, 1, 1, 1, 1], [1] * 6]),
        "position_ids": np.arange(6)[None].repeat(2, 0),
    }
    for layer in range(LAYERS):
        for part in ("key", "value"):
            feeds[f"past_key_values.{layer}.{part}"] = np.zeros((2, 2, 0, 8), np.float32)
    found = []
    for path in (fused_file, target):
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        found.append(session.run(["logits"], feeds)[0].astype(np.float64).ravel())
    cosine = found[0] @ found[1] / np.linalg.norm(found[0]) / np.linalg.norm(found[1])
    assert cosine > {"int4": 0.95}.get(dtype, 0.995)


@pytest.fixture(scope="module")
def fused_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose feed-forward sublayers are one, and its head its embedding."""
    model = drawn(DECODERS["Llama"]())
    ffmerge.merge_(model, None, ffmerge.MergeConfig(window=(0, 1), method="average"))
    folder = tmp_path_factory.mktemp("fused")
    package = export(model, folder / "package", ExportConfig(profile="cpu"))
    assert audit(package.path).ok and len(package.manifest.ties) >= 3
    return package.path / "model.onnx"


CACHED = """(float[b,t,4,8] q4, float[b,t,2,8] k4, float[b,2,p,8] pk, float[b,2,p,8] pv)
    => (float[b,t,32] y, float[b,2,n,8] k, float[b,2,n,8] v) {
    q = Transpose<perm=[0,2,1,3]>(q4)  new = Transpose<perm=[0,2,1,3]>(k4)
    k = Concat<axis=AXIS>(pk, new)  v = Concat<axis=2>(pv, new)
    z = Attention(q, k, v)  zt = Transpose<perm=[0,2,1,3]>(z)  y = Reshape(zt, whole) }"""


def shaped(text: str, **weights: Any) -> ir.Model:
    model = build(text, opset=23, **weights)
    ShapeInferencePass()(model)
    return model


def cached(past: int = 3, axis: str = "2") -> tuple[ir.Model, dict[str, np.ndarray]]:
    model = shaped(CACHED.replace("AXIS", axis), whole=np.array([0, 0, 32]))
    feeds = {"q4": normal(2, 5, 4, 8), "k4": normal(2, 5, 2, 8, seed=1)}
    return model, feeds | {
        "pk": normal(2, 2, past, 8, seed=2), "pv": normal(2, 2, past, 8, seed=3)
    }  # fmt: skip


@pytest.mark.parametrize("past", [0, 3])
@pytest.mark.parametrize("axis", ["2", "-2"])
def test_attention_appends_to_the_past(past: int, axis: str) -> None:
    model, feeds = cached(past, axis)
    expected = run(model, **feeds)
    fuse(model)
    (node,) = [node for node in model.graph if node.op_type == "Attention"]
    assert [value.name for value in node.inputs[4:]] == ["pk", "pv"]
    assert not {"Concat", "Transpose"} & {*ops(model)}  # nothing is moved or copied
    for one, other in zip(run(model, **feeds), expected, strict=True):
        assert np.allclose(one, other, atol=1e-6)  # measured 0


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("v = Concat<axis=2>(pv, new)", "v = Concat<axis=2>(pv, pv, new)"),
        ("v = Concat<axis=2>(pv, new)", "v = Identity(k)"),
        ("z = Attention(q, k, v)", "z = Attention(q, k, k)"),
        ("v = Concat<axis=2>(pv, new)", "v = Concat<axis=2>(new, pv)"),
        ("zt = Transpose<perm=[0,2,1,3]>(z)", "z2 = Add(z, z) zt = Transpose<perm=[0,2,1,3]>(z2)"),
        ("zt = Transpose<perm=[0,2,1,3]>(z)", "zt = Transpose<perm=[0,1,2,3]>(z)"),
        ("new = Transpose<perm=[0,2,1,3]>(k4)", "n = Neg(k4) new = Transpose<perm=[0,2,1,3]>(n)"),
        ("y = Reshape(zt, whole)", "u = Reshape(zt, whole) w = Reshape(zt, pairs) y = Add(u, w)"),
    ],
)
def test_its_neighbours_compute_the_same(old: str, new: str) -> None:
    text = CACHED.replace("AXIS", "2")
    assert old in text
    sizes = {"whole": np.array([0, 0, 32]), "pairs": np.array([2, 5, 32])}
    if "pairs" not in new:
        del sizes["pairs"]
    model = shaped(text.replace(old, new), **sizes)
    if "pv, pv" in new:  # values are as many as keys
        text = text.replace("k = Concat<axis=2>(pk, new)", "k = Concat<axis=2>(pk, pk, new)")
        model = shaped(text.replace(old, new), **sizes)
    feeds = cached()[1]
    if "[0,1,2,3]" in new:
        feeds["q4"] = normal(2, 4, 4, 8)
        feeds["k4"] = normal(2, 4, 2, 8)
    expected = run(model, **feeds)
    fuse(model)
    for one, other in zip(run(model, **feeds), expected, strict=True):
        assert np.allclose(one, other, atol=1e-6)  # measured 0


@pytest.mark.parametrize(
    ("made", "inside"),
    [
        (
            "a = ReduceMax(v, axes) m = Transpose<perm=[0,1,3,2]>(a) r = ReduceMax(q, axes) "
            "s = Add(r, m) z = Attention(q, k, v, s)",
            0,
        ),
        ("first = Attention(q, k, v) z = Attention(first, k, v)", 1),
    ],
)
def test_keys_and_values_may_be_read_elsewhere(made: str, inside: int) -> None:
    """A mask made of them waits for them, as in Doge; layers behind read them, as in Gemma 3n."""
    text = CACHED.replace("AXIS", "2").replace("z = Attention(q, k, v)", made)
    weights = {"axes": np.array([1, 3])} if "axes" in made else {}
    model, feeds = shaped(text, whole=np.array([0, 0, 32]), **weights), cached()[1]
    expected = run(model, **feeds)
    fuse(model)
    model.graph.sort()  # there is no cycle
    nodes = [node for node in model.graph if node.op_type == "Attention"]
    assert [len(node.inputs) == 6 for node in nodes].count(True) == inside
    for one, other in zip(run(model, **feeds), expected, strict=True):
        assert np.allclose(one, other, atol=1e-6)  # measured 0


def test_the_scores_of_one_operator_are_put_out_for_a_while() -> None:
    """By hand: softmax of q k / sqrt(8), for rounding by what attention mixes."""
    text = """(float[b,t,16] x, float[b,t,16] w) => (float[b,t,16] y) {
        v = MatMul(x, V) y = Attention<q_num_heads=2, kv_num_heads=2>(w, x, v) }"""
    model, x, w = (
        build(text, opset=23, V=normal(16, 16)),
        normal(2, 5, 16),
        normal(2, 5, 16, seed=1),
    )
    (product,) = [node for node in model.graph if node.op_type == "MatMul"]
    assert scores_of(product) is None
    with scores_put_out(model):
        scores = scores_of(product)
        assert scores is not None
        model.graph.outputs.append(scores)
        found = run(model, x=x, w=w)[1]
        model.graph.outputs.pop()
    apart = [each.reshape(2, 5, 2, 8).transpose(0, 2, 1, 3) for each in (w, x)]
    expected = np.exp(apart[0] @ apart[1].transpose(0, 1, 3, 2) / np.sqrt(8))
    assert np.allclose(found, expected / expected.sum(-1, keepdims=True), atol=1e-5)  # 7.7e-8
    assert scores_of(product) is None and len(run(model, x=x, w=w)) == 1
