"""No loader leaves a merged checkpoint's weights random: it is exact, or it fails loudly."""

import json
import subprocess
from pathlib import Path

import loaders
import numpy as np
import onnxruntime as ort
import pytest
import torch
from optimum_env import ROOT, require_optimum, run_in_optimum

_REFUSED = {
    "class": "OSError",  # no file named model.safetensors
    "class, no remote code": "OSError",
    "auto": "OSError",
    "pipeline": "ValueError",
    "base class, trusted": "OSError",
    "class, variant": "RuntimeError",  # the sizes of the empty tensors
    "auto, variant": "RuntimeError",
}
_TIED = dict.fromkeys(("ffmerge", "auto, trusted", "pipeline, trusted"), "tied and exact")
_PLAIN = {
    "ffmerge": "tied and exact",
    **dict.fromkeys(("class", "class, no remote code", "auto", "pipeline"), "exact"),
    **dict.fromkeys(("auto, trusted", "pipeline, trusted"), "exact"),
    **dict.fromkeys(("class, variant", "auto, variant"), "OSError"),
}
EXPECTED = {
    **{f"once: {name}": outcome for name, outcome in {**_REFUSED, **_TIED}.items()},
    **{f"shards: {name}": outcome for name, outcome in {**_REFUSED, **_TIED}.items()},
    **{f"own: {name}": outcome for name, outcome in {**_REFUSED, **_TIED}.items()},
    "own: trained on": "tied and exact",
    **{f"expanded: {name}": outcome for name, outcome in _PLAIN.items()},
    "torch": "RuntimeError",
    "trained on": "tied and exact",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("loaders")
    loaders.write(root)
    return root


def test_here(folder: Path) -> None:
    assert loaders.outcomes(folder) == EXPECTED


def test_in_the_second_environment(folder: Path) -> None:
    script = (ROOT / "tests" / "loaders.py").read_text()
    assert json.loads(run_in_optimum(script, folder)) == EXPECTED


def test_optimum_cli_refuses_it_or_is_exact_with_consent(folder: Path, tmp_path: Path) -> None:
    """Its exporter ends with 0 and a wrong model where a checkpoint merely leaves names out."""

    def export(out: str, *options: str) -> int:
        command = [
            require_optimum() / "optimum-cli", "export", "onnx", "--task", "text-generation",
            "--model", folder / "once", *options, tmp_path / out,
        ]  # fmt: skip
        return subprocess.run(command, capture_output=True, cwd=tmp_path, timeout=300).returncode

    assert export("refused") != 0
    assert not (tmp_path / "refused" / "model.onnx").exists()
    assert export("exact", "--trust-remote-code") == 0
    session = ort.InferenceSession(tmp_path / "exact" / "model.onnx")
    ids = loaders.IDS.numpy()
    positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": positions}
    names = {value.name for value in session.get_inputs()}
    (logits,) = session.run(["logits"], {k: v for k, v in feeds.items() if k in names})
    wanted = torch.load(folder / "logits.pt", weights_only=True)[""].numpy()
    error = np.abs(logits - wanted).max()
    assert error < 1e-5, error  # measured 9e-7
