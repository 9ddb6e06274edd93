"""The comparison of a merge with its rivals, which names the better."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drawn import Arrays, data_of, outputs_of
from shorter import BLOCKS, MODELS, D, F, same, shorter, state_of
from tiny import bert

from ffmerge.config import CompareConfig, MergeConfig
from ffmerge.models.examples import from_arrays
from ffmerge.models.find import find
from ffmerge.passes.weights.compare import Compared, compare
from ffmerge.passes.weights.compare import _verdict as _said
from ffmerge.passes.weights.evaluate import Score
from ffmerge.passes.weights.merge import merge_


def _labelled(model: Any, rows: int, seed: int) -> Arrays:
    """Return data on which the model itself is right in all cases."""
    data = data_of(model, rows, seed)
    return {**data, "labels": outputs_of(model, data).argmax(-1).numpy()}


def _wild(model: Any) -> Any:
    """Let the sublayers matter: their W_out is large."""
    for member in find(model):
        model.get_submodule(member.output).weight.data *= 8
    return model


def test_a_comparison_measures_what_it_says_and_leaves_the_model() -> None:
    model = _wild(MODELS["bert"]())
    data, held_out = _labelled(model, 40, 1), _labelled(model, 50, 2)
    before, objects = state_of(model), [id(p) for p in model.parameters()]
    kinds = [type(m) for m in model.modules()]
    k, bytes_each = 2, 4
    found = compare(model, from_arrays(data), from_arrays(held_out), CompareConfig(k=k))
    assert same(state_of(model), before) and [id(p) for p in model.parameters()] == objects
    assert [type(m) for m in model.modules()] == kinds
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert getattr(model.config, "ffmerge", None) is None
    rows = {row.name: row for row in found.rows}
    assert [row.name for row in found.rows] == [
        "original", "calibrated", "residual", "narrow", "permute", "copy-anchor", "drop-ffn",
        "drop-layer", "low-rank", "original, int8", "calibrated, int8", "original, int4",
        "calibrated, int4",
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
    # rounded: maps and tables of 1,024 elements or more, a scale for each row or each 32 elements
    maps = [(97, D), (64, D), *[(D, D)] * 17]
    for name, maps_in in (("original", 4), ("calibrated", 3)):
        shapes = [*maps, *[(F, D), (D, F)] * maps_in]
        rest = wanted[name] - sum(a * b for a, b in shapes)
        int8 = 4 * rest + sum(a * b + 4 * a for a, b in shapes)
        int4 = 4 * rest + sum(a * b // 2 + a * b // 8 for a, b in shapes)
        assert (rows[f"{name}, int8"].bytes, rows[f"{name}, int4"].bytes) == (int8, int4)

    # what was measured
    def accuracy(each: Any) -> float:
        got = outputs_of(each, held_out).argmax(-1).numpy()
        return float((got == held_out["labels"]).mean())

    assert rows["original"].value == 1
    best = [accuracy(shorter(model, BLOCKS["bert"], start, 1)) for start in range(4)]
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


def _verdict(model: Any, method: str, k: int = 2) -> tuple[str, dict[str, Compared]]:
    data, held_out = (from_arrays(data_of(model, 40, seed)) for seed in (1, 2))
    config = MergeConfig(k=k, method=method, criterion="fidelity")
    found = compare(model, data, held_out, config)
    return found.verdict, {row.name: row for row in found.rows}


def test_the_verdict_names_a_rival_that_loses_nothing() -> None:
    """A sublayer puts out a constant: to drop or narrow it is free, to average it is not."""
    model = _wild(bert(D, F, 3))
    dead = find(model)[2]
    model.get_submodule(dead.output).weight.data.zero_()
    verdict, rows = _verdict(model, "average")
    value = rows["average"].value
    said = f" is better and no larger: fidelity 1.0000 against {value:.4f} of average."
    assert verdict in ("narrow" + said, "drop-ffn" + said)  # which, is the last bit of a kernel's
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
    rows = [Compared(name, "", count, sign * x) for name, count, x in found]
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
