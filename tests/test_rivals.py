"""Rivals of merging, each against one made by hand, and the comparison that names the better."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import CASES, index_of, model_of
from drawn import Arrays, data_of, outputs_of
from shorter import BLOCKS, MODELS, same, shorter, state_of

import ffmerge
from ffmerge.config import MergeConfig
from ffmerge.models.find import find
from ffmerge.models.inputs import example_inputs
from ffmerge.models.sublayer import FeedForward, stacks
from ffmerge.passes.weights.evidence import Evidence
from ffmerge.passes.weights.merge import merge_
from ffmerge.passes.weights.methods import METHODS, Merged, in_place, size_of
from ffmerge.passes.weights.rivals import _without

DROP = METHODS["drop-layer"]


def _by_stack(model: Any, name: str = "") -> dict[str, tuple[FeedForward, ...]]:
    found = stacks(find(model))
    return {"0": found["0"]} if name == "swin" else found


@contextmanager
def _kept(model: Any, paths: list[str]) -> Iterator[dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Keep what modules take and give: (positions, width) in float64."""
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def keep(path: str, args: Any, out: torch.Tensor) -> None:
        pair = (x.detach().double().reshape(-1, x.shape[-1]).numpy() for x in (args[0], out))
        found[path] = tuple(pair)

    handles = [
        model.get_submodule(p).register_forward_hook(lambda m, a, out, p=p: keep(p, a, out))
        for p in paths
    ]
    yield found
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("name", BLOCKS)
def test_dropped_layers_are_as_if_the_model_had_none(name: str) -> None:
    """Every window, in the encoder and in the decoder; and the model is whole again after it."""
    model, lists = MODELS[name](), BLOCKS[name]
    data, before = data_of(model, 3), state_of(model)
    whole = outputs_of(model, data)
    layers = min(len(model.get_submodule(path)) for path in lists)
    stacks_of = _by_stack(model, name)
    for length in (1, 2):
        for start in range(layers - length + 1):
            window = slice(start, start + length)
            changes: Merged = {
                members[window]: DROP.merge(model, members[window], Evidence())
                for members in stacks_of.values()
            }
            wanted = shorter(model, lists, start, length)
            with in_place(model, changes):
                got = outputs_of(model, data)
            assert (got - outputs_of(wanted, data)).abs().max() == 0
            assert (got - whole).abs().max() > 1e-3  # measured 7.4e-3 (swin) to 4.7
            if name != "t5":  # there the copy has a bias twice
                assert size_of(model, changes)[0] == sum(p.numel() for p in wanted.parameters())
    assert (outputs_of(model, data) - whole).abs().max() == 0
    assert same(state_of(model), before)


def test_layers_that_return_a_tensor_and_a_tuple_are_both_here() -> None:
    kinds = set()
    for name in ("bert", "t5"):
        model = MODELS[name]()
        block = model.get_submodule(BLOCKS[name][0])[0]
        block.register_forward_hook(lambda m, a, out: kinds.add(isinstance(out, tuple)))
        outputs_of(model, data_of(model, 1))
    assert kinds == {True, False}


@pytest.mark.parametrize("name", BLOCKS)
def test_no_fewer_layers_are_dropped_than_are_as_large_as_what_a_merge_removes(name: str) -> None:
    model = MODELS[name]()
    by_stack = _by_stack(model, name)
    lists = [model.get_submodule(path) for path in BLOCKS[name]]
    smallest = sum(min(sum(p.numel() for p in b.parameters()) for b in blocks) for blocks in lists)
    assert DROP.choices is not None
    for k in (2, 3):
        removed = (k - 1) * sum(_size(model, members[0]) for members in by_stack.values())
        choices = DROP.choices(model, by_stack, k)
        length = len(choices[0][0])
        assert (length - 1) * smallest < removed <= length * smallest
        first = [choice[0][0].layer for choice in choices]
        assert first == list(range(min(map(len, lists)) - length + 1))
        for choice in choices:  # the same in every stack
            assert len({tuple(m.layer for m in members) for members in choice}) == 1


def _size(model: Any, member: FeedForward) -> int:
    return sum(model.get_parameter(weight.name).numel() for weight in member.weights)


def _matrix(module: Any) -> np.ndarray:
    weight = module.weight.detach().double().numpy()
    return weight.T if type(module).__name__.endswith("Conv1D") else weight


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "phi3", "t5", "marian"])
def test_factored_maps_are_svds_of_the_whitened_and_keep_the_means(name: str) -> None:
    model = MODELS[name]()
    data, before = data_of(model, 40), state_of(model)
    by_stack = _by_stack(model)
    paths = [path for found in by_stack.values() for m in found for path in m.maps]
    with _kept(model, paths) as seen:
        outputs_of(model, data)
    own = {path: _matrix(model.get_submodule(path)) for path in paths}
    bare = [path for path in paths if model.get_submodule(path).bias is None]
    size = sum(w.size for w in own.values())
    asked = sum(_size(model, members[0]) for members in by_stack.values())  # k = 2
    changes = _factored(model, by_stack, 2, data)
    removed = size_of(model)[0] - size_of(model, changes)[0]
    left = 0
    with in_place(model, changes):
        for path, w in own.items():
            module = model.get_submodule(path)
            thin, (x, y) = _matrix(module), seen[path]
            values, vectors = np.linalg.eigh(np.cov(x.T, bias=True))
            root = vectors * np.sqrt(values.clip(0)) @ vectors.T
            u, s, v = np.linalg.svd(w @ root, full_matrices=False)
            rank = int(np.linalg.matrix_rank(thin, tol=1e-4))
            left += rank * sum(w.shape)
            want = u[:, :rank] * s[:rank] @ v[:rank]
            error = np.linalg.norm(thin @ root - want) / np.linalg.norm(want)
            assert error < 5e-5, path  # measured 1.1e-5: the code damps
            put_out = x @ thin.T + module.bias.detach().double().numpy()
            assert np.abs(put_out.mean(0) - y.mean(0)).max() < 5e-7, path  # measured 7.1e-8
        factored = outputs_of(model, data)
    left += sum(len(own[path]) for path in bare)  # a bias where there was none
    assert removed == size - left
    assert asked <= removed < asked + sum(sum(w.shape) for w in own.values())
    whole = outputs_of(model, data)
    assert (factored - whole).abs().max() > 1e-3  # measured 7.5e-3 to 3.5
    assert same(state_of(model), before)


@pytest.mark.parametrize("name", ["gpt2", "phi3", "t5"])
def test_maps_of_full_rank_change_nothing(name: str) -> None:
    """A product as large as its matrix has less than full rank: this one is asked to be larger."""
    model = MODELS[name]()
    data, by_stack = data_of(model, 40), _by_stack(model)
    changes = _factored(model, by_stack, 1 - len(next(iter(by_stack.values()))), data)
    whole = outputs_of(model, data)
    with in_place(model, changes):
        assert (outputs_of(model, data) - whole).abs().max() < 1e-6  # measured 0


def _factored(model: Any, by_stack: dict[str, Any], k: int, data: Arrays) -> Merged:
    batches = [{name: x[i : i + 15] for name, x in data.items()} for i in (0, 15, 30)]
    evidence = Evidence(batches=lambda: batches, tokens=10_000, k=k)
    low_rank = METHODS["low-rank"]
    assert low_rank.choices is not None
    (choice,) = low_rank.choices(model, by_stack, k)
    assert choice == tuple(by_stack.values())
    return {members: low_rank.merge(model, members, evidence) for members in choice}


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "phi3"])
def test_dropped_sublayers_put_out_their_mean(name: str, tmp_path: Path) -> None:
    kept = 0
    model = MODELS[name]()
    data, other = data_of(model), data_of(model, 5, seed=2)
    paths = [m.output for m in find(model)[:3]]
    with _kept(model, paths) as before:
        outputs_of(model, data)
    own = [{k: v.clone() for k, v in _parts(model, m).items()} for m in find(model)]
    config = MergeConfig(window=(0, 2), method="drop-ffn")
    merge_(model, data, config, {k: x[:1] for k, x in data.items()})
    ffmerge.save(model, tmp_path / "saved")
    for each in (model, ffmerge.load(tmp_path / "saved")):
        with _kept(each, paths) as after:
            outputs_of(each, other)
        for layer, path in enumerate(paths):
            out = after[path][1]
            if layer != kept:
                assert np.abs(out - before[path][1].mean(0)).max() < 5e-8  # measured 7.7e-9
        parts = _parts(each, find(each)[kept])
        assert all(torch.equal(parts[key], value) for key, value in own[kept].items())
        module = each.get_submodule(paths[kept])
        assert bool((module.scale == 1).all())
        x = torch.from_numpy(after[paths[kept]][0]).float()
        plain = MODELS[name]().get_submodule(paths[kept])
        with torch.no_grad():
            assert (module(x) - plain(x)).abs().max() < 1e-6  # measured 0
        parts = _parts(each, find(each)[3])  # not in the window
        assert all(torch.equal(parts[key], value) for key, value in own[3].items())
    assert (outputs_of(each, other) - outputs_of(model, other)).abs().max() == 0


def _parts(model: Any, member: FeedForward) -> dict[tuple[int, str], torch.Tensor]:
    return {
        (number, part): parameter.detach()
        for number, path in enumerate(member.maps)
        for part, parameter in model.get_submodule(path).named_parameters()
    }


@pytest.mark.parametrize("name", ["bert", "gpt2", "phi3"])
def test_copies_of_the_anchor_are_the_anchor(name: str) -> None:
    model = MODELS[name]()
    want = _parts(model, find(model)[1])
    merge_(model, None, MergeConfig(window=(1, 3), method="copy-anchor"))
    for layer in (1, 2, 3):
        got = _parts(model, find(model)[layer])
        assert got.keys() == want.keys()
        assert all(torch.equal(got[key], want[key]) for key in want)


def test_a_layer_is_left_out_whatever_its_input_is_called() -> None:
    """PatchTST gives its layers ``hidden_state``: the second one reads what the first one would."""
    model = model_of(*CASES[index_of("PatchTSTForPrediction")][:3])
    read: dict[int, torch.Tensor] = {}
    layers = model.model.encoder.layers
    for number, layer in enumerate(layers):
        layer.register_forward_pre_hook(
            lambda _, args, kwargs, number=number: read.update({number: kwargs["hidden_state"]}),
            with_kwargs=True,
        )
    inputs = example_inputs(model)
    with torch.no_grad(), _without(model, ["model.encoder.layers.0"]):
        model(**inputs)
    assert torch.equal(read[0], read[1])
