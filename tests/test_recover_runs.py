"""A recovery that is killed, or run by several processes, ends as one that is neither."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recovering import MODELS, Arrays, difference, merged_pair, recover, rows_of, values_of
from tiny import gpt2

from ffmerge.config import CheckpointConfig, DataConfig, MergeConfig, RecoverConfig
from ffmerge.errors import InputError
from ffmerge.models import checkpoint
from ffmerge.models.examples import from_arrays
from ffmerge.passes.weights.recover import recover_

KILLED = """
import os, signal, sys
from pathlib import Path
from recovering import MODELS, merged_pair, rows_of
from ffmerge.models.examples import from_arrays
from ffmerge.config import RecoverConfig
from ffmerge.passes.weights.recover import recover_

def progress(step, done, total):
    if done == 5:
        os.kill(os.getpid(), signal.SIGKILL)

model, original = merged_pair(MODELS["gpt2"])
config = RecoverConfig(steps=8, batch_size=20, save_every=2, parts="all")
recover_(model, original, from_arrays(rows_of(model)), config, progress, Path(sys.argv[1]))
"""


def _python(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    paths = f"{Path(__file__).parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, *arguments], env=env, capture_output=True, text=True, timeout=300
    )


def test_a_killed_run_goes_on_and_ends_as_if_nothing_had_happened(tmp_path) -> None:
    """48 rows in batches of 20: the killed run stops within its second pass over the data."""
    settings = {"steps": 8, "batch_size": 20, "save_every": 2, "parts": "all"}
    killed = _python(["-c", KILLED, str(tmp_path / "state")])
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["recover.safetensors"]
    whole, original = merged_pair(MODELS["gpt2"])
    expected = recover(whole, original, rows_of(whole), **settings)
    model, original = merged_pair(MODELS["gpt2"])
    done: list[int] = []
    result = recover_(
        model, original, from_arrays(rows_of(model)), RecoverConfig(**settings),
        lambda step, at, total: done.append(at), tmp_path / "state",
    )  # fmt: skip
    assert done == [5, 6, 7, 8]
    assert result == expected
    assert difference(values_of(model), values_of(whole)) == 0


def test_the_state_of_another_run_is_refused(tmp_path) -> None:
    model, original = merged_pair(MODELS["gpt2"])
    arrays = rows_of(model)
    recover(model, original, arrays, tmp_path, save_every=2)
    (tmp_path / "recover.safetensors").rename(tmp_path / "kept")
    for settings, make in (({"seed": 1}, MODELS["gpt2"]), ({}, lambda: gpt2(32, 128, 3))):
        (tmp_path / "recover.safetensors").write_bytes((tmp_path / "kept").read_bytes())
        model, original = merged_pair(make)
        before = values_of(model)
        with pytest.raises(InputError, match="state of another recovery"):
            recover(model, original, arrays, tmp_path, save_every=2, **settings)
        assert difference(values_of(model), before) == 0
    changes: list[Callable[[Any, Any, Arrays], Any]] = [
        lambda model, original, arrays: arrays["input_ids"].__setitem__((5, 3), 1),
        lambda model, original, arrays: arrays.update(labels=arrays["input_ids"][:, 0] % 3),
        lambda model, original, arrays: original.lm_head.weight.data[0].mul_(1 + 1e-6),
    ]
    for change in changes:
        (tmp_path / "recover.safetensors").write_bytes((tmp_path / "kept").read_bytes())
        model, original = merged_pair(MODELS["gpt2"])
        other = {name: array.copy() for name, array in arrays.items()}
        change(model, original, other)
        with pytest.raises(InputError, match="state of another recovery"):
            recover(model, original, other, tmp_path, save_every=2)
    (tmp_path / "recover.safetensors").write_bytes((tmp_path / "kept").read_bytes()[:900])
    model, original = merged_pair(MODELS["gpt2"])
    with pytest.raises(InputError, match="cannot be used"):
        recover(model, original, arrays, tmp_path, save_every=2)


@pytest.mark.slow
def test_two_processes_of_one_command_do_what_one_does(tmp_path) -> None:
    """Batches of 5 rows of unequal lengths, shared by two; the last process has fewer."""
    from ffmerge import commands

    model = MODELS["gpt2"]()
    model.save_pretrained(tmp_path / "gpt2")
    np.savez(tmp_path / "data.npz", **rows_of(model))
    source, data = str(tmp_path / "gpt2"), str(tmp_path / "data.npz")
    done = _python([
        "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "ffmerge", "merge", source,
        str(tmp_path / "two"), "--window", "0-2", "--method", "permute",
        "--data", data, "--batch-size", "5", "--recover",
        "12", "--recover-labels", "--recover-parts", "all", "--learning-rate", "3e-3", "--json",
    ])  # fmt: skip
    assert done.returncode == 0, done.stderr
    metric = json.loads(done.stdout)["metric"]  # printed once
    result = commands.merge(
        source, tmp_path / "one", MergeConfig(window=(0, 2), batch_size=5, method="permute"),
        DataConfig(data=data),
        RecoverConfig(steps=12, learning_rate=3e-3, parts="all", labels=True),
        CheckpointConfig(),
    )  # fmt: skip
    one, two = (values_of(checkpoint.load(tmp_path / name)) for name in ("one", "two"))
    for layer in range(3):  # a bias of keys changes no output: its gradient is rounding, which
        for values in (one, two):  # Adam scales up (measured 4e-4)
            values[f"transformer.h.{layer}.attn.c_attn.bias"][32:64] = 0
    start = values_of(merged_pair(MODELS["gpt2"])[0])
    # measured 1.0e-7; were it 0, each would have done all of it
    assert 0 < difference(one, two) < 1e-6
    assert difference(one, start) > 1e-3  # measured 1.3
    assert metric["recovered"] == pytest.approx(result.record.metric["recovered"], rel=1e-6)
    assert metric["recovered"] < metric["merged"]  # perplexity
    assert checkpoint.load(tmp_path / "two").config.ffmerge["metric"] == metric
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.npz", "gpt2", "one", "two"]
