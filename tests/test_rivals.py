"""Rivals of merging, each against one made by hand, and the comparison that names the better."""

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import bert, gpt2
from tiny_wider import GATED, SEQ2SEQ, seeded, t5
from torch import nn

import ffmerge
from ffmerge.config import CompareConfig, MergeConfig
from ffmerge.models.examples import from_arrays
from ffmerge.models.find import find
from ffmerge.models.sublayer import FeedForward, stacks
from ffmerge.passes.weights.compare import Row, compare
from ffmerge.passes.weights.compare import _verdict as _said
from ffmerge.passes.weights.evaluate import Score
from ffmerge.passes.weights.evidence import Evidence
from ffmerge.passes.weights.merge import merge_
from ffmerge.passes.weights.methods import METHODS, Merged, in_place, size_of

Arrays = dict[str, np.ndarray]
DROP = METHODS["drop-layer"]
D, F = 32, 64  # of BERT, GPT-2 and ViT here


def _swin() -> Any:
    return seeded(
        "SwinForImageClassification", "SwinConfig", image_size=32, patch_size=2, embed_dim=16,
        depths=[4, 3], num_heads=[2, 4], window_size=4, num_labels=3,
    )  # fmt: skip


# layers that return a tensor, and a tuple; Conv1D; gate and up apart, and fused; no biases
MODELS: dict[str, Callable[[], Any]] = {
    "bert": lambda: bert(D, F, 4),
    "gpt2": lambda: gpt2(D, F, 4),
    "llama": lambda: GATED["llama"](4),
    "phi3": lambda: GATED["phi3"](4),
    "t5": lambda: t5(4, 3, feed_forward_proj="gated-gelu"),
    "marian": lambda: SEQ2SEQ["marian"](3, 4),
    "swin": _swin,
}
# where the layers of each stack are
BLOCKS = {
    "bert": ["bert.encoder.layer"], "gpt2": ["transformer.h"], "llama": ["model.layers"],
    "t5": ["encoder.block", "decoder.block"],
    "marian": ["model.encoder.layers", "model.decoder.layers"],
    "swin": ["swin.encoder.layers.0.blocks"],
}  # fmt: skip


def _data(model: Any, rows: int = 24, seed: int = 1) -> Arrays:
    generator = np.random.default_rng(seed)
    if model.main_input_name == "pixel_values":
        size = model.config.image_size
        return {"pixel_values": generator.standard_normal((rows, 3, size, size)).astype("f")}
    ids = {"input_ids": generator.integers(3, 61, (rows, 9))}
    if model.config.is_encoder_decoder:
        ids["decoder_input_ids"] = generator.integers(3, 61, (rows, 7))
    return ids


def _outputs(model: Any, data: Arrays) -> torch.Tensor:
    options = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    with torch.no_grad():
        return model(**{k: torch.from_numpy(x) for k, x in data.items()}, **options).logits.double()


def _by_stack(model: Any, name: str = "") -> dict[str, tuple[FeedForward, ...]]:
    found = stacks(find(model))
    return {"0": found["0"]} if name == "swin" else found


def _state(model: Any) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict(keep_vars=False).items()}


def _same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


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


# drop-layer


def _shorter(model: Any, lists: list[str], start: int, length: int) -> Any:
    """Return a copy of the model that has no layers ``start`` to ``start + length - 1``."""
    other = copy.deepcopy(model)
    for path in lists:
        blocks = other.get_submodule(path)
        left = [b for i, b in enumerate(blocks) if not start <= i < start + length]
        if start == 0 and "block" in lists[0].split("."):  # T5: the first makes the positions' bias
            a, b = blocks[0].layer[0].SelfAttention, left[0].layer[0].SelfAttention
            b.relative_attention_bias, b.has_relative_attention_bias = a.relative_attention_bias, 1
        owner, _, attribute = path.rpartition(".")
        setattr(other.get_submodule(owner), attribute, nn.ModuleList(left))
    return other


@pytest.mark.parametrize("name", BLOCKS)
def test_dropped_layers_are_as_if_the_model_had_none(name: str) -> None:
    """Every window, in the encoder and in the decoder; and the model is whole again after it."""
    model, lists = MODELS[name](), BLOCKS[name]
    data, before = _data(model, 3), _state(model)
    whole = _outputs(model, data)
    layers = min(len(model.get_submodule(path)) for path in lists)
    stacks_of = _by_stack(model, name)
    for length in (1, 2):
        for start in range(layers - length + 1):
            window = slice(start, start + length)
            changes: Merged = {
                members[window]: DROP.merge(model, members[window], Evidence())
                for members in stacks_of.values()
            }
            wanted = _shorter(model, lists, start, length)
            with in_place(model, changes):
                got = _outputs(model, data)
            assert (got - _outputs(wanted, data)).abs().max() == 0
            assert (got - whole).abs().max() > 1e-3  # measured 7.4e-3 (swin) to 4.7
            if name != "t5":  # there the copy has a bias twice
                assert size_of(model, changes)[0] == sum(p.numel() for p in wanted.parameters())
    assert (_outputs(model, data) - whole).abs().max() == 0
    assert _same(_state(model), before)


def test_layers_that_return_a_tensor_and_a_tuple_are_both_here() -> None:
    kinds = set()
    for name in ("bert", "t5"):
        model = MODELS[name]()
        block = model.get_submodule(BLOCKS[name][0])[0]
        block.register_forward_hook(lambda m, a, out: kinds.add(isinstance(out, tuple)))
        _outputs(model, _data(model, 1))
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


# low-rank


def _matrix(module: Any) -> np.ndarray:
    weight = module.weight.detach().double().numpy()
    return weight.T if type(module).__name__.endswith("Conv1D") else weight


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "phi3", "t5", "marian"])
def test_factored_maps_are_svds_of_the_whitened_and_keep_the_means(name: str) -> None:
    model = MODELS[name]()
    data, before = _data(model, 40), _state(model)
    by_stack = _by_stack(model)
    paths = [path for found in by_stack.values() for m in found for path in m.maps]
    with _kept(model, paths) as seen:
        _outputs(model, data)
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
        factored = _outputs(model, data)
    left += sum(len(own[path]) for path in bare)  # a bias where there was none
    assert removed == size - left
    assert asked <= removed < asked + sum(sum(w.shape) for w in own.values())
    whole = _outputs(model, data)
    assert (factored - whole).abs().max() > 1e-3  # measured 7.5e-3 to 3.5
    assert _same(_state(model), before)


@pytest.mark.parametrize("name", ["gpt2", "phi3", "t5"])
def test_maps_of_full_rank_change_nothing(name: str) -> None:
    """A product as large as its matrix has less than full rank: this one is asked to be larger."""
    model = MODELS[name]()
    data, by_stack = _data(model, 40), _by_stack(model)
    changes = _factored(model, by_stack, 1 - len(next(iter(by_stack.values()))), data)
    whole = _outputs(model, data)
    with in_place(model, changes):
        assert (_outputs(model, data) - whole).abs().max() < 1e-6  # measured 0


def _factored(model: Any, by_stack: dict[str, Any], k: int, data: Arrays) -> Merged:
    batches = [{name: x[i : i + 15] for name, x in data.items()} for i in (0, 15, 30)]
    evidence = Evidence(batches=lambda: batches, tokens=10_000, k=k)
    low_rank = METHODS["low-rank"]
    assert low_rank.choices is not None
    (choice,) = low_rank.choices(model, by_stack, k)
    assert choice == tuple(by_stack.values())
    return {members: low_rank.merge(model, members, evidence) for members in choice}


# drop-ffn and copy-anchor


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "phi3"])
def test_dropped_sublayers_put_out_their_mean(name: str, tmp_path: Path) -> None:
    kept = 0
    model = MODELS[name]()
    data, other = _data(model), _data(model, 5, seed=2)
    paths = [m.output for m in find(model)[:3]]
    with _kept(model, paths) as before:
        _outputs(model, data)
    own = [{k: v.clone() for k, v in _parts(model, m).items()} for m in find(model)]
    config = MergeConfig(window=(0, 2), method="drop-ffn")
    merge_(model, data, config, {k: x[:1] for k, x in data.items()})
    ffmerge.save(model, tmp_path / "saved")
    for each in (model, ffmerge.load(tmp_path / "saved")):
        with _kept(each, paths) as after:
            _outputs(each, other)
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
    assert (_outputs(each, other) - _outputs(model, other)).abs().max() == 0


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


# compare


def _labelled(model: Any, rows: int, seed: int) -> Arrays:
    """Return data on which the model itself is right in all cases."""
    data = _data(model, rows, seed)
    return {**data, "labels": _outputs(model, data).argmax(-1).numpy()}


def _wild(model: Any) -> Any:
    """Let the sublayers matter: their W_out is large."""
    for member in find(model):
        model.get_submodule(member.output).weight.data *= 8
    return model


def test_a_comparison_measures_what_it_says_and_leaves_the_model() -> None:
    model = _wild(MODELS["bert"]())
    data, held_out = _labelled(model, 40, 1), _labelled(model, 50, 2)
    before, objects = _state(model), [id(p) for p in model.parameters()]
    kinds = [type(m) for m in model.modules()]
    k, bytes_each = 2, 4
    found = compare(model, from_arrays(data), from_arrays(held_out), CompareConfig(k=k))
    assert _same(_state(model), before) and [id(p) for p in model.parameters()] == objects
    assert [type(m) for m in model.modules()] == kinds
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert getattr(model.config, "ffmerge", None) is None
    rows = {row.name: row for row in found.rows}
    assert [row.name for row in found.rows] == [
        "original", "calibrated", "residual", "permute", "copy-anchor", "drop-ffn", "drop-layer",
        "low-rank", "original, int8", "calibrated, int8", "original, int4", "calibrated, int4",
    ]  # fmt: skip
    assert (found.metric, found.examples) == ("accuracy", 50)

    # bytes by hand
    size = 97 * D + 64 * D + 2 * D + 2 * D  # tables and their norm
    layer = 4 * (D * D + D) + 2 * D * F + F + D + 4 * D
    size += 4 * layer + D * D + D + 3 * D + 3
    ffn, weights = 2 * D * F + F + D, 2 * D * F
    calibrated = size - k * ffn + weights + k * (F + F + D)  # scale and biases
    whole, keep = 4 * weights, 1 - ffn / (4 * weights)
    rank = int(keep * D * F / (D + F))
    thin = size - whole + 4 * 2 * rank * (D + F)
    wanted = {
        "original": size, "calibrated": calibrated, "residual": calibrated + k * 2 * (D + F),
        "permute": size - ffn, "copy-anchor": size - ffn,
        "drop-ffn": size - ffn - D - F + k * (2 * D + F), "drop-layer": size - layer,
        "low-rank": thin,
    }  # fmt: skip
    assert {name: rows[name].bytes for name in wanted} == {
        name: bytes_each * count for name, count in wanted.items()
    }
    # rounded: maps and tables of 1,024 elements or more, a scale for each 64 or 32 elements
    maps = [(97, D), (64, D), *[(D, D)] * 17]
    for name, maps_in in (("original", 4), ("calibrated", 3)):
        shapes = [*maps, *[(F, D)] * 2 * maps_in]
        rest = wanted[name] - sum(a * b for a, b in shapes)
        int8 = 4 * rest + sum(a * b + a * b // 64 * 4 for a, b in shapes)
        int4 = 4 * rest + sum(a * b // 2 + a * b // 8 for a, b in shapes)
        assert (rows[f"{name}, int8"].bytes, rows[f"{name}, int4"].bytes) == (int8, int4)

    # what was measured
    def accuracy(each: Any) -> float:
        got = _outputs(each, held_out).argmax(-1).numpy()
        return float((got == held_out["labels"]).mean())

    assert rows["original"].value == 1
    best = [accuracy(_shorter(model, BLOCKS["bert"], start, 1)) for start in range(4)]
    assert rows["drop-layer"].value == max(best) > min(best)
    assert rows["drop-layer"].what == f"{np.argmax(best)}-{np.argmax(best)}"
    for name in ("calibrated", "drop-ffn"):
        tried = []
        for start in range(3):
            each = _wild(MODELS["bert"]())
            merge_(each, data, MergeConfig(window=(start, start + 1), method=name), held_out)
            tried.append(accuracy(each))
        assert rows[name].value == max(tried)
        assert rows[name].what == f"{np.argmax(tried)}-{np.argmax(tried) + 1}"
    assert found.to_json()["rows"][0] == vars(rows["original"])


def _verdict(model: Any, method: str, k: int = 2) -> tuple[str, dict[str, Row]]:
    data, held_out = (from_arrays(_data(model, 40, seed)) for seed in (1, 2))
    config = MergeConfig(k=k, method=method, criterion="fidelity")
    found = compare(model, data, held_out, config)
    return found.verdict, {row.name: row for row in found.rows}


def test_the_verdict_names_a_rival_that_loses_nothing() -> None:
    """A layer's sublayer puts out a constant: to drop it is free, to average it is not."""
    model = _wild(bert(D, F, 3))
    dead = find(model)[2]
    model.get_submodule(dead.output).weight.data.zero_()
    verdict, rows = _verdict(model, "average")
    value = rows["average"].value
    assert verdict == (
        f"drop-ffn is better and no larger: fidelity 1.0000 against {value:.4f} of average."
    )
    assert value < 0.99  # measured 0.9856
    assert rows["drop-ffn"].what == "1-2"


def test_the_verdict_says_when_the_method_is_the_best() -> None:
    """Two layers hold the same sublayer, its neurons in another order: nothing beats permuting."""
    model = _wild(bert(D, F, 3))
    order = torch.randperm(F, generator=torch.Generator().manual_seed(3))
    for a, b in zip(find(model)[1].weights, find(model)[2].weights, strict=True):
        value = model.get_parameter(a.name).detach().clone()
        model.get_parameter(b.name).data = a.reordered(value, order)
    verdict, rows = _verdict(model, "permute")
    assert verdict == "permute is the best of this size."
    assert rows["permute"].what == "1-2"
    assert rows["drop-ffn"].value < 0.995 < 0.99999 < rows["permute"].value  # 0.9903, 1.0


@pytest.mark.parametrize(
    ("size", "value", "better"),
    [
        (100, 0.81, True),
        (100, 0.80004, False),
        (101, 0.81, True),
        (102, 0.81, False),
        (9, 0.7, False),
    ],
)
@pytest.mark.parametrize("higher", [True, False])
def test_only_what_shows_and_is_no_larger_is_better(
    size: int, value: float, better: bool, higher: bool
) -> None:
    sign = 1 if higher else -1
    found = [("original", 200, 1.0), ("permute", 100, 0.8), ("low-rank", size, value)]
    rows = [Row(name, "", count, sign * x) for name, count, x in found]
    said = _said(rows, Score("accuracy", lambda model: 0.0, higher))
    assert said.startswith("low-rank is better" if better else "permute is the best")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    model = bert(D, F, 3)
    model.save_pretrained(tmp_path / "bert")
    np.savez(tmp_path / "data.npz", **_labelled(model, 20, 1))
    return tmp_path / "bert"


def test_the_command_prints_the_comparison(checkpoint, command) -> None:
    arguments = ("compare", checkpoint, "--k", 2, "--data", checkpoint.parent / "data.npz")
    code, out, _ = command(*arguments, "--method", "permute", "--json")
    found = json.loads(out)
    assert code == 0 and set(found) == {"metric", "examples", "rows", "verdict"}
    assert all(set(row) == {"name", "what", "bytes", "value"} for row in found["rows"])
    assert [row["name"] for row in found["rows"][:2]] == ["original", "permute"]
    assert (found["metric"], found["examples"]) == ("accuracy", 10)  # half of the rows
    code, out, _ = command(*arguments, "--method", "permute")
    assert code == 0 and found["verdict"] in " ".join(out.split())
    assert sorted(path.name for path in checkpoint.parent.iterdir()) == ["bert", "data.npz"]


@pytest.mark.parametrize("k", [1, 4])
def test_a_k_that_does_not_fit_ends_with_one_sentence(k, checkpoint, command) -> None:
    arguments = ("compare", checkpoint, "--k", k, "--data", checkpoint.parent / "data.npz")
    code, out, err = command(*arguments, "--json")
    assert (code, out, len(err.strip().splitlines())) == (2, "", 1)
    assert err.startswith("ffmerge: ") and f"k = {k} does not fit" in err
