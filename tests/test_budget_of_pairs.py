"""A budget of several graphs: one choice for all of them, and the size holds for all files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from graphs import build, normal, run
from tiny_wider import seeded

import ffmerge
from ffmerge.config import ExportConfig, QuantizeConfig
from ffmerge.errors import InputError
from ffmerge.exporter.convert import _joined
from ffmerge.exporter.graphs import STATES
from ffmerge.passes.graph.audit import audit
from ffmerge.passes.graph.bits import Files
from ffmerge.passes.graph.joined import SECOND, join
from ffmerge.passes.graph.quantize import for_package
from ffmerge.passes.graph.tensors import stored
from ffmerge.runtime_tests.results import model_bytes

FIRST = """(int64[b,s] input_ids, float[b,s,256] more) => (float[b,s,256] last) {
    x = Gather(E, input_ids) a = Add(x, more) h = MatMul(a, W) last = Mul(h, loud) }"""
THEN = """(int64[b,t] input_ids, float[b,s,256] states) => (float[b,t,64] logits) {
    x = Gather(E, input_ids) m = ReduceMean<keepdims=1>(states, axes) a = Add(x, m)
    h = MatMul(a, V) l = MatMul(h, T) logits = Mul(l, loud) }"""
READS = {"last": "states"}


def pair() -> tuple[ir.Model, ir.Model]:
    """Return two graphs with one table in common, and constants of one name that differ."""
    table = normal(64, 256)
    first = build(FIRST, E=table, W=normal(256, 256, seed=1) / 16, loud=np.float32(2.0))
    second = build(
        THEN,
        E=table,
        V=normal(256, 256, seed=2) / 16,
        T=normal(256, 64, seed=3) / 16,
        loud=np.float32(3.0),
        axes=np.array([1]),
    )
    return first, second


def batch(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    ids, later = rng.integers(0, 64, (4, 9)), rng.integers(0, 64, (4, 5))
    more = normal(4, 9, 256, seed=seed).astype(np.float32)
    return {"input_ids": ids, "more": more, f"{SECOND}input_ids": later}


def test_the_joined_graph_is_one_after_the_other(tmp_path: Path) -> None:
    """It computes that, the table is in it once, and the two graphs stay what they were."""
    first, second = pair()
    for name, model in (("first", first), ("second", second)):
        ir.save(model, tmp_path / f"{name}.onnx")
    joined = join(first, second, READS)
    ir.save(joined, tmp_path / "joined.onnx")
    given = batch()
    (states,) = run(str(tmp_path / "first.onnx"), input_ids=given["input_ids"], more=given["more"])
    (expected,) = run(
        str(tmp_path / "second.onnx"), input_ids=given[f"{SECOND}input_ids"], states=states
    )
    (found,) = run(str(tmp_path / "joined.onnx"), **given)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)  # measured 0
    held = [item.tensor for item in stored(joined) if item.tensor.shape == (64, 256)]
    assert len(held) == 1
    for name, model in (("first", first), ("second", second)):
        ir.save(model, tmp_path / f"{name}2.onnx")
        before, after = (tmp_path / f"{name}{end}.onnx" for end in ("", "2"))
        assert before.read_bytes() == after.read_bytes()


@pytest.mark.parametrize(("shared", "copies"), [(True, 1), (False, 2)])
def test_a_weight_counts_as_often_as_it_is_stored(shared: bool, copies: int) -> None:
    first, second = pair()
    files = Files([[first], [second]], shared)
    assert files.copies("E") == copies and files.copies("W") == 1
    config = QuantizeConfig(calibration=[batch()], forms={}, rounded={})
    chosen: dict[int, Sequence[int]] = {}
    for budget in (75_000, 100_000, 180_000):
        settings = QuantizeConfig(**{**vars(config), "budget": budget})
        forms, rounded = for_package(join(first, second, READS), files, settings)
        assert forms.keys() == set("EWVT") and rounded.keys() <= forms.keys()
        table, wide, narrow = 64 * 256, 256 * 256, 256 * 64
        elements = {"E": table * copies, "W": wide, "V": wide, "T": narrow}
        size = sum(n * (forms[name].bits / 8 + 4 / forms[name].block)
                   for name, n in elements.items())  # fmt: skip
        chosen[budget] = [forms[name].bits for name in "EWVT"]
        assert size <= budget
    assert sum(chosen[75_000]) < sum(chosen[100_000]) < sum(chosen[180_000])
    with pytest.raises(InputError, match="too small: in the fewest bits"):
        settings = QuantizeConfig(**{**vars(config), "budget": 40_000})
        for_package(join(first, second, READS), files, settings)


def test_the_first_graph_is_heard_through_the_second() -> None:
    """What the second graph makes nothing of keeps few bits, however much the first's output moves.

    Alone, the first graph's W would have all of its output to lose.
    """
    first, _ = pair()
    for size in (1e-3, 1e3):
        second = build(
            THEN.replace("a = Add(x, m)", "r = Mul(m, size) a = Add(x, r)"),
            E=normal(64, 256),
            V=normal(256, 256, seed=2) / 16,
            T=normal(256, 64, seed=3) / 16,
            loud=np.float32(3.0),
            axes=np.array([1]),
            size=np.float32(size),
        )
        config = QuantizeConfig(calibration=[batch()], forms={}, rounded={}, budget=90_000)
        forms, _ = for_package(join(first, second, READS), Files([[first], [second]]), config)
        faint = size < 1
        assert (forms["W"].bits < forms["V"].bits) == faint
        assert (forms["E"].bits == 8) <= faint


def test_a_batch_has_the_decoders_rows_and_no_length_twice() -> None:
    one = {"input_ids": np.arange(24).reshape(4, 6), "attention_mask": np.ones((4, 6))}
    other = {
        "input_ids": np.arange(12).reshape(2, 6),
        "encoder_attention_mask": np.ones((2, 6)),
        STATES: np.zeros((2, 6, 8)),
    }
    found = _joined(one, other)
    assert found["input_ids"].tolist() == one["input_ids"][:2].tolist()
    assert found["attention_mask"].shape == (2, 6) and STATES not in found
    assert found[f"{SECOND}input_ids"].tolist() == [[0, 1, 2, 3, 4], [6, 7, 8, 9, 10]]
    assert found[f"{SECOND}encoder_attention_mask"].shape == (2, 6)


def wide() -> Any:
    return seeded(
        "T5ForConditionalGeneration", "T5Config", num_layers=1, num_decoder_layers=1,
        vocab_size=61, d_model=128, d_kv=32, d_ff=256, num_heads=4, pad_token_id=0,
        eos_token_id=1, decoder_start_token_id=2,
    )  # fmt: skip


def rows() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    ids, mask = rng.integers(3, 60, (24, 12)), np.ones((24, 12), np.int64)
    ids[::3, 9:], mask[::3, 9:] = 0, 0
    words = rng.integers(3, 60, (24, 7))
    return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": words}


def divergence(model: Any, served: Any) -> float:
    """Return the mean KL divergence of the next words, PyTorch's from the package's."""
    given = {name: torch.tensor(array) for name, array in rows().items()}
    with torch.no_grad():
        expected = model(**given).logits.double().log_softmax(-1)
    found = served(**given).logits.double().log_softmax(-1)
    return float((expected.exp() * (expected - found)).sum(-1).mean())


def test_a_pair_keeps_its_budget_and_is_no_worse_than_one_precision(tmp_path: Path) -> None:
    model = wide()
    single = ffmerge.export(model, tmp_path / "one", ExportConfig(dtype="int4"), data=rows())
    budget = model_bytes(single.manifest)
    config = ExportConfig(dtype="int4", budget=f"{budget}B")
    mixed = ffmerge.export(model, tmp_path / "mixed", config, data=rows())
    assert 0.85 * budget < model_bytes(mixed.manifest) <= budget
    assert audit(mixed.path).ok and len(mixed.manifest.graphs) == 4
    forms = mixed.manifest.bits
    assert {name.partition(".")[0] for name in forms} >= {"encoder", "decoder"}
    lost = {
        each.path.name: divergence(model, ffmerge.load_package(each.path))
        for each in (single, mixed)
    }
    assert lost["mixed"] <= lost["one"], lost


@pytest.mark.slow
def test_where_each_file_has_its_weights_the_budget_is_of_all_files(tmp_path: Path) -> None:
    config = ExportConfig(dtype="int4", budget="280kB", layout="transformers.js")
    package = ffmerge.export(wide(), tmp_path / "out", config, data=rows())
    assert 0.8 * 280_000 < model_bytes(package.manifest) <= 280_000
    assert audit(package.path).ok
