"""``export --for cpu``: one product for several of one value, the same results, ties left."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from graphs import build, names, normal, ops, run
from test_fused import LAYERS, drawn, packed
from transformers import BertConfig, BertForSequenceClassification, WhisperConfig
from transformers import WhisperForConditionalGeneration as Whisper

import ffmerge
from ffmerge.config import ExportConfig, QuantizeConfig
from ffmerge.exporter.package import export
from ffmerge.exporter.packed import pack
from ffmerge.models.record import Tie
from ffmerge.passes.graph.audit import audit
from ffmerge.passes.graph.contract import write_ties
from ffmerge.passes.graph.run import share_model
from ffmerge.runtime_tests.parity import check_parity

PLAIN = "q = MatMul(x, l_q_w) k = MatMul(x, l_k_w) v = MatMul(x, l_v_w)"
BIASED = """p = MatMul(x, l_q_w) q = Add(p, bq) r = MatMul(x, l_k_w) k = Add(bk, r)
    v = MatMul(x, l_v_w)"""
NORMED = """p = MatMul(x, l_q_w) h = Reshape(p, apart) i = RMSNormalization(h, s)
    q = Reshape(i, flat) k = MatMul(x, l_k_w) v = MatMul(x, l_v_w)"""
TEXT = """(float[b,t,64] x) => (float[b,t,64] y) {
    BODY y = Attention<q_num_heads=4, kv_num_heads=2>(q, k, v) }"""
WEIGHTS = {
    "l_q_w": normal(64, 64),
    "l_k_w": normal(64, 32, seed=1),
    "l_v_w": normal(64, 32, seed=2),
}
MORE = {
    PLAIN: {},
    BIASED: {"bq": normal(64, seed=3), "bk": normal(32, seed=4)},
    NORMED: {
        "apart": np.array([0, 0, 4, 16]), "flat": np.array([0, 0, 64]), "s": normal(16, seed=5),
    },
}  # fmt: skip
X = normal(2, 5, 64, seed=9)
SUMS = 1e-4  # another order of 64 products of N(0, 1); seen 0 to 2e-5


def graph(body: str = PLAIN, **weights: Any) -> ir.Model:
    return build(TEXT.replace("BODY", body), 23, **{**WEIGHTS, **MORE.get(body, {}), **weights})


def products(model: ir.Model) -> int:
    return ops(model)["MatMul"] + ops(model)["MatMulNBits"]


@pytest.mark.parametrize(
    ("dtype", "block"), [(None, None), ("int4", 32), ("int4", 64), ("int8", 64)]
)
@pytest.mark.parametrize("body", MORE)
def test_one_product_gives_what_three_gave(body: str, dtype: str | None, block: int | None) -> None:
    """Grouped heads, so keys are half as wide; a bias for all but the values.

    In blocks of 64 the queries, which are moved off zero, have zero points, and no other weight.
    """
    model = graph(body)
    if (dtype, block) == ("int4", 64):
        model = graph(body, l_q_w=WEIGHTS["l_q_w"] + 1)
    settings = QuantizeConfig(block=block)
    share_model(model, dtype=dtype, config=settings)
    expected, before = run(model, x=X)[0], sum(v.const_value.nbytes for v in held(model))
    pack([model])
    assert products(model) == 1 and ops(model)["Split"] == 1 and ops(model)["Add"] <= 1
    with_zeros = [node for node in model.graph if len(node.inputs) == 4 and node.domain]
    assert len(with_zeros) == ((dtype, block) == ("int4", 64))
    assert np.allclose(run(model, x=X)[0], expected, atol=SUMS)
    grown = sum(value.const_value.nbytes for value in held(model)) - before
    # sizes of the parts, zeros for the values, and zero points of keys and values
    assert grown <= 3 * 8 + 32 * 4 + (64 if block == 64 else 0)
    once = ir.to_proto(model).SerializeToString()
    pack([model])
    assert ir.to_proto(model).SerializeToString() == once


def held(model: ir.Model) -> list[ir.Value]:
    return [v for v in model.graph.initializers.values() if v.const_value is not None]


def test_values_keep_their_names_and_the_weight_says_what_it_is() -> None:
    model = graph()
    for value in held(model):
        value.name = f"layers.0.{str(value.name)[2]}_proj.weight"
    pack([model])
    assert names(model)[0] == "layers.0.q_proj+k_proj+v_proj.weight"
    split = next(node for node in model.graph if node.op_type == "Split")
    assert [value.name for value in split.outputs] == ["q", "k", "v"]


@pytest.mark.parametrize(
    ("body", "left"),
    [
        (PLAIN.replace("l_v_w", "l_k_w"), 3),  # one weight for two: tied
        (
            PLAIN.replace("MatMul(x, l_v_w)", "MatMul(z, l_v_w) ").replace("q =", "z = Neg(x) q ="),
            2,
        ),
        (PLAIN.replace("v = MatMul(x, l_v_w)", "v = Identity(k)"), 1),  # two of them
        (PLAIN + " w = Neg(l_v_w) u = ReduceSum(w)", 2),  # read by another node
        (PLAIN.replace("v = M", "a = M") + " s = ReduceSum(a) v = Add(a, s)", 2),
    ],
)
def test_what_is_shared_or_of_another_value_stays_apart(body: str, left: int) -> None:
    used = {name: array for name, array in WEIGHTS.items() if name in body}
    model = build(TEXT.replace("BODY", body), 23, **used)
    expected = run(model, x=X)[0]
    pack([model])
    assert products(model) == left
    assert np.allclose(run(model, x=X)[0], expected, atol=SUMS)


def test_a_tied_weight_is_never_packed() -> None:
    """Not even one that this graph reads once."""
    model = graph()
    write_ties(model, [Tie("l_k_w", ("l_k_w", "other"), {"model": 1})])
    pack([model])
    assert products(model) == 2 and "l_k_w" in names(model)


def test_a_weight_that_another_graph_reads_apart_stays_apart() -> None:
    one, other = graph(), build("(float[b,64] x) => (float[b,32] y) { y = MatMul(x, l_k_w) }",
                                l_k_w=WEIGHTS["l_k_w"])  # fmt: skip
    pack([one, other])
    assert products(one) == 3
    pair = [graph(), graph()]
    pack(pair)
    assert [products(each) for each in pair] == [1, 1]
    assert names(pair[0]) == names(pair[1])
    text = TEXT.replace("BODY", "q = MatMul(x, l_q_w) v = MatMul(x, l_v_w)").replace("k, v", "v, v")
    narrow = build(text, 23, **{name: WEIGHTS[name] for name in ("l_q_w", "l_v_w")})
    pair = [graph(), narrow]
    pack(pair)  # of three, and of two of them
    assert [products(each) for each in pair] == [3, 2]


GATED = """(float[b,t,64] x) => (float[b,t,32] y) {
    g = MatMul(x, gate) u = MatMul(x, up) s = Sigmoid(g) h = Mul(s, u) y = MatMul(h, down) }"""
GATES = {"gate": normal(64, 96), "up": normal(64, 96, seed=1), "down": normal(96, 32, seed=2)}


@pytest.mark.parametrize(
    ("dtype", "gates", "left"), [("int4", True, 2), ("int4", False, 3), (None, True, 3)]
)
def test_a_gate_in_blocks_is_one_product_with_what_it_lets_through(
    dtype: str | None, gates: bool, left: int
) -> None:
    model = build(GATED, 21, **GATES)
    share_model(model, dtype=dtype)
    expected = run(model, x=X)[0]
    pack([model], gates=gates)
    assert products(model) == left
    assert ops(model)["Split"] == 3 - left
    assert np.allclose(run(model, x=X)[0], expected, atol=SUMS)  # seen 0


@pytest.mark.parametrize(
    ("text", "members"),
    [
        (GATED, ("up", "other")),  # another graph reads it, too
        (GATED.replace("MatMul(x, up)", "MatMul(g, up)"), ()),  # of another value
        (GATED.replace("g = MatMul(x, gate) u", "v = MatMul(x, gate) g = MatMul(v, mid) u"), ()),
    ],
)
def test_products_stay_apart_that_are_no_gate(text: str, members: tuple[str, ...]) -> None:
    weights = {**GATES, "mid": normal(96, 96, seed=3)}
    if "(g, up)" in text:
        weights["up"] = normal(96, 96, seed=4)
    model = build(text, 21, **{name: array for name, array in weights.items() if name in text})
    share_model(model, dtype="int4")
    if members:
        write_ties(model, [Tie("up", members, {"model": 1})])
    before = products(model)
    pack([model], gates=True)
    assert products(model) == before


def encoder() -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS}
    return BertForSequenceClassification(BertConfig(vocab_size=97, num_attention_heads=4, **sizes))


def speech() -> Any:
    sizes: dict[str, Any] = {"d_model": 32, "num_mel_bins": 16, "max_source_positions": 32}
    for part in ("encoder", "decoder"):
        sizes |= {f"{part}_layers": 1, f"{part}_attention_heads": 4, f"{part}_ffn_dim": 48}
    ids = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 1)
    return Whisper(WhisperConfig(vocab_size=97, decoder_start_token_id=2, **ids, **sizes))


@pytest.mark.parametrize(
    "made", [encoder, pytest.param(speech, marks=pytest.mark.slow)], ids=["BERT", "Whisper"]
)
def test_decoders_are_packed_and_right(made: Any, tmp_path: Path) -> None:
    """Whisper's keys have no bias, and its four graphs share one data file; encoders stay apart."""
    torch.manual_seed(0)
    model = drawn(made())
    sizes = {}
    for profile in ("portable", "cpu"):
        path = tmp_path / profile
        package = export(model, path, ExportConfig(profile=profile))
        sizes[profile] = (path / "model.onnx_data").stat().st_size if made is speech else 0
    for record in package.manifest.graphs:
        splits = ops(ir.load(package.path / record.path))["Split"]
        assert (splits >= 1) == any("present" in name for name in record.outputs)
    assert all(output.ok for output in check_parity(package.path, package.manifest))
    assert audit(package.path).ok
    assert sizes["cpu"] <= sizes["portable"] * 1.02


@pytest.mark.parametrize("name", ["Qwen3"])
def test_norms_of_queries_and_tied_layers(name: str, tmp_path: Path) -> None:
    model, package = packed(name, tmp_path, dtype="int4")
    before = ops(ir.load(package.path / "model.onnx"))
    assert before["Split"] == 2 * LAYERS  # attention, and the gates
    assert all(output.ok for output in check_parity(package.path, package.manifest))
    model.model.layers[1].self_attn.k_proj = model.model.layers[0].self_attn.k_proj
    tied = ffmerge.export(model, tmp_path / "tied", ExportConfig(profile="cpu"))
    after = ops(ir.load(tied.path / "model.onnx"))
    assert after["Split"] == LAYERS and after["MatMul"] == before["MatMulNBits"] + 2 * LAYERS
    assert audit(tied.path).ok
