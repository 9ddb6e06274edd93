"""What the search for widths takes by depth, and whether two processes choose what one does.

``python benchmarks/real/search.py`` runs ``ffmerge merge --method narrow --budget -15%`` on Llamas
of three depths (random weights, 192 wide, 768 hidden neurons, 4,096 tokens), prints the processor
time of each and the line through the three, and runs the least deep one again under torchrun with
two processes: the checkpoints are held against each other byte for byte.
"""

import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

DEPTHS = (6, 12, 24)
BUDGET = "-15%"
ROWS, LENGTH = 64, 64
ALONE = (sys.executable, "-m", "ffmerge")
TWO = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "ffmerge")


def write(folder: Path, layers: int) -> None:
    """Write a model of so many layers, and rows for it beside the folder."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048, hidden_size=192, intermediate_size=768, num_hidden_layers=layers,
        num_attention_heads=6, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    ids = np.random.default_rng(0).integers(0, 2048, (ROWS, LENGTH))
    np.savez(folder.with_suffix(".npz"), input_ids=ids, labels=ids)


def search(command: tuple[str, ...], folder: Path, target: Path) -> float:
    """Run the search; return its processor time in seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    asked = ["merge", folder, target, "--method", "narrow", "--budget", BUDGET]
    asked += ["--data", folder.with_suffix(".npz"), "--batch-size", "8"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, *map(str, asked)], check=True, env=environment, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def digest(folder: Path) -> dict[str, str]:
    """Return what each weight file of a checkpoint holds, and its record, as a hash."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    record = json.loads((folder / "config.json").read_text())["ffmerge"]["narrowed"]
    return found | {"widths": json.dumps(record)}


def main() -> None:
    """Print a row for each depth, the line through them, and what two processes came to."""
    with tempfile.TemporaryDirectory() as made:
        root, seconds = Path(made), []
        print("| layers | processor time |\n|---|---|")
        for layers in DEPTHS:
            write(root / str(layers), layers)
            seconds.append(search(ALONE, root / str(layers), root / f"{layers}-one"))
            print(f"| {layers} | {seconds[-1]:.1f} s |", flush=True)
        slope, start = np.polyfit(DEPTHS, seconds, 1)
        off = np.abs(np.polyval((slope, start), DEPTHS) / seconds - 1).max()
        print(f"{start:.1f} s and {slope:.2f} s for each layer, off by {100 * off:.0f} % at most")
        search(TWO, root / str(DEPTHS[0]), root / "two")
        same = digest(root / f"{DEPTHS[0]}-one") == digest(root / "two")
        print("two processes: " + ("the same checkpoint" if same else "ANOTHER checkpoint"))


if __name__ == "__main__":
    main()
