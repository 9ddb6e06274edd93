"""What a package is compared on: drawn like the task, real rows, and greedy decoding."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference.tasks import REFERENCES, Reference
from scipy.special import rel_entr, softmax
from tiny import bert, gpt2
from transformers import BertConfig, BertModel

from ffmerge import export
from ffmerge.config import ExportConfig
from ffmerge.errors import InputError
from ffmerge.exporter.graphs import Graph, graphs
from ffmerge.exporter.greedy import greedy
from ffmerge.exporter.plan import make_plan
from ffmerge.exporter.rows import (
    LENGTH,
    ROWS,
    check_rows,
    real_rows,
    rounding_length,
    rounding_rows,
)
from ffmerge.models import checkpoint, data, tasks
from ffmerge.models.derive import arguments, input_specs
from ffmerge.models.examples import Examples, from_arrays
from ffmerge.models.manifest import GraphRecord, Manifest, best_keys
from ffmerge.models.probe import (
    InputSpec,
    Probe,
    Tokens,
    best_classes,
    best_scores,
    kept,
    stored_elements,
)  # fmt: skip
from ffmerge.models.processing import like_the_task, load
from ffmerge.runtime_tests.decode import check_generation
from ffmerge.runtime_tests.parity import parity_of
from ffmerge.runtime_tests.quality import Quality, compare_scores, mean, of_all, of_best
from ffmerge.runtime_tests.reference import read_reference
from ffmerge.runtime_tests.runtimes.registry import find_runtime
from ffmerge.runtime_tests.tolerance import TOLERANCES

Plan = tuple[Graph, ...]
EXACT = TOLERANCES["fp32"]


@pytest.fixture(scope="module", params=["village", "numerals"])
def written(request: pytest.FixtureRequest) -> tuple[Reference, Any, Plan, dict[str, Any]]:
    """A reference model that writes text, its graphs and a few real rows."""
    reference = REFERENCES[request.param]
    model = checkpoint.load(reference.folder)
    task = tasks.infer(model)
    examples = data.from_arrays(reference.load("test"))
    return reference, model, graphs(model, task), real_rows(examples, model, task)


def test_ids_are_drawn_as_the_tokenizer_writes_them() -> None:
    from transformers import AutoTokenizer

    folder = REFERENCES["numerals"].folder
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = checkpoint.load(folder)
    specs = like_the_task(input_specs(model), load(folder, arguments(model)), model.config)
    encoder, decoder, *_ = graphs(model, "text2text-generation-with-past", specs)
    probe, decoders = encoder.probe, decoder.probe
    drawn = probe.draw(1)
    ids, mask = drawn["input_ids"], drawn["attention_mask"]
    assert (ids[mask == 0] == tokenizer.pad_token_id).all() and (mask == 0).any()
    for row, length in zip(ids, mask.sum(1), strict=True):
        assert row[length - 1] == tokenizer.eos_token_id
        assert not {*row[: length - 1]} & {*tokenizer.all_special_ids}
        assert row[: length - 1].max() < len(tokenizer)
    assert np.array_equal(ids, probe.draw(1)["input_ids"])
    first = decoders.draw(0)["input_ids"]
    assert (first[:, 0] == model.config.decoder_start_token_id).all()


def test_a_row_behind_a_past_does_not_begin_a_text() -> None:
    tokens = Tokens(special=(0, 1, 2), pad=0, first=(1,), last=(2,))
    shape = ("batch_size", "sequence_length")
    spec = InputSpec("input_ids", "int64", shape, "integer", 50, tokens)
    keys = InputSpec("past_key_values.0.key", "float32", ("batch_size", "past_sequence_length"))
    sizes = {"batch_size": 3, "sequence_length": 6}
    probe = Probe((spec, keys), tuple({**sizes, "past_sequence_length": n} for n in (0, 2)))
    fresh, later = (probe.draw(case)["input_ids"] for case in (0, 1))
    assert (fresh[:, 0] == 1).all() and (later[:, 0] > 2).all()
    for drawn in (fresh, later):  # row i ends in i % 3 padding
        assert [row[5 - i] for i, row in enumerate(drawn)] == [2, 2, 2]
        assert [(row == 0).sum() for row in drawn] == [0, 1, 2]


def test_pictures_are_smooth_and_normalized(tmp_path: Path) -> None:
    from transformers import ViTImageProcessor

    processor = ViTImageProcessor(image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.25, 0.3])
    processor.save_pretrained(tmp_path)
    spec = InputSpec("pixel_values", "float32", ("batch_size", 3, 32, 32))
    found = load(tmp_path, ["pixel_values"])
    cases = ({"batch_size": 5},)
    drawn = Probe(like_the_task([spec], found, None), cases).draw(0)["pixel_values"]
    plain = drawn * np.array([0.2, 0.25, 0.3]).reshape(3, 1, 1) + np.array([0.4, 0.5, 0.6]).reshape(
        3, 1, 1
    )
    assert -1e-6 < plain.min() and plain.max() < 1 + 1e-6
    assert np.abs(np.diff(plain, axis=-1)).max() < 3 / 31 + 1e-6  # at most 1 from point to point
    assert plain.std() > 0.1  # and no flat grey
    unknown = Probe(like_the_task([spec], load(None, ()), None), cases).draw(0)["pixel_values"]
    assert -1 <= unknown.min() < -0.5 and 0.5 < unknown.max() <= 1


def test_real_rows_come_from_all_over_the_data_and_are_bounded() -> None:
    reference = REFERENCES["digits"]
    model = checkpoint.load(reference.folder)
    arrays = {"pixel_values": np.zeros((1000, 1, 8, 16), "f"), "labels": np.arange(1000)}
    rows = real_rows(from_arrays(arrays), model, "image-classification")
    assert len(rows["labels"]) == ROWS
    assert (rows["labels"][0], rows["labels"][-1]) == (0, 999)
    large = {"pixel_values": np.zeros((9, 3, 400, 400), "f"), "labels": np.arange(9)}
    assert len(real_rows(from_arrays(large), model, "image-classification")["labels"]) == 2


@pytest.mark.parametrize("left", [False, True])
def test_long_text_is_cut_where_its_padding_is(left: bool) -> None:
    model = checkpoint.load(REFERENCES["village"].folder)
    mask = (np.arange(100) < np.array([[90], [70]])).astype(np.int64)
    ids = np.arange(1, 101) * mask
    if left:
        mask, ids = mask[:, ::-1], ids[:, ::-1]
    rows = real_rows(
        from_arrays({"input_ids": ids, "attention_mask": mask}), model, "text-generation"
    )
    assert rows["input_ids"].shape == (2, LENGTH)
    assert (rows["input_ids"][0] > 0).all()
    assert rows["attention_mask"][1].all()


def test_what_counts_samples_or_classes_is_not_cut() -> None:
    """A mask of sound is as long as the sound, and beside text not all that has two axes is."""
    model = checkpoint.load(REFERENCES["village"].folder)
    mask = (np.arange(900) < np.array([[900], [500]])).astype(np.int64)
    frames = np.ones((2, 900, 8), "f")
    for name, sound in (("input_values", frames[..., 0]), ("input_features", frames)):
        given = {name: sound, "attention_mask": mask, "labels": np.ones((2, 80), int)}
        rows = real_rows(from_arrays(given), model, "automatic-speech-recognition")
        assert rows[name].shape == sound.shape
        assert np.array_equal(rows["attention_mask"], mask)
        assert rows["labels"].shape == (2, LENGTH)
    ids, boxes = np.ones((2, 100), int), np.ones((2, 100, 4), int)
    text = {"input_ids": ids, "attention_mask": ids > 0, "bbox": boxes}
    text["labels"] = np.zeros((2, 120), "f")  # of many classes a row may have several
    rows = real_rows(from_arrays(text), model, "text-classification")
    assert rows["attention_mask"].shape == (2, LENGTH) and rows["bbox"].shape == (2, LENGTH, 4)
    assert rows["labels"].shape == (2, 120)


def test_data_of_another_kind_is_refused() -> None:
    model = checkpoint.load(REFERENCES["digits"].folder)
    plan = graphs(model, "image-classification")
    with pytest.raises(InputError, match="the data has no pixel_values"):
        check_rows(plan[0], {"input_ids": np.zeros((2, 3), np.int64)})


def test_greedy_ids_are_those_of_generate(
    written: tuple[Reference, Any, Plan, dict[str, Any]],
) -> None:
    """The loop of transformers, with a cache and its settings, against whole forward passes."""
    _, model, plan, batch = written
    made = greedy(plan, batch, model)
    given = {k: torch.tensor(made[k]) for k in ("input_ids", "attention_mask") if k in made}
    if not model.config.is_encoder_decoder:
        given = {"input_ids": torch.tensor(made["start"])}
    expected = model.generate(**given, do_sample=False, num_beams=1, max_new_tokens=16)
    start = made["start"].shape[1]
    ends = {model.generation_config.eos_token_id}
    compared = 0
    for row, ids in zip(expected[:, start:].tolist(), made["tokens"].tolist(), strict=True):
        until = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
        assert row[:until] == ids[:until]
        compared += until
    assert compared > 20
    assert (made["margin"] > 0).all()


@dataclass(frozen=True)
class TorchSession:
    """A graph of the plan, run by PyTorch; ``forgets`` the oldest position of its cache."""

    graph: Graph
    forgets: bool = False
    used: str = "torch"
    device: str = "cpu"

    def run(self, names: Sequence[str], feeds: Mapping[str, Any]) -> dict[str, Any]:
        feeds = {name: np.array(array) for name, array in feeds.items()}
        if self.forgets:
            for name, array in feeds.items():
                if name.startswith("past_") and "encoder" not in name:
                    array[:, :, :1] = 0
        outputs = self.graph.run(feeds)
        return {name: outputs[name] for name in names}


def _served(plan: Plan, forgets: bool) -> list[tuple[GraphRecord, TorchSession]]:
    chosen = (plan[0], plan[-1]) if len(plan) > 1 else plan
    return [
        (GraphRecord(f"{g.name}.onnx", g.outputs, g.probe), TorchSession(g, forgets))
        for g in chosen
    ]


def test_replay_with_the_cache_gives_the_ids_of_whole_passes(
    written: tuple[Reference, Any, Plan, dict[str, Any]],
) -> None:
    _, model, plan, batch = written
    made = greedy(plan, batch, model)
    found = check_generation(_served(plan, False), made, "all", EXACT)
    assert found.ok and found.agreement == 1
    assert (found.prompts, found.compared, found.ties) == (4, 4 * 16, 0)


def test_a_cache_that_forgets_is_found(
    written: tuple[Reference, Any, Plan, dict[str, Any]],
) -> None:
    _, model, plan, batch = written
    found = check_generation(_served(plan, True), greedy(plan, batch, model), "all", EXACT)
    assert not found.ok and found.agreement < 1
    assert found.difference and found.difference["step"] > 0
    assert "instead of" in str(found.reason)


def test_where_two_ids_are_equally_likely_both_are_right(
    written: tuple[Reference, Any, Plan, dict[str, Any]],
) -> None:
    _, model, plan, batch = written
    made = greedy(plan, batch, model)
    other = made["tokens"].copy()
    other[0, 3] += 1
    margin = made["margin"].copy()
    for tie, ties, compared in ((0.5, 1, 3 + 3 * 16), (0.1, 0, 4 + 3 * 16)):
        margin[0, 3] = 0.3
        stored = {**made, "tokens": other, "margin": margin}
        found = check_generation(_served(plan, False), stored, "all", replace(EXACT, tie=tie))
        assert (found.ties, found.compared) == (ties, compared)
        assert found.ok is bool(ties)


def test_scores_are_compared_as_by_hand() -> None:
    generator = np.random.default_rng(0)
    expected = generator.standard_normal((6, 9)).astype("f")
    got = expected + 0.3 * generator.standard_normal((6, 9)).astype("f")
    counted = np.array([True, True, False, True, True, True])
    quality = compare_scores(of_all(expected, got), counted, 0.0)
    p, q = softmax(expected[counted].astype(float), -1), softmax(got[counted].astype(float), -1)
    assert quality is not None and quality.positions == 5
    assert quality.kl == pytest.approx(rel_entr(p, q).sum(-1).mean(), rel=1e-14)  # 2.4e-15
    assert quality.agreement == (p.argmax(-1) == q.argmax(-1)).mean()
    assert compare_scores(of_all(expected, got), counted & False, 0.0) is None


def test_a_tie_is_no_disagreement_and_a_class_behind_it_is() -> None:
    expected = np.array([[1.0, 1.0, 0.5]])
    counted = np.array([True])
    for first, tie, agreement in ((1, 0.0, 1), (2, 0.0, 0), (2, 0.5, 1), (2, 0.4, 0)):
        got = np.eye(3)[[first]]
        quality = compare_scores(of_all(expected, got), counted, tie)
        assert quality is not None and quality.agreement == agreement
    parts = [Quality(1, 1.0, 0.2), Quality(3, 0.0, 0.6)]
    assert mean(parts) == Quality(4, 0.25, pytest.approx(0.5, rel=1e-15))  # 1.1e-16


def test_the_best_classes_and_the_others_as_one_are_compared_as_by_hand() -> None:
    generator = np.random.default_rng(0)
    logits = 4 * generator.standard_normal((5, 3, 500)).astype("f")
    other = logits + generator.standard_normal(logits.shape).astype("f")
    classes = best_classes(logits)
    scores = of_best(best_scores(logits, classes), other, classes)
    quality = compare_scores(scores, np.ones(15, bool), 0.0)
    p, q = softmax(logits.astype(float), -1), softmax(other.astype(float), -1)
    p, q = p.reshape(15, -1), q.reshape(15, -1)
    kept = [np.append(row[at], 1 - row[at].sum()) for row, at in zip(p, classes, strict=True)]
    left = [np.append(row[at], 1 - row[at].sum()) for row, at in zip(q, classes, strict=True)]
    assert quality is not None and quality.positions == 15
    by_hand = rel_entr(np.array(kept), np.array(left)).sum(-1).mean()
    assert quality.kl == pytest.approx(by_hand, rel=1e-12)  # measured 0
    assert 0.9 * rel_entr(p, q).sum(-1).mean() < quality.kl < rel_entr(p, q).sum(-1).mean()
    assert quality.agreement == (p.argmax(-1) == q.argmax(-1)).mean() < 1


def test_a_class_that_is_none_of_the_best_is_behind_all_of_them() -> None:
    logits = np.arange(200.0)[None]
    other = logits.copy()
    other[0, 3] = 300
    classes = best_classes(logits)
    assert sorted(classes[0]) == list(range(136, 200))
    scores = of_best(best_scores(logits, classes), other, classes)
    assert scores.behind.tolist() == [63.0]
    assert scores.got[0, -1] == pytest.approx(300)


def test_of_large_logits_all_real_positions_are_judged(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    rows = {"input_ids": generator.integers(0, 9000, (3, 40))}
    rows["attention_mask"] = (np.arange(40) < [[40], [33], [27]]).astype(np.int64)
    model = gpt2(layers=1)
    model.resize_token_embeddings(9000)
    export(model, tmp_path / "p", data=from_arrays(rows))
    [graph], reference = Manifest.read(tmp_path / "p").graphs, read_reference(tmp_path / "p")
    session = find_runtime("cpu").open(tmp_path / "p" / graph.path, "all")
    [logits, *_] = parity_of(graph, session, reference, "all", EXACT)
    assert logits.ok and logits.quality is not None and logits.quality.positions == 100
    _, scores = best_keys(graph.path, len(graph.probe.cases), "logits")
    reference.tensors[scores][7, -1] = 9  # one position that is not among those kept whole
    [logits, *_] = parity_of(graph, session, reference, "all", EXACT)
    assert not logits.ok and logits.reason is not None and "divergence" in logits.reason


@pytest.mark.parametrize(("off", "many", "ok"), [(0.7, 9, True), (2.0, 1, True), (2.0, 2, False)])
def test_elements_of_a_cache_may_be_as_far_off_as_its_direction_says(
    tmp_path: Path, off: float, many: int, ok: bool
) -> None:
    """Those of a value in int8, off in root mean squares; of any other output 0.5 may be.

    One of 4,000 is spared.
    """
    rows = {"input_ids": np.random.default_rng(0).integers(0, 60, (3, 20))}
    export(gpt2(layers=1), tmp_path / "p", data=from_arrays(rows))
    [graph], reference = Manifest.read(tmp_path / "p").graphs, read_reference(tmp_path / "p")
    session = find_runtime("cpu").open(tmp_path / "p" / graph.path, "all")
    real = len(graph.probe.cases)
    expected = reference.expected(graph, real, "present.0.value")
    assert expected is not None
    smallest = np.abs(expected).argsort(axis=None)[:many]
    expected.flat[smallest] += off * np.sqrt(np.square(expected).mean())
    [found] = [
        output
        for output in parity_of(graph, session, reference, "all", TOLERANCES["int8"])
        if output.name == "present.0.value"
    ]
    assert found.ok == ok
    assert found.cosine is not None and found.cosine > 0.998  # measured 0.9995 and more


def test_logits_of_fewer_classes_than_are_expected_are_told(tmp_path: Path) -> None:
    rows = {"input_ids": np.random.default_rng(0).integers(0, 9000, (3, 40))}
    model = gpt2(layers=1)
    model.resize_token_embeddings(9000)
    export(model, tmp_path / "p", data=from_arrays(rows))
    [graph] = Manifest.read(tmp_path / "p").graphs
    session = find_runtime("cpu").open(tmp_path / "p" / graph.path, "all")

    class Fewer:
        def run(self, names: Any, feeds: Any) -> dict[str, np.ndarray]:
            found = dict(session.run(names, feeds))
            return {**found, "logits": found["logits"][..., :8000]}

    [logits, *_] = parity_of(graph, Fewer(), read_reference(tmp_path / "p"), "all", EXACT)
    assert not logits.ok and "reference elements" in str(logits.reason)


def test_of_large_logits_whole_positions_are_kept() -> None:
    logits = np.arange(2 * 50 * 40_000, dtype="f").reshape(2, 50, 40_000)
    step, width = kept(logits.shape, 13, "logits", real=True)
    assert width == 40_000
    rows = stored_elements(logits, 13, "logits", real=True).reshape(-1, width)
    assert len(rows) >= 12 and step % 2
    assert np.array_equal(rows[1], logits.reshape(-1, width)[step])
    assert kept((100_000,), 1, "hidden") == (3, 1)
    assert kept((2, 0), 1, "hidden") == (1, 1)


@pytest.mark.parametrize(
    ("rows", "tokens", "read"), [(8, 300, 256), (48, 300, 256), (8, 90, 90), (128, 300, 128),
                                 (256, 300, 64), (999, 90, 64)],
)  # fmt: skip
def test_by_few_long_rows_int4_is_rounded_as_by_many_short_ones(
    rows: int, tokens: int, read: int
) -> None:
    """By 16,384 tokens, of rows of 256 at most."""
    ids = np.ones((rows, tokens), np.int64)
    examples = from_arrays({"input_ids": ids, "attention_mask": ids})
    found = [*rounding_rows(examples, length=rounding_length(examples))]
    assert {batch["input_ids"].shape[1] for batch in found} == {read}
    assert sum(len(batch["input_ids"]) for batch in found) == min(rows, 256)


def test_a_plan_rounds_by_all_tokens_of_few_rows() -> None:
    """Those that are compared have 64 of them."""
    sizes = {**bert(layers=1).config.to_dict(), "max_position_embeddings": 128}
    ids = np.random.default_rng(0).integers(3, 60, (12, 100))
    examples = from_arrays({"input_ids": ids, "attention_mask": np.ones_like(ids)})
    model = BertModel(BertConfig(**sizes)).eval()
    plan = make_plan(model, ExportConfig(dtype="int4"), None, examples)
    assert plan.rows["input_ids"].shape[1] == LENGTH
    assert {batch["input_ids"].shape[1] for batch in plan.calibration["model"]} == {100}


def test_where_few_rows_are_kept_they_are_the_longest_of_their_part() -> None:
    """Scores of a vocabulary of 262,144 leave room for one row of 64 tokens."""
    lengths = {0: 3, 1: 5, 2: 60, 3: 4, 4: 7, 5: 2, 6: 80, 7: 1}

    def take(rows: Any) -> dict[str, np.ndarray]:
        mask = np.arange(80) < np.array([[lengths[row]] for row in rows])
        return {"input_ids": np.where(mask, 5, 0), "attention_mask": mask.astype(int)}

    model = gpt2(layers=1)
    for size, tokens in ((2**18, [64]), (2**17, [60, 64])):
        model.config.vocab_size = size
        examples = Examples(range(8), take, lengths)
        rows = real_rows(examples, model, "text-generation-with-past")
        assert rows["attention_mask"].sum(1).tolist() == tokens
