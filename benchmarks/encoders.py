"""An encoder's packages on the CPU, against ONNX Runtime's transformers optimizer.

    python benchmarks/encoders.py CHECKPOINT [--build FOLDER] [--threads 1] [--turns 5]

Forms: ``portable`` and ``cpu`` (``ffmerge export --for``), and ``optimizer``, what
``onnxruntime.transformers.optimizer`` makes of a TorchScript export of the same model (a BERT). All
run in turns, each in a process of its own, on the same ids; the times are processor time, of
several threads wall time. A ratio is the median of those of pairs, a turn of a form over the same
turn of ``optimizer``. ``off`` is how far a form's states are from PyTorch's, in parts of the
largest.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from genai import alone

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
    import ffmerge

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


def runs(path: Path, threads: int, all_feeds: list[dict[str, Any]]) -> list[Any]:
    """Open a graph, and return for each of some feeds the ms of a run and its states."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    clock = time.process_time if threads == 1 else time.perf_counter
    found = []
    for feeds in all_feeds:
        (states,) = session.run(["last_hidden_state"], feeds)  # buffers are made
        times: list[float] = []
        while sum(times) < LEAST or len(times) < 3:
            start = clock()
            session.run(["last_hidden_state"], feeds)
            times.append(clock() - start)
        found.append((statistics.median(times) * 1e3, states))
    return found


def drawn(model: Any) -> list[dict[str, Any]]:
    """Return ids of every size, none of them padding."""
    generator, found = np.random.default_rng(0), []
    for length, batch in SIZES:
        ids = generator.integers(1000, model.config.vocab_size, (batch, length))
        whole = {"attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        found.append({"input_ids": ids, **whole})
    return found


def main() -> None:
    import ffmerge

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--build", type=Path, default=Path("build/encoders"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=5)
    given = parser.parse_args()
    given.build.mkdir(parents=True, exist_ok=True)
    paths = build(given.checkpoint, given.build)
    model = ffmerge.load(given.checkpoint).eval()
    feeds = drawn(model)
    found: dict[str, list[Any]] = {form: [] for form in paths}
    for number in range(given.turns):
        for form in sorted(paths, reverse=bool(number % 2)):
            found[form].append(alone(runs, paths[form], given.threads, feeds))
    print("| tokens x rows | " + " | ".join(f"{form}: ms, ratio" for form in paths) + " | off |")
    print("|---" * (len(paths) + 2) + "|")
    for place, (length, batch) in enumerate(SIZES):
        with torch.no_grad():
            wanted = model(**{name: torch.tensor(x) for name, x in feeds[place].items()})
        expected = wanted.last_hidden_state.numpy()
        off, cells = 0.0, []
        times = {form: [turn[place][0] for turn in turns] for form, turns in found.items()}
        for form, turns in found.items():
            states = turns[0][place][1]
            off = max(off, float(np.abs(states - expected).max() / np.abs(expected).max()))
            ratios = [a / b for a, b in zip(times[form], times["optimizer"], strict=True)]
            cells.append(f"{statistics.median(times[form]):.1f}, {statistics.median(ratios):.2f}")
        print(f"| {length} x {batch} | {' | '.join(cells)} | {off:.0e} |", flush=True)


if __name__ == "__main__":
    main()
