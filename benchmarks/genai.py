"""Generation with a decoder's package, against what onnxruntime-genai's builder makes of it.

    pip install onnxruntime-genai
    python benchmarks/genai.py CHECKPOINT TEXT [--build FOLDER] [--dtype int4] [--json FILE]

Forms: ``portable`` and ``cpu`` (``ffmerge export --for``) on ONNX Runtime; where onnxruntime-genai
is installed, ``genai``, which is the package ``cpu`` on it, ``tied``, the same of the model with
ten pairs of feed-forward sublayers that are one, and ``builder``, what its own builder makes. Of a
package ``--for cpu,portable``, if they are asked for, ``together`` is the first graph,
``together-portable`` the other, and ``together-genai`` the package on onnxruntime-genai. All
make the same steps in turns, each in a process of its own, so that what else the machine does
falls on all; the times are processor time, of several ``--threads`` wall time. A ratio is the
median of those of pairs, one turn of a form over the same turn of ``--base``. ``same`` are the
first greedy ids behind a prompt that are PyTorch's, of 64. Packages are made once, under
``--build``.
"""

import argparse
import json
import multiprocessing
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

FORMS = ("portable", "cpu", "genai", "tied", "builder")
# form -> the form whose package it is, and the graph that ONNX Runtime opens
OF = {"genai": "cpu", "together-genai": "together", "together-portable": "together"}
GRAPHS = {"portable": "model", "cpu": "model", "together": "model",
          "together-portable": "model_portable"}  # fmt: skip
PREFILLED = (256, 1024)  # tokens of a prompt
PAIRS = 10
TOKENS, GREEDY, WARM = 16, 64, 8
Clock = Callable[[], float]
PAST, KEPT = "past_key_values.", "num_logits_to_keep"


class Package:
    """A package of ours, on ONNX Runtime: outputs stay where they are and are the next inputs."""

    def __init__(self, path: Path, threads: int) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        self.session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.outputs = [o.name for o in self.session.get_outputs()]
        self.kept: dict[str, Any] = {}
        self.length = 0

    def start(self, room: int) -> None:
        """Forget what was read."""
        self.length = 0
        for given in self.session.get_inputs():
            if given.name.startswith(PAST):
                empty = np.zeros((1, given.shape[1], 0, given.shape[3]), np.float32)
                self.kept[given.name] = ort.OrtValue.ortvalue_from_numpy(empty)

    def step(self, ids: list[int]) -> int:
        """Read ids, and return the one that is put first behind them."""
        places = np.arange(self.length, self.length + len(ids))[None]
        self.length += len(ids)
        feeds = {
            "input_ids": np.array([ids]),
            "attention_mask": np.ones((1, self.length), np.int64),
            "position_ids": places,
        }
        if any(each.name == KEPT for each in self.session.get_overridable_initializers()):
            feeds[KEPT] = np.array(1)
        values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in feeds.items()}
        found = self.session.run_with_ort_values(self.outputs, {**values, **self.kept})
        for name, value in zip(self.outputs[1:], found[1:], strict=True):
            self.kept[name.replace("present.", PAST)] = value
        return int(found[0].numpy()[0, -1].argmax())


class Built:
    """A folder on onnxruntime-genai: what its builder made, or a package of ours."""

    def __init__(self, path: Path, threads: int) -> None:
        import onnxruntime_genai

        self.library = onnxruntime_genai
        config = onnxruntime_genai.Config(str(path))
        settings = {"session_options": {"intra_op_num_threads": threads}}
        config.overlay(json.dumps({"model": {"decoder": settings}}))
        self.model = onnxruntime_genai.Model(config)
        self.generator: Any = None

    def start(self, room: int) -> None:
        parameters = self.library.GeneratorParams(self.model)
        parameters.set_search_options(max_length=room, do_sample=False)
        self.generator = self.library.Generator(self.model, parameters)

    def step(self, ids: list[int]) -> int:
        """Read ids; the generator appends the one that it puts first, and reads it next."""
        if len(ids) > 1:
            self.generator.append_tokens(np.array([ids], np.int32))
        self.generator.generate_next_token()
        return int(self.generator.get_next_tokens()[0])


def build(checkpoint: str, folder: Path, dtype: str, form: str) -> Path:
    """Make what a form opens, if it is not there yet, and return where it is."""
    name = OF.get(form, form)
    path = folder / f"{name}-{dtype}"
    if path.exists():
        return path
    if name == "builder":
        make = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", checkpoint]
        where = ["-o", str(path), "-c", str(folder / "cache"), "-e", "cpu", "-p", dtype]
        subprocess.run([*make, *where], check=True)
    elif name == "tied":
        export_tied(checkpoint, path, dtype)
    else:
        make = [sys.executable, "-m", "ffmerge", "export", checkpoint, str(path)]
        profile = {"together": "cpu,portable"}.get(name, name)
        subprocess.run([*make, "--dtype", dtype, "--for", profile], check=True)
    return path


def export_tied(checkpoint: str, path: Path, dtype: str) -> None:
    """Export a model whose middle layers have, two by two, the feed-forward sublayer of the first.

    It writes nonsense as fast as one that was merged well.
    """
    import ffmerge

    model = ffmerge.load(checkpoint)
    layers = model.model.layers
    first = (len(layers) - 2 * PAIRS) // 2
    for at in range(first, first + 2 * PAIRS, 2):
        layers[at + 1].mlp = layers[at].mlp
    ffmerge.export(model, path, ffmerge.ExportConfig(dtype=dtype, profile="cpu"))


def opened(form: str, path: Path, threads: int) -> Any:
    """Return what runs a form."""
    if form in GRAPHS:
        return Package(path / f"{GRAPHS[form]}.onnx", threads)
    return Built(path, threads)


def turn(form: Any, ids: list[int], length: int, clock: Clock) -> tuple[float, float]:
    """Return the ms of reading a prompt of this length, and of a token behind it, the median."""
    form.start(length + TOKENS + 2)
    start = clock()
    last = form.step(ids[:length])
    read = clock() - start
    times = []
    for _ in range(TOKENS):
        start = clock()
        last = form.step([last])
        times.append(clock() - start)
    return read * 1e3, statistics.median(times) * 1e3


def expected(checkpoint: str, ids: list[int]) -> list[int]:
    """Return the ids that PyTorch puts first behind a prompt, one after another."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    settings = {"do_sample": False, "max_new_tokens": GREEDY, "min_new_tokens": GREEDY}
    with torch.no_grad():
        found = model.generate(torch.tensor([ids]), **settings)
    return [int(i) for i in found[0, len(ids) :]]


def same(name: str, path: Path, threads: int, ids: list[int], wanted: list[int]) -> int:
    """Return how many of the first greedy ids are those that are wanted."""
    form = opened(name, path, threads)
    form.start(len(ids) + GREEDY + 2)
    found = [form.step(ids)]
    while len(found) < len(wanted):
        found.append(form.step(found[-1:]))
    equal = [one == other for one, other in zip(found, wanted, strict=True)]
    return [*equal, False].index(False)


def measure(
    paths: dict[str, Path], threads: int, ids: list[int], lengths: list[int], turns: int
) -> dict[str, dict[str, list[float]]]:
    """Return the ms of every turn, by what is measured and form.

    A turn has a process of its own, as somebody has who opens a package: of two that were open
    together the one that had been opened first took up to a sixth longer, and one that was opened
    where another had been took up to a tenth less.
    """
    found: dict[str, dict[str, list[float]]] = {}
    for length in lengths:
        for number in range(turns):
            for name in sorted(paths, reverse=bool(number % 2)):
                read, decoded = alone(opened_turn, name, paths[name], threads, ids, length)
                if length in PREFILLED:
                    found.setdefault(f"prefill {length}", {}).setdefault(name, []).append(read)
                found.setdefault(f"decode {length}", {}).setdefault(name, []).append(decoded)
    return found


def alone(task: Callable[..., Any], *given: Any) -> Any:
    """Return what a function gives, called in a process that does nothing else."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
        return fresh.submit(task, *given).result()


def opened_turn(
    name: str, path: Path, threads: int, ids: list[int], length: int
) -> tuple[float, float]:
    """Open a form, let it make its buffers, and return what :func:`turn` does."""
    clock = time.process_time if threads == 1 else time.perf_counter
    form = opened(name, path, threads)
    turn(form, ids, WARM, clock)
    return turn(form, ids, length, clock)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint")
    parser.add_argument("text", type=Path)
    parser.add_argument("--build", type=Path, default=Path("build/genai"))
    parser.add_argument("--dtype", default="int4")
    parser.add_argument("--forms", nargs="+", default=FORMS, choices={*FORMS, *OF, *GRAPHS})
    parser.add_argument("--base", default="builder")
    parser.add_argument("--lengths", nargs="+", type=int, default=[64, 256, 1024, 4096])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    given.build.mkdir(parents=True, exist_ok=True)
    paths = {f: build(given.checkpoint, given.build, given.dtype, f) for f in given.forms}
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(given.checkpoint)
    ids = tokenizer(given.text.read_text())["input_ids"][: max(given.lengths)]
    wanted = expected(given.checkpoint, ids[:32])
    agreed = {}
    for name, path in paths.items():
        if name != "tied":
            agreed[name] = alone(same, name, path, given.threads, ids[:32], wanted)
    found = measure(paths, given.threads, ids, given.lengths, given.turns)
    print(f"{given.dtype}; greedy ids that are PyTorch's, of {GREEDY}: {agreed}\n")
    print("| | " + " | ".join(f"{name}: ms, ratio" for name in paths) + " |")
    print("|---" * (len(paths) + 1) + "|")
    for what, times in found.items():
        cells = []
        for name in paths:
            ratios = [a / b for a, b in zip(times[name], times[given.base], strict=True)]
            ms, ratio = statistics.median(times[name]), statistics.median(ratios)
            cells.append(f"{ms:.1f}, {ratio:.2f}")
        print(f"| {what} | " + " | ".join(cells) + " |")
    if given.json:
        given.json.write_text(json.dumps({"same": agreed, "ms": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
