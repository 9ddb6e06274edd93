"""A budget of an encoder and a decoder against one precision of the same size.

``python benchmarks/quality/bits_pairs.py`` takes the trained translation model of ``examples``: its
package in int4 in blocks of 32, 64 and 128, and for the bytes of each one with ``--budget``. Prints
of each its bytes and, on test pairs that no weight was rounded by, how far what it says diverges
from PyTorch, in nats.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import ffmerge
from ffmerge.config import ExportConfig
from ffmerge.runtime_tests.results import model_bytes

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from reference.tasks import REFERENCES

NUMERALS = REFERENCES["numerals"]


def divergence(model: Any, served: Any) -> float:
    """Return the mean divergence of the next words, the package's from PyTorch's."""
    held_out = NUMERALS.load("test")
    given = {
        name: torch.tensor(held_out[name])
        for name in ("input_ids", "attention_mask", "decoder_input_ids")
    }
    counted = torch.tensor(held_out["labels"]) != -100
    with torch.no_grad():
        expected = model(**given).logits.double().log_softmax(-1)
    found = served(**given).logits.double().log_softmax(-1)
    return float((expected.exp() * (expected - found)).sum(-1)[counted].mean())


def main() -> None:
    """Print the table."""
    model, data = ffmerge.load(NUMERALS.folder), NUMERALS.load("calibration")
    print("| | bytes | divergence | with a budget of these: bytes | divergence |")
    print("|---|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        for block in (32, 64, 128):
            line, size = f"| blocks of {block} |", 0
            for name, bits in (("one", {"block": block}), ("mixed", {})):
                if size:
                    bits = {"budget": f"{size}B"}
                out = Path(folder) / f"{name}{block}"
                package = ffmerge.export(model, out, ExportConfig(dtype="int4", **bits), data=data)
                size = model_bytes(package.manifest)
                lost = divergence(model, ffmerge.load_package(out))
                line += f" {size:,} | {lost:.5f} |"
            print(line, flush=True)


if __name__ == "__main__":
    main()
