"""What a search does not run again: against candidates that are run from the input."""

from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_merge import _data, _pairs_of_texts
from tiny import bert, gpt2, vit
from tiny_wider import GATED, SEQ2SEQ, t5

from ffmerge.models.examples import from_arrays
from ffmerge.models.find import find
from ffmerge.models.inputs import forward
from ffmerge.passes.weights import resume
from ffmerge.passes.weights.merge import MergeConfig, merge_
from ffmerge.passes.weights.resume import Resumed

MODELS = {
    "vit": partial(vit, 32, 64, 4),
    "gpt2": partial(gpt2, 32, 64, 4),
    "llama": partial(GATED["llama"], 4),
    "marian": partial(SEQ2SEQ["marian"], 4, 3),
    "t5": partial(t5, 2, 3),
}


def _batches(model: Any) -> dict[str, np.ndarray]:
    return _pairs_of_texts() if model.config.is_encoder_decoder else _data(model)


def _task(model: Any) -> str | None:
    return "text2text-generation" if model.config.is_encoder_decoder else None


def _whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Resumed, "behind", lambda self, members: nullcontext())


def _merged(name: str, **config: Any) -> tuple[Any, Any]:
    model = MODELS[name]()
    task = _task(model)
    result = merge_(model, _batches(model), MergeConfig(batch_size=5, task=task, **config))
    return result, dict(model.named_parameters())


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """With several, the last bit of one and the same product depends on where its inputs lie."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("memory", [resume.MEMORY, 0])
@pytest.mark.parametrize("name", MODELS)
def test_candidates_are_what_they_are_when_run_from_the_input(
    name: str, memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows and steps, outputs kept in memory and in files: bit for bit the same."""
    monkeypatch.setattr(Resumed.__init__, "__defaults__", (memory,))
    for config in ({"k": 2}, {"budget": "-15%", "adjacent": False}):
        found, weights = _merged(name, **config)
        with pytest.MonkeyPatch.context() as context:
            _whole(context)
            wanted, whole = _merged(name, **config)
        assert len(found.candidates) > 2
        assert found.candidates == wanted.candidates
        assert found.record == wanted.record
        assert all(torch.equal(p, whole[n]) for n, p in weights.items())


def _counted(model: Any) -> dict[int, int]:
    """Return how often the first map of each layer is run, filled in by hooks."""
    counts = dict.fromkeys(range(len(find(model))), 0)
    for sublayer in find(model):

        def count(*_: Any, layer: int = sublayer.layer) -> None:
            counts[layer] += 1

        model.get_submodule(sublayer.inputs[0]).register_forward_hook(count)
    return counts


def test_a_layer_runs_as_often_as_it_must() -> None:
    """Five layers, windows of two at 0 to 3: the windows before it, and one that goes on."""
    model = vit(32, 64, 5)
    resumed = Resumed(model, find(model))
    layers = find(model)
    counts, batch = _counted(model), _data(model, 2)
    for first in range(4):
        with resumed.behind(layers[first : first + 2]), torch.no_grad():
            forward(model, batch)
            forward(model, batch)
    # a first run goes on from the window before, a second one begins at its own first layer
    assert counts == {0: 3, 1: 5, 2: 7, 3: 8, 4: 8}
    assert resumed.skipped == 8 * 5 - sum(counts.values())


@pytest.mark.parametrize("name", ["gpt2", "marian"])
def test_statistics_and_the_fit_end_with_the_last_layer_they_look_at(name: str) -> None:
    model = MODELS[name]()
    chosen = [s for s in find(model) if s.stack != "decoder"]
    assert chosen[-1].layer > 2
    counts, head = [], []
    model.get_submodule(chosen[2].inputs[0]).register_forward_hook(lambda *_: counts.append(1))
    model.get_output_embeddings().register_forward_hook(lambda *_: head.append(1))
    data = from_arrays(_batches(model))
    stacks = ("encoder",) if name == "marian" else ()
    config = MergeConfig(window=(0, 1), stacks=stacks, task=_task(model))
    counts.clear()
    head.clear()
    merge_(model, data, config, data)
    # found, proved, 4 passes for the order of blocks (one without this layer), measured twice; its
    # copy is proved by 3 runs more
    assert (len(head), len(counts)) == (8, 10)


def _with_a_skip(model: Any) -> Any:
    first, last = model.vit.layers[0], model.vit.layers[-1]
    kept: list[torch.Tensor] = []
    first.register_forward_hook(lambda m, a, out: kept.append(out))
    last.register_forward_hook(lambda m, a, out: out + kept.pop())
    return model


def _with_a_note(model: Any) -> Any:
    """Every block leaves something for the next that is not in its output."""
    kept: list[torch.Tensor] = []
    for block in model.vit.layers:
        inner = block.forward

        def run(x: Any, *args: Any, inner: Any = inner, **more: Any) -> Any:
            kept.append(x.mean(1, keepdim=True))
            return inner(x, *args, **more) + kept[-min(len(kept), 2)]

        block.forward = run
    model.register_forward_hook(lambda *_: kept.clear())
    return model


@pytest.mark.parametrize(("spoil", "why"), [(_with_a_skip, "reads"), (_with_a_note, "reads")])
def test_a_model_that_reads_more_of_a_block_is_run_whole(spoil, why) -> None:
    model = spoil(vit(32, 64, 5))
    layers = find(model)
    resumed = Resumed(model, layers)
    assert why in resumed.reason
    counts, batch = _counted(model), _data(model, 2)
    for sublayer in layers:
        counts[sublayer.layer] = 0
    with resumed.behind(layers[3:]), torch.no_grad():
        forward(model, batch)
        forward(model, batch)
    assert set(counts.values()) == {2}


def test_a_block_that_runs_several_times_is_told() -> None:
    from transformers import AlbertConfig, AlbertForSequenceClassification

    config = AlbertConfig(
        vocab_size=97, embedding_size=16, hidden_size=32, intermediate_size=64,
        num_attention_heads=4, num_hidden_layers=4, num_hidden_groups=2,
    )  # fmt: skip
    model = AlbertForSequenceClassification(config).eval()
    assert "several times" in Resumed(model, find(model)).reason


def test_what_was_kept_of_other_weights_is_not_used() -> None:
    """Changed in place, or by another tensor; what comes after the change may be anything."""
    model, batch = vit(32, 64, 5), _data(vit(32, 64, 5), 2)
    layers = find(model)
    resumed = Resumed(model, layers)

    def outputs() -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            with resumed.behind(layers[3:]):
                got = forward(model, batch).logits
            return got, forward(model, batch).logits

    outputs()
    weight = model.get_parameter(layers[1].weights[0].name)
    for change in (
        lambda: weight.data.__setitem__(0, 2.0) or weight.detach().mul_(1.5),
        lambda: setattr(weight, "data", weight.data * 2),
        lambda: setattr(model.vit.embeddings.cls_token, "data", torch.ones(1, 1, 32)),
    ):
        change()
        assert torch.equal(*outputs())
    assert resumed.skipped == 0
    last = model.get_parameter(layers[4].weights[0].name)
    last.data = last.data * 2
    assert torch.equal(*outputs())
    assert resumed.skipped == 3
    with torch.no_grad(), resumed.behind(layers[1:]):  # what was kept is of a later layer
        weight.data = weight.data * 2
        got = forward(model, batch).logits
    assert torch.equal(got, forward(model, batch).logits)


def test_files_go_as_they_are_replaced_and_with_the_search(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(resume.tempfile, "tempdir", str(tmp_path))
    model = vit(32, 64, 5)
    layers = find(model)
    resumed = Resumed(model, layers, memory=0)
    with torch.no_grad():
        for first in range(1, 5):
            with resumed.behind(layers[first:]):
                for rows in (2, 3):
                    forward(model, _data(model, rows))
                assert len([p for p in tmp_path.rglob("*") if p.is_file()]) == 2
        assert resumed.skipped
    del resumed
    assert not [*tmp_path.rglob("*")]


def test_inputs_change_nothing_but_themselves() -> None:
    """Rows of equal shape, padding and its absence: every batch has what is its own."""
    model = bert(32, 64, 4)
    layers = find(model)
    resumed = Resumed(model, layers)
    ids = _data(model, 4)["input_ids"]
    mask = np.ones_like(ids)
    mask[:, 5:] = 0
    batches: list[dict[str, Any]] = [
        {"input_ids": ids[:2]}, {"input_ids": ids[2:]},
        {"input_ids": ids[:2], "attention_mask": mask[:2]},
    ]  # fmt: skip
    with torch.no_grad():
        wanted = [forward(model, batch).logits for batch in batches]
        for _ in range(2):
            with resumed.behind(layers[2:]):
                got = [forward(model, batch).logits for batch in batches]
            assert all(map(torch.equal, got, wanted))
    assert resumed.skipped == 2 * len(batches)
