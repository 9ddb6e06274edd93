"""Seconds and memory of the methods on a model as large as ViT-B/16, and of the linear solve alone.

    python benchmarks/quality/vit_base.py

Random weights, one window of five layers, 84 pictures of 197 positions: 16,548 tokens. Each method
has a process of its own with all cores. Memory is the growth of the resident set over that of the
process before, the model loaded and run once; that of the solve counts the matrices it is given.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

METHODS = ("permute", "calibrated", "residual")
SOLVE = "solve"
MIB = 2**20


def resident(key: str) -> int:
    """Return bytes: ``VmRSS`` now, ``VmHWM`` at most since the last :func:`forget`."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if key in line).split()[1])


def forget() -> None:
    """Let the most that was resident be what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


class Parts:
    """Seconds of each part, without the parts in it, and the most memory while it ran."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.peak: dict[str, int] = {}
        self._open: list[str] = []
        self._since = time.perf_counter()

    def turn(self) -> None:
        """Count what was since the last turn for the innermost open part."""
        now = time.perf_counter()
        if self._open:
            name = self._open[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
            self.peak[name] = max(self.peak.get(name, 0), resident("VmHWM"))
        forget()
        self._since = now

    def of(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            self.turn()
            self._open.append(name)
            try:
                return function(*args, **options)
            finally:
                self.turn()
                self._open.pop()

        return counted


def merging(method: str) -> dict[str, Any]:
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    from ffmerge.passes.weights import activations, calibrated, least_squares, merge, methods

    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(num_labels=1000)).eval()
    pixels = torch.randn(84, 3, 224, 224).numpy()
    with torch.no_grad():
        model(torch.from_numpy(pixels[:32]))
    parts, before = Parts(), resident("VmRSS")
    for name, where, function in (
        ("statistics", activations, "collect"),
        ("alignment", methods, "orders"),
        ("calibration pass", calibrated, "_refit_"),
        ("solve", least_squares, "ridge_solve"),
    ):
        setattr(where, function, parts.of(name, getattr(where, function)))
    config = merge.MergeConfig(window=(3, 7), method=method, tokens=16_384)
    data, held_out = {"pixel_values": pixels}, {"pixel_values": pixels[:1]}
    parts.of("the rest", merge.merge_)(model, data, config, held_out)
    return {
        "seconds": parts.seconds,
        "mib": {name: (peak - before) / MIB for name, peak in parts.peak.items()},
    }


def solving(f: int = 3072, d: int = 768) -> dict[str, Any]:
    import torch

    from ffmerge.passes.weights.least_squares import Regression

    def made(f: int, d: int) -> Regression:
        found = Regression(torch.zeros(f, f), torch.zeros(f, d))
        found.gram += torch.eye(f)  # every page is touched
        found.cross += 1
        for _ in range(8):
            found.update(0, torch.randn(64, f), torch.randn(64, d))
        return found

    made(512, 64).solve(1e-2)  # threads and their buffers
    before = resident("VmRSS")
    regression = made(f, d)
    forget()
    start = time.perf_counter()
    regression.solve(1e-2)
    seconds = time.perf_counter() - start
    peak = resident("VmHWM") - before
    return {"seconds": seconds, "mib": peak / MIB, "grams": peak / (4 * f * f)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=(*METHODS, SOLVE), help="one, in this process, as JSON")
    only = parser.parse_args().only
    if only:
        print(json.dumps(solving() if only == SOLVE else merging(only)))
        return
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    found = {}
    for name in (SOLVE, *METHODS):
        command = [sys.executable, __file__, "--only", name]
        run = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE)
        found[name] = json.loads(run.stdout.splitlines()[-1])
        print(f"{name}: {run.stdout.decode().strip()}", file=sys.stderr)
    names = list(dict.fromkeys(part for m in METHODS for part in found[m]["seconds"]))
    print(f"{'':18}" + "".join(f"{method:>22}" for method in METHODS))
    for name in names:
        cells = [
            f"{found[m]['seconds'][name]:.1f} s {found[m]['mib'][name]:.0f} MiB"
            if name in found[m]["seconds"] else "-"
            for m in METHODS
        ]  # fmt: skip
        print(f"{name:18}" + "".join(f"{cell:>22}" for cell in cells))
    totals = [(sum(found[m]["seconds"].values()), max(found[m]["mib"].values())) for m in METHODS]
    print(f"{'in all, at most':18}" + "".join(f"{f'{s:.1f} s {b:.0f} MiB':>22}" for s, b in totals))
    solve = found[SOLVE]
    print(
        f"linear solve alone, f = 3072, d = 768: {solve['seconds']:.1f} s, {solve['mib']:.0f} MiB, "
        f"{solve['grams']:.2f} x the float32 Gram matrix"
    )


if __name__ == "__main__":
    main()
