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
from architectures import CASES

import ffmerge
from ffmerge.models import ties
from ffmerge.models.find import find
from ffmerge.models.inputs import example_inputs
from ffmerge.models.record import Group, MergeRecord
from ffmerge.models.sublayer import stacks

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


ALL = [f"{i:02d}-{c[0]}" for i, c in enumerate(CASES) if max([0, *c[3].values()]) > 1]
BF16 = {0, 12, 21, 27, 33, 39}
# plain, gated, fused and Conv1D; one stack, four, two towers, encoder and decoder; renamed between
# the releases (ViT, GPT-NeoX); with a buffer that only one release stores (Swin)
SOME = [
    name
    for kind in (
        "ViTFor", "Swin", "CLIP", "ModernBert", "GPT2", "GPTNeoX", "Llama", "Phi3", "GlmFor",
        "T5", "Marian", "Whisper",
    )
    for name in ALL
    if name[3:].startswith(kind)
]  # fmt: skip


def merged(name: str) -> Any:
    """Return a seeded model; the last two layers of each stack share one sublayer.

    Biases and norms are perturbed, so that a wrong tie shows;
    what a model computes (Marian's positions) is left as it is.
    """
    class_name, config, settings, _, _ = CASES[int(name[:2])]
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
        sharing = ties.SharedWeights(dict(zip(members[0].keys, means, strict=True)))
        ties.tie_(model, [members], [sharing])
        groups.append(Group(stack, tuple(member.layer for member in members)))
    model.config.ffmerge = MergeRecord("average", tuple(groups), 0, 0, 0, 0, {}).to_json()
    return model


def output(model: Any, folder: Path) -> np.ndarray:
    """Return what the model puts out, in float32, for the inputs stored beside the checkpoint."""
    with np.load(f"{folder}.npz") as stored:
        inputs = {k: torch.from_numpy(stored[k]) for k in stored.files}
    with torch.no_grad():
        out = model.float()(**inputs, return_dict=True)
    return (out[0] if out[0].ndim else out[1]).numpy()


def write(root: Path, names: list[str]) -> None:
    """Save every case; some in bf16, every other one in shards; and what is expected."""
    root.mkdir()
    for name in names:
        model, folder, number = merged(name), root / name, int(name[:2])
        if number in BF16:
            for parameter in model.parameters():
                parameter.data = parameter.data.bfloat16().float()
        inputs = example_inputs(model)
        np.savez(f"{folder}.npz", **{key: value.numpy() for key, value in inputs.items()})
        np.save(f"{folder}.npy", output(model, folder))
        Path(f"{folder}.json").write_text(json.dumps(len(ties.ties(model))))
        model = model.bfloat16() if number in BF16 else model
        ffmerge.save(model, folder, max_shard_size="20KB" if number % 2 else "5GB")


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


def read(root: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """Read every case in every way; return what each gave, for the test to judge."""
    report = {}
    for name in names:
        folder = root / name
        wanted = np.load(f"{folder}.npy")
        model = ffmerge.load(folder)
        ffmerge.save(model, root / f"{name}-again")
        auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
        auto = getattr(transformers, next(iter(auto_map)))
        remote = auto.from_pretrained(folder, trust_remote_code=True, dtype="auto").eval()
        remote.save_pretrained(root / f"{name}-remote", max_shard_size="10KB")
        stored, again = tensors(folder), tensors(root / f"{name}-again")
        results = [output(m, folder) for m in (model, remote)]
        report[name] = {
            "error": float(np.abs(results[0] - wanted).max()),
            "ties": [len(ties.ties(model)), json.loads(Path(f"{folder}.json").read_text())],
            "remote_exact": bool((results[0] == results[1]).all()),
            "remote_tied": ties.ties(model) == ties.ties(remote),
            "remote_saves_the_same": tensors(root / f"{name}-remote") == again,
            "changed": [key for key in stored.keys() & again.keys() if stored[key] != again[key]],
            "only_one": [key for key in stored.keys() ^ again.keys()],
            "empty": sum(b"[0]" in value for value in stored.values()),
            "plain": [attempt(type(model), folder), attempt(auto, folder)],
            "variant": [attempt(each, folder, variant="ffmerge") for each in (type(model), auto)],
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
    step, root, *chosen = sys.argv[1:]
    print(json.dumps((write if step == "write" else read)(Path(root), chosen)))
