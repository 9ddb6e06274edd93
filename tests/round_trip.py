"""Merged checkpoints of all families written by one release of transformers, read by another.

Runs in both environments: ``write`` there, ``read`` here, and the other way round.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from test_architectures import CASES

import ffmerge
from ffmerge.models import ties
from ffmerge.models.feedforward import find, stacks
from ffmerge.models.inputs import example_inputs
from ffmerge.models.plan import Group, MergeRecord

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def names() -> list[str]:
    """Return the name of each case whose stacks can be merged."""
    return [f"{i:02d}-{c[0]}" for i, c in enumerate(CASES) if max([0, *c[3].values()]) > 1]


def merged(name: str) -> Any:
    """Return a seeded model; the last two layers of each stack share one sublayer.

    Every third is in bf16. Biases and norms are perturbed, so that a wrong tie shows;
    what a model computes (Marian's positions) is left as it is.
    """
    number = int(name[:2])
    class_name, config, settings, _, _ = CASES[number]
    torch.manual_seed(0)
    model = getattr(transformers, class_name)(getattr(transformers, config)(**settings)).eval()
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter += torch.randn(parameter.shape) * 0.05
    groups = []
    for stack, members in stacks(find(model)).items():
        members = members[-2:]
        pairs = zip(*(member.weights for member in members), strict=True)
        means = [sum(model.get_parameter(w.name).detach() for w in pair) / 2 for pair in pairs]
        ties.tie_(model, members, means)
        groups.append(Group(stack, tuple(member.layer for member in members)))
    model.config.ffmerge = MergeRecord("average", tuple(groups), 0, 0, 0, 0, {}).to_json()
    return model.to(torch.bfloat16) if number % 3 == 0 else model


def output(model: Any, folder: Path) -> np.ndarray:
    """Return what the model puts out for the inputs stored beside the checkpoint."""
    with np.load(f"{folder}.npz") as stored:
        inputs = {k: torch.from_numpy(stored[k]) for k in stored.files}
    inputs = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    with torch.no_grad():
        out = model(**inputs, return_dict=True)
    return (out[0] if out[0].ndim else out[1]).float().numpy()


def write(root: Path) -> None:
    """Save every case, every other one in shards; with inputs, output and number of ties."""
    for name in names():
        model, folder = merged(name), root / name
        ffmerge.save(model, folder, max_shard_size="20KB" if int(name[:2]) % 2 else "5GB")
        np.savez(f"{folder}.npz", **{k: v.float().numpy() if v.is_floating_point() else v.numpy()
                                     for k, v in example_inputs(model).items()})  # fmt: skip
        np.save(f"{folder}.npy", output(model, folder))
        Path(f"{folder}.json").write_text(json.dumps(len(ties.ties(model))))


def tensors(folder: Path) -> dict[str, bytes]:
    """Return every stored tensor by name, with its shape and type."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        header.pop("__metadata__", None)
        for key, value in header.items():
            start, end = (8 + length + at for at in value["data_offsets"])
            found[key] = f"{value['dtype']}{value['shape']}".encode() + raw[start:end]
    return found


def read(root: Path) -> dict[str, dict[str, Any]]:
    """Read every case in every way; return what each gave, for the test to judge."""
    report = {}
    for name in names():
        folder = root / name
        wanted = np.load(f"{folder}.npy")
        model = ffmerge.load(folder)
        ffmerge.save(model, root / f"{name}-again")
        auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
        auto = getattr(transformers, next(iter(auto_map)))
        remote = auto.from_pretrained(folder, trust_remote_code=True, dtype="auto").eval()
        report[name] = {
            "error": float(np.abs(output(model, folder) - wanted).max()),
            "scale": float(np.abs(wanted).max()),
            "ties": [len(ties.ties(m)) for m in (model, remote)],
            "expected_ties": json.loads(Path(f"{folder}.json").read_text()),
            "remote_equal": bool((output(remote, folder) == output(model, folder)).all()),
            "remote_names": [t.members for t in ties.ties(remote)]
            == [t.members for t in ties.ties(model)],
            "tensors_equal": tensors(folder) == tensors(root / f"{name}-again"),
            "plain": [attempt(type(model), folder), attempt(auto, folder)],
            "variant": attempt(type(model), folder, variant="ffmerge"),
        }
    return report


def attempt(loader: Any, folder: Path, **settings: Any) -> str:
    """Return the name of the error that a plain loader ends with."""
    try:
        loader.from_pretrained(folder, **settings)
    except Exception as error:
        return type(error).__name__
    return "loaded"


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write(Path(sys.argv[2]))
    else:
        print(json.dumps(read(Path(sys.argv[2]))))
