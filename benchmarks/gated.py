"""Which activations should align the hidden neurons of gated feed-forward sublayers?

Trains small SwiGLU language models on the bytes of Python's own standard library, merges every
window of k layers by each candidate, and prints the perplexity of the merged, untuned models on
files the model has not seen. docs/merging.md holds the result.

    python benchmarks/gated.py [--steps 600] [--seeds 2]
"""

import argparse
import math
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from ffmerge.models import ties
from ffmerge.models.find import find
from ffmerge.models.sublayer import FeedForward
from ffmerge.passes.weights.align import match
from ffmerge.passes.weights.methods import mean_of
from ffmerge.passes.weights.moments import Moments

LENGTH, LAYERS = 128, 6
KINDS = ("gate", "up", "product")
METHODS = ("average", "up", "gate", "product", "both", "all three")


def corpus() -> tuple[Tensor, Tensor, Tensor]:
    """Return rows of bytes to train on, to align by (80 rows), and to measure on (96 rows)."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    texts = [torch.frombuffer(bytearray(f.read_bytes()), dtype=torch.uint8) for f in files]
    seen = torch.cat([t for i, t in enumerate(texts) if i % 8])
    unseen = torch.cat([t for i, t in enumerate(texts) if not i % 8])
    rows = [t[: len(t) // LENGTH * LENGTH].view(-1, LENGTH).long() for t in (seen, unseen)]
    picked = rows[1][torch.randperm(len(rows[1]), generator=torch.Generator().manual_seed(0))]
    return rows[0], picked[:80], picked[80:176]


def train(rows: Tensor, steps: int, seed: int) -> Any:
    """Return a language model of 6 SwiGLU layers after ``steps`` batches of 16 rows."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=352, num_hidden_layers=LAYERS,
        num_attention_heads=4, max_position_embeddings=LENGTH, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    warm = 50
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * s / steps))
    )
    for _ in range(steps):
        batch = rows[torch.randint(len(rows), (16,))]
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def perplexity(model: Any, rows: Tensor) -> float:
    """Return the perplexity of the next byte."""
    losses = [float(model(input_ids=part, labels=part).loss) for part in rows.split(16)]
    return math.exp(sum(losses) / len(losses))


@torch.no_grad()
def moments(model: Any, sublayers: Sequence[FeedForward], rows: Tensor) -> dict[str, Moments]:
    """Return the moments of each kind of features for every pair of layers."""
    pairs = tuple((a, b) for a in range(LAYERS) for b in range(a + 1, LAYERS))
    found = {kind: Moments(pairs) for kind in KINDS}
    features: dict[str, dict[int, Tensor]] = {kind: {} for kind in KINDS}
    for s in sublayers:
        for kind, path in zip(("gate", "up"), s.inputs, strict=True):
            model.get_submodule(path).register_forward_hook(
                lambda m, a, out, kind=kind, i=s.layer: features[kind].update({i: out})
            )
        model.get_submodule(s.output).register_forward_pre_hook(
            lambda m, a, i=s.layer: features["product"].update({i: a[0]})
        )
    for part in rows.split(16):
        model(input_ids=part)
        for kind in KINDS:
            found[kind].update({i: x.flatten(0, 1)[None] for i, x in features[kind].items()})
    return found


def orders(
    found: Mapping[str, Moments], method: str, members: Sequence[FeedForward]
) -> list[Tensor | None]:
    """Return the order of each member's hidden neurons, None: as they are."""
    anchor, *others = [m.layer for m in members]
    sums = {"average": (), "both": ("gate", "up"), "all three": KINDS}
    kinds = sums.get(method, (method,))
    if not kinds:
        return [None] * len(members)
    return [None] + [
        match(torch.stack([found[kind].correlation(anchor, other) for kind in kinds]).sum(0))
        for other in others
    ]


def main() -> None:
    """Train, merge every window by every method, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=2)
    settings = parser.parse_args()
    training, calibration, held_out = corpus()
    print("| seed | k | window | " + " | ".join(METHODS) + " |")
    print("|---" * (3 + len(METHODS)) + "|")
    for seed in range(settings.seeds):
        model = train(training, settings.steps, seed)
        print(f"| {seed} | 1 | none | " + f"{perplexity(model, held_out):.2f} | " * len(METHODS))
        sublayers = find(model)
        found = moments(model, sublayers, calibration)
        for k in (2, 3, 4):
            logs: dict[str, list[float]] = {method: [] for method in METHODS}
            for start in range(LAYERS - k + 1):
                members = sublayers[start : start + k]
                for method in METHODS:
                    shared = mean_of(model, members, orders(found, method, members))
                    with ties.tied(model, [members], [shared]):
                        logs[method].append(math.log(perplexity(model, held_out)))
                cells = " | ".join(f"{math.exp(logs[m][-1]):.2f}" for m in METHODS)
                print(f"| {seed} | {k} | {start}-{start + k - 1} | {cells} |", flush=True)
            cells = " | ".join(f"{math.exp(sum(x) / len(x)):.2f}" for x in logs.values())
            print(f"| {seed} | {k} | geometric mean | {cells} |", flush=True)


if __name__ == "__main__":
    main()
