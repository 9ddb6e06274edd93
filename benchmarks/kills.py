"""Commands that are killed while they write: is what they leave whole or nothing, and in no way?

``python benchmarks/kills.py [--random 100] [--json FILE]`` runs ``share``, ``merge``, ``merge
--recover`` and ``export`` in child processes that are killed at every file event (a file opened to
be written, made, renamed or removed) and at random moments. After each, the target is not there or
is what an undisturbed run writes; and the same command run again writes exactly that. Prints what
was not so, and a table.
"""

import argparse
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import fuzz
import numpy as np
import torch

WRITES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree")
_TARGET = "out"


def main() -> None:
    """Kill every command at all its file events, and at random moments."""
    torch.set_num_threads(1)  # a child that is forked would wait for threads that it has not
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--random", type=int, default=100, help="kills at random moments, in all")
    parser.add_argument("--only", default="", help="a command")
    parser.add_argument("--json", type=Path, help="where the figures go")
    arguments = parser.parse_args()
    counts: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        commands = write_commands(Path(folder))
        for name, words in commands.items():
            if arguments.only not in ("", name):
                continue
            counts[name] = kill_everywhere(Path(folder) / name, words)
            moments = arguments.random // len(commands)
            counts[name] += kill_at_random(Path(folder) / name, words, moments)
            print(f"{name:9}", ", ".join(f"{w} {n}" for w, n in counts[name].items()), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"counts": counts}, indent=2) + "\n")


def write_commands(folder: Path) -> dict[str, str]:
    """Write inputs; return commands by name that write ``out`` in the folder of that name."""
    (folder / "arrays").mkdir()
    (folder / "graph").mkdir()
    fuzz._arrays(folder / "arrays", "arrays")
    fuzz._graph(folder / "graph", "graph")
    model, data = folder / "arrays", folder / "arrays" / "data.npz"
    return {
        "share": f"share {folder}/graph/in.onnx {{out}}",
        "merge": f"merge {model} {{out}} --window 0-1 --data {data}",
        "recover": f"merge {model} {{out}} --window 0-1 --data {data} --recover 4",
        "export": f"export {model} {{out}}",
    }


def kill_everywhere(folder: Path, words: str) -> Counter[str]:
    """Kill a command at each of its file events, one after another until it ends well."""
    expected = _undisturbed(folder, words)
    counts: Counter[str] = Counter()
    event = 1
    while _killed(folder, words, partial(_die_at, event)):
        counts[_verdict(folder, words, expected, f"file event {event}")] += 1
        event += 1
    return counts


def kill_at_random(folder: Path, words: str, moments: int) -> Counter[str]:
    """Kill a command at random moments of its run."""
    start = time.perf_counter()
    expected = _undisturbed(folder, words)
    seconds = time.perf_counter() - start
    random = np.random.default_rng(0)
    counts: Counter[str] = Counter()
    for _ in range(moments):
        delay = random.uniform(0, seconds)
        if _killed(folder, words, partial(signal.setitimer, signal.ITIMER_REAL, delay)):
            counts[_verdict(folder, words, expected, f"{delay:.3f} s")] += 1
    return counts


def _undisturbed(folder: Path, words: str) -> dict[str, str]:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    if _killed(folder, words, lambda: None):
        raise RuntimeError(f"{words} does not end by itself")
    return _written(folder)


def _killed(folder: Path, words: str, prepare: Callable[[], Any]) -> bool:
    """Run a command in a child that ``prepare`` arms; say whether it was killed."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return _run(folder, words, prepare) < 0


def _run(folder: Path, words: str, prepare: Callable[[], Any]) -> int:
    child = multiprocessing.get_context("fork").Process(
        target=_child, args=(folder, words, prepare)
    )
    child.start()
    child.join()
    return child.exitcode or 0


def _child(folder: Path, words: str, prepare: Callable[[], Any]) -> None:
    from ffmerge.__main__ import main

    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        prepare()
        main(words.format(out=folder / _TARGET).split())


def _die_at(event: int) -> None:
    """Kill this process at so many file events from now."""
    left = event

    def watch(name: str, args: tuple[Any, ...]) -> None:
        nonlocal left
        writes = name == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or name in WRITES:
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def _verdict(folder: Path, words: str, expected: dict[str, str], moment: str) -> str:
    """Return what a killed command left, and whether it runs again."""
    left = _written(folder)
    verdict = "nothing left"
    if left == expected:
        verdict = "whole"
    elif any(path.startswith(_TARGET) for path in left):
        verdict = "HALF"
    if verdict == "whole":
        return verdict
    code = _run(folder, words, lambda: None)
    again = _written(folder)
    if code or again != expected:
        verdict = "NOT AGAIN"
    if verdict.isupper():
        print(f"{words.split()[0]} killed at {moment}: {verdict}, left {sorted(left)}", flush=True)
    return verdict


def _written(folder: Path) -> dict[str, str]:
    """Return a hash of every file in a folder, but those of hidden folders of processes."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not name.startswith("."):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


if __name__ == "__main__":
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
    main()
