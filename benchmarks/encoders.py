"""An encoder's packages on the CPU, against ONNX Runtime's transformers optimizer.

    python benchmarks/encoders.py CHECKPOINT [--build FOLDER] [--threads 1] [--turns 5]

Forms: ``portable`` and ``cpu`` (``ffmerge export --for``), and ``optimizer``, what
``onnxruntime.transformers.optimizer`` makes of a TorchScript export of the same model (a BERT). All
run in one process, in turns, on the same ids; the times are processor time, of several threads wall
time. A ratio is the median of those of pairs, a turn of a form over the same turn of ``optimizer``.
``off`` is how far a form's states are from PyTorch's, in parts of the largest.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch

import ffmerge

SIZES = [(length, batch) for length in (16, 128, 512) for batch in (1, 8)]
LEAST = 0.3  # seconds of a turn


class Wrapped(torch.nn.Module):
    """The model with inputs by position, as TorchScript takes them."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Any, mask: Any, kinds: Any) -> Any:
        """Return the last states."""
        given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": kinds}
        return self.model(**given).last_hidden_state


def build(checkpoint: str, folder: Path) -> dict[str, Path]:
    """Make the files that are not there yet, and return the graph of each form."""
    paths = {}
    model = ffmerge.load(checkpoint)
    for form in ("portable", "cpu"):
        path = folder / form
        if not path.exists():
            ffmerge.export(model, path, ffmerge.ExportConfig(profile=form))
        paths[form] = path / "model.onnx"
    paths["optimizer"] = folder / "optimizer.onnx"
    if not paths["optimizer"].exists():
        from onnxruntime.transformers import optimizer

        plain, axes = folder / "torchscript.onnx", {0: "batch", 1: "length"}
        names = ["input_ids", "attention_mask", "token_type_ids"]
        model.set_attn_implementation("eager")
        torch.onnx.export(
            Wrapped(model.eval()), tuple(torch.ones(2, 8, dtype=torch.int64) for _ in names), plain,
            dynamo=False, opset_version=17, input_names=names, output_names=["last_hidden_state"],
            dynamic_axes=dict.fromkeys([*names, "last_hidden_state"], axes),
        )  # fmt: skip
        heads, width = model.config.num_attention_heads, model.config.hidden_size
        made = optimizer.optimize_model(str(plain), "bert", num_heads=heads, hidden_size=width)
        print("fused:", {k: v for k, v in made.get_fused_operator_statistics().items() if v})
        made.save_model_to_file(str(paths["optimizer"]))
    return paths


def turn(session: Any, feeds: dict[str, Any], clock: Any) -> float:
    """Return the ms of one run, the median of as many as a turn has room for."""
    times: list[float] = []
    while sum(times) < LEAST or len(times) < 3:
        start = clock()
        session.run(["last_hidden_state"], feeds)
        times.append(clock() - start)
    return statistics.median(times) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--build", type=Path, default=Path("build/encoders"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=5)
    given = parser.parse_args()
    given.build.mkdir(parents=True, exist_ok=True)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = given.threads
    sessions = {
        form: ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        for form, path in build(given.checkpoint, given.build).items()
    }
    clock = time.process_time if given.threads == 1 else time.perf_counter
    model, generator = ffmerge.load(given.checkpoint).eval(), np.random.default_rng(0)
    print("| tokens x rows | " + " | ".join(f"{form}: ms, ratio" for form in sessions) + " | off |")
    print("|---" * (len(sessions) + 2) + "|")
    for length, batch in SIZES:
        ids = generator.integers(1000, model.config.vocab_size, (batch, length))
        whole = {"attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        feeds = {"input_ids": ids, **whole}
        times: dict[str, list[float]] = {form: [] for form in sessions}
        for number in range(given.turns):
            for form in sorted(sessions, reverse=bool(number % 2)):
                times[form].append(turn(sessions[form], feeds, clock))
        with torch.no_grad():
            wanted = model(**{name: torch.tensor(x) for name, x in feeds.items()})
        expected = wanted.last_hidden_state.numpy()
        off, cells = 0.0, []
        for form, session in sessions.items():
            found = session.run(["last_hidden_state"], feeds)[0]
            off = max(off, float(np.abs(found - expected).max() / np.abs(expected).max()))
            ratios = [a / b for a, b in zip(times[form], times["optimizer"], strict=True)]
            cells.append(f"{statistics.median(times[form]):.1f}, {statistics.median(ratios):.2f}")
        print(f"| {length} x {batch} | {' | '.join(cells)} | {off:.0e} |", flush=True)


if __name__ == "__main__":
    main()
