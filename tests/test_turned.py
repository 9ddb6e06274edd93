"""In the graph for onnxruntime-genai attention rotates queries and keys itself, or as before."""

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphs import normal, ops, run

from ffmerge.exporter.turned import turn_inside

LENGTH, SIZE = 32, 32
ANGLES = """p = Unsqueeze(position_ids, two) f = Cast<to=1>(p) a = Mul(f, w)
    c = Cos(a) s = Sin(a)"""
TURNS = """tq = RotaryEmbedding<num_heads=4>(q, c, s)
    tk = RotaryEmbedding<num_heads=2>(k, c, s)"""
TEXT = """<ir_version: 10, opset_import: ["": 23, "com.microsoft": 1]>
g (float[b,t,256] x, int64[b,t] position_ids, float[b,2,l,32] pk, float[b,2,l,32] pv,
   int32[b,o] rows, int32 whole) => (float[b,t,128] y, float[b,2,n,32] nk, float[b,2,n,32] nv) {
    q, k, v = Split<axis=-1>(x, parts) ANGLES TURNS
    y, nk, nv = com.microsoft.GroupQueryAttention<num_heads=4, kv_num_heads=2>(
        tq, tk, v, pk, pv, rows, whole) }"""


def graph(
    angles: str = ANGLES, turns: str = TURNS, rotated: int = SIZE, **weights: Any
) -> ir.Model:
    proto = onnx.parser.parse_model(TEXT.replace("ANGLES", angles).replace("TURNS", turns))
    frequencies = 10.0 ** -np.arange(rotated // 2, dtype=np.float32)
    held = {"parts": np.array([128, 64, 64]), "two": np.array([2]), "w": frequencies, **weights}
    for name, array in held.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), name))
    return ir.from_proto(proto)


def feeds(past: int, new: int) -> dict[str, Any]:
    return {
        "x": normal(1, new, 256), "position_ids": np.arange(past, past + new)[None],
        "pk": normal(1, 2, past, SIZE, seed=1), "pv": normal(1, 2, past, SIZE, seed=2),
        "rows": np.array([[past + new - 1]], np.int32), "whole": np.array(past + new, np.int32),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("turns", "rotated"),
    [
        (TURNS, SIZE),
        (TURNS.replace("num_heads", "interleaved=1, num_heads"), SIZE),
        (TURNS.replace("num_heads", "rotary_embedding_dim=16, num_heads"), 16),
        ("z = Neg(k) " + TURNS.replace("(k,", "(z,"), SIZE),  # something stands between
    ],
)
def test_it_gives_what_the_rotations_gave(turns: str, rotated: int) -> None:
    model, expected = graph(turns=turns, rotated=rotated), []
    cases = [feeds(*case) for case in ((0, 7), (0, 1), (9, 1), (LENGTH - 1, 1))]
    expected = [run(model, **case) for case in cases]
    turn_inside(model, LENGTH)
    assert "RotaryEmbedding" not in ops(model) and ops(model)["Split"] == ("Neg" in turns)
    for case, wanted in zip(cases, expected, strict=True):
        for one, other in zip(run(model, **case), wanted, strict=True):
            assert np.allclose(one, other, atol=1e-5)  # measured 5e-7
    assert max(v.const_value.nbytes for v in model.graph.initializers.values()) < 1024


@pytest.mark.parametrize(
    ("angles", "turns"),
    [
        # of another input
        (ANGLES.replace("(position_ids", "(rows"), TURNS),
        # what a position has goes by the longest: as where long texts have other frequencies
        ("p = Unsqueeze(position_ids, two) f = Cast<to=1>(p) m = ReduceMax(f) u = Add(w, m)"
         "a = Mul(f, u) c = Cos(a) s = Sin(a)", TURNS),
        (ANGLES, TURNS.replace("(k, c, s)", "(k, s, c)")),
        (ANGLES, "tq = RotaryEmbedding<num_heads=4>(q, c, s) tk = Identity(k)"),
    ],
)  # fmt: skip
def test_what_the_operator_does_not_rotate_is_rotated_before(angles: str, turns: str) -> None:
    model = graph(angles, turns)
    wanted = run(model, **feeds(4, 1))
    turn_inside(model, LENGTH)
    assert ops(model)["RotaryEmbedding"] == turns.count("RotaryEmbedding")
    for one, other in zip(run(model, **feeds(4, 1)), wanted, strict=True):
        assert np.array_equal(one, other)
