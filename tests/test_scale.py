"""Costs that are told against what is held, and work that is shared by parts and processes."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drawn import labelled
from safetensors.torch import load_file
from tiny import gpt2, vit
from tiny_wider import GATED

from ffmerge.config import MergeConfig
from ffmerge.models import codes
from ffmerge.models.examples import Examples, from_arrays
from ffmerge.models.find import find
from ffmerge.passes.weights import activations, cost
from ffmerge.passes.weights.evidence import pairs_of
from ffmerge.passes.weights.merge import merge_

LAYERS = 5
MODELS = {"vit": partial(vit, 32, 64, LAYERS), "llama": partial(GATED["llama"], LAYERS)}


def _pairs(model: Any) -> list[Any]:
    layers = find(model)
    return pairs_of([(layers[i : i + 3],) for i in range(3)])["layers"]


@pytest.mark.parametrize("name", MODELS)
def test_what_statistics_cost_is_what_they_hold(name: str) -> None:
    model = MODELS[name]()
    pairs = _pairs(model)
    found = activations.collect(model, {"layers": pairs}, [labelled(model)], 1000)["layers"]
    flops, size = cost.cost_of([*pairs, pairs[0]])
    held = [*found["features"].cross.values(), *found["inputs"].cross.values()]
    assert size == sum(tensor.nbytes for tensor in held)
    d, f, views = {"vit": (32, 64, 1), "llama": (32, 48, 3)}[name]
    assert flops == 2 * (6 * views * f * f + LAYERS * d * d)
    assert cost.cost_text([*pairs, pairs[0]], 1000).startswith("6 pairs, ")


@pytest.mark.parametrize("name", MODELS)
def test_windows_in_parts_are_the_windows_at_once(name: str, monkeypatch) -> None:
    """A part for each window: each has its own pass, that begins with its first layer."""
    found, passes = [], []
    collect = activations.collect

    def counted(model: Any, pairs: Any, *rest: Any) -> Any:
        passes.append({s.layer for pair in pairs["layers"] for s in pair})
        return collect(model, pairs, *rest)

    monkeypatch.setattr(activations, "collect", counted)
    for memory in (cost.PAIRS, 1):
        monkeypatch.setattr(cost, "PAIRS", memory)
        model = MODELS[name]()
        result = merge_(model, labelled(model), MergeConfig(k=3, batch_size=5))
        found.append((result.candidates, dict(model.named_parameters())))
    assert passes == [{0, 1, 2, 3, 4}, {0, 1, 2}, {1, 2, 3}, {2, 3, 4}]
    (at_once, whole), (in_parts, parts) = found
    assert at_once == in_parts
    assert all(torch.equal(p, parts[n]) for n, p in whole.items())


def test_rows_that_go_through_at_a_time_fit_the_memory(monkeypatch) -> None:
    model = gpt2(32, 64, 4)
    examples = from_arrays(labelled(model))
    chosen = {"layers": find(model)}
    width = 4 * 3 * 4 * (2 * 32 + 2 * 64)  # bytes, copies, layers, numbers: of one position
    for memory, rows in ((12 * 9 * width, 12), (12 * 9 * width - 1, 11), (1, 1)):
        monkeypatch.setattr(cost, "BATCH", memory)
        assert cost.rows_at_a_time(model, examples, 12, chosen) == rows


def test_of_rows_that_differ_the_longest_has_to_fit(monkeypatch) -> None:
    """One of nine tokens among those of four, which come first."""
    model = gpt2(32, 64, 4)
    lengths = {row: 9 if row == 7 else 4 for row in range(24)}

    def take(rows):
        return {"input_ids": np.ones((len(rows), max(lengths[row] for row in rows)), np.int64)}

    examples = Examples(range(24), take, lengths)
    assert next(examples.batches(4))["input_ids"].shape == (4, 4)
    monkeypatch.setattr(cost, "BATCH", 3 * 9 * 4 * 3 * 4 * (2 * 32 + 2 * 64))
    assert cost.rows_at_a_time(model, examples, 4, {"layers": find(model)}) == 3


def test_a_table_is_quantized_by_rows_as_at_once(monkeypatch) -> None:
    values = torch.randn(50, 37, generator=torch.Generator().manual_seed(0)).numpy()
    whole = codes.block_codes(values, codes.Form(4, 32))
    monkeypatch.setattr(codes, "AT_ONCE", 37 * 7)  # seven rows, one at the end
    parts = codes.block_codes(values, codes.Form(4, 32))
    assert [p.shape for p in parts] == [(50, 2, 32), (50, 2), (50, 2)]
    assert all(map(np.array_equal, parts, whole))


CASES = [("llama", 5, 60, (2, 2)), ("vit", 5, 999, (3, 2)), ("llama", 1, 999, (1, 0))]


def collected(name: str, count: int, tokens: int) -> dict[str, torch.Tensor]:
    """Return all moments over some batches of two rows, and how many of them were run."""
    model = MODELS[name]()
    pairs, ran = {"layers": _pairs(model)}, list[int]()
    model.register_forward_pre_hook(lambda *_: ran.append(1))
    data = labelled(model, 2 * count)
    batches = [{key: x[i : i + 2] for key, x in data.items()} for i in range(0, 2 * count, 2)]
    found = activations.collect(model, pairs, batches, tokens)["layers"]
    tensors = {
        f"{part} {what} {key}": tensor
        for part, moments in found.items()
        for what in ("mean", "squares", "cross")
        for key, tensor in getattr(moments, what).items()
    }
    return {**tensors, "counts": torch.tensor([found["features"].count, len(ran)])}


TWO = """
import os, sys
from safetensors.torch import save_file
from test_scale import CASES, collected

for number, (name, count, tokens, _) in enumerate(CASES):
    save_file(collected(name, count, tokens), f"{sys.argv[1]}/{number}-{os.environ['RANK']}")
"""


@pytest.mark.slow
def test_two_processes_have_the_moments_of_one(tmp_path) -> None:
    """18 positions in a batch of Llama's: the fourth is the last. One process may have none."""
    paths = f"{Path(__file__).parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    (tmp_path / "two.py").write_text(TWO)
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*run, str(tmp_path / "two.py"), str(tmp_path)],
        env=env, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    worst = 0.0
    for number, (*case, ran) in enumerate(CASES):
        one = collected(*case)
        count, passes = one.pop("counts").tolist()
        assert passes == sum(ran)
        for rank in (0, 1):
            each = load_file(tmp_path / f"{number}-{rank}")
            assert each.pop("counts").tolist() == [count, ran[rank]]
            assert each.keys() == one.keys()
            for key, value in one.items():
                worst = max(worst, float((value - each[key]).abs().max() / value.abs().max()))
    assert worst < 1e-6  # measured 1.5e-7
