"""A decoder's table that is embedding and head, by columns: the same values, in memory once."""

import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from graphs import build, normal, ops, run
from test_fused import drawn
from test_resident import growth_of
from transformers import T5Config, T5ForConditionalGeneration

from ffmerge.config import ExportConfig
from ffmerge.exporter.by_columns import store_by_columns
from ffmerge.exporter.package import export
from ffmerge.passes.graph import resident
from ffmerge.passes.graph.audit import audit
from ffmerge.passes.graph.run import share_model
from ffmerge.passes.graph.tensors import shape_of
from ffmerge.runtime_tests.parity import check_parity

ROWS, WIDTH = 5000, 64
SUMS = 2e-5  # float32 against float64, 64 products of N(0, 1); seen up to 5e-6
TEXT = """(int64[SHAPE] ids) => (float[SHAPE,ROWS] logits, float[SHAPE,WIDTH] present) {
    present = Gather(W, ids)  h = Relu(present)  t = Transpose<perm=[1,0]>(W)  BODY }"""
HEAD = "logits = MatMul(h, t)"


def decoder(
    shape: str = "rows,tokens", body: str = HEAD, rows: int = ROWS, width: int = WIDTH
) -> ir.Model:
    """Return a graph that is shared; its second output is the cache, by its name."""
    text = TEXT.replace("BODY", body).replace("SHAPE", shape)
    text = text.replace("ROWS", str(rows)).replace("WIDTH", str(width))
    model = build(text, W=normal(rows, width), b=normal(rows))
    rank = len(shape.split(","))
    for name in ("n0", "n1"):  # as an exporter knows it
        model.graph.node(name).outputs[0].shape = ir.Shape([None] * rank + [width])
    share_model(model)
    model.graph.outputs[1].name = "present.0.key"
    return model


def table_of(model: ir.Model) -> tuple[list[tuple[str, int]], bool]:
    """Return what reads the table, and whether a caller may give it."""
    table = model.graph.initializers["W"]
    return sorted((use.node.op_type, use.idx) for use in table.uses()), table.is_graph_input()


@pytest.mark.parametrize("shape", [(1,), (1, 1), (2, 3), (0, 3)])
def test_it_computes_what_the_table_by_rows_does(shape: tuple[int, ...]) -> None:
    model = decoder(",".join("rt"[: len(shape)]))
    store_by_columns([model])
    assert table_of(model) == ([("Gather", 0), ("MatMul", 1)], True)
    ids = np.random.default_rng(1).integers(0, ROWS, shape)
    logits, found = run(model, ids=ids)
    table = normal(ROWS, WIDTH)
    assert np.array_equal(found, table[ids])
    expected = np.maximum(table[ids], 0).astype(np.float64) @ table.T.astype(np.float64)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=SUMS)
    once = ir.to_proto(model).SerializeToString()
    store_by_columns([model])
    assert ir.to_proto(model).SerializeToString() == once


@pytest.mark.parametrize(
    "body",
    [
        "p = MatMul(h, t)  most = ReduceMax<keepdims=0>(W)  logits = Add(p, most)",
        "logits = Gemm<transB=1>(h, W, b)",
        "logits = Gemm<transB=1, alpha=0.5>(h, W)",
    ],
)
def test_a_table_that_is_read_otherwise_stays(body: str) -> None:
    model = decoder("rows", body)
    before = table_of(model)
    store_by_columns([model])
    assert table_of(model) == before and not before[1]


def test_a_table_that_is_put_out_stays() -> None:
    model = decoder()
    model.graph.outputs.append(model.graph.initializers["W"])
    store_by_columns([model])
    assert not table_of(model)[1] and list(shape_of(model.graph.initializers["W"].const_value)) == [
        ROWS,
        WIDTH,
    ]


def test_where_no_token_comes_alone_or_another_graph_wants_rows_it_stays() -> None:
    encoder, other = decoder(), decoder("rows", "logits = Gemm<transB=1>(h, W, b)")
    encoder.graph.outputs[1].name = "states"
    for models in ([encoder], [decoder(), other]):
        store_by_columns(models)
        assert not any(table_of(model)[1] for model in models)
    both = [encoder, decoder()]
    store_by_columns(both)
    assert all(table_of(model)[1] for model in both)


def test_a_pair_looks_up_in_the_columns_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Encoder, first step, later steps, and both of these in one graph: one table for all."""
    monkeypatch.setattr(resident, "LARGE", 0)
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4,
        decoder_start_token_id=0,
    )  # fmt: skip
    model = drawn(T5ForConditionalGeneration(config))
    package = export(model, tmp_path / "package", ExportConfig(profile="cpu"))
    for file in package.path.glob("*.onnx"):
        graph = ir.load(file)
        table = graph.graph.initializers["shared.weight"]
        assert table.is_graph_input() and list(table.shape or ()) == [32, 97], file.name
        reads = {node.op_type for node in table.consumers()}
        expected = {"Gather", "MatMul"}
        if "encoder" in file.name:
            expected = {"Gather"}
        assert reads == expected, file.name
        assert ops(graph)["Gather"] > 0
    assert audit(package.path).ok
    assert all(each.ok for each in check_parity(package.path, package.manifest))


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_a_fresh_session_holds_it_once(tmp_path: Path) -> None:
    """40 MB; seen: 0.3 MB of growth, as it stays mapped, and 82 MB if no caller may give it."""
    growth, size = {}, 20000 * 512 * 4
    for given in (True, False):
        model = decoder(rows=20000, width=512)
        store_by_columns([model])
        if not given:
            model.graph.inputs.pop()
        growth[given] = growth_of(model, tmp_path / str(given))
    assert growth[True] <= 1.1 * size, growth
    assert growth[False] > 1.5 * size, growth  # it would still be packed: else drop the input
