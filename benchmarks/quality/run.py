"""How good is merging? Every method and its rivals on the three reference tasks, at equal size.

    python benchmarks/quality/run.py [--seeds 3] [--only methods ...]

A third (k=3) and a half (k=4) of the six feed-forward sublayers of a stack are merged; Marian's
encoder and decoder take the same layers. Calibration examples are drawn anew for each seed, the
window is chosen on validation examples, and every figure is of test examples. Writes
benchmarks/results/quality.json and prints the tables of docs/quality.md (tables.py prints them
again).
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one job, one core
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))

import torch  # noqa: E402
from reference.tasks import REFERENCES  # noqa: E402
from transformers.utils import logging  # noqa: E402

import tables  # noqa: E402
from ffmerge.config import ExportConfig, MergeConfig, RecoverConfig  # noqa: E402
from ffmerge.exporter.package import export  # noqa: E402
from ffmerge.models import checkpoint  # noqa: E402
from ffmerge.models.examples import Examples, from_arrays  # noqa: E402
from ffmerge.passes.graph.audit import audit  # noqa: E402
from ffmerge.passes.weights.merge import choose, merge_  # noqa: E402
from ffmerge.passes.weights.methods import in_place, size_of  # noqa: E402
from ffmerge.passes.weights.recover import clone_sharing_parameters, recover_  # noqa: E402
from ffmerge.runtime_tests.loaded import look  # noqa: E402
from ffmerge.runtime_tests.validate import validate  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "quality.json"
SIZES = {  # calibration, validation, test examples; 16k positions of calibration or more
    "digits": (1900, 1000, 4000),
    "village": (260, 200, 400),
    "numerals": (1000, 300, 600),
}
METHODS = ("average", "copy-anchor", "weights", "permute", "calibrated", "residual", "drop-ffn")
RIVALS = ("drop-layer", "low-rank")
SELECTIONS = ("budget", "budget, fidelity")
STEPS, RATE = 300, 1e-3
TOKENS = 16_384  # positions of the statistics


def splits(name: str, seed: int) -> tuple[Examples, Examples, Examples]:
    """Return calibration examples of a seed, validation and test examples that never change."""
    load, sizes = REFERENCES[name].load, SIZES[name]
    drawn = zip(("calibration", "validation", "test"), (seed, 0, 0), sizes, strict=True)
    return tuple(from_arrays(load(split, s, count=n)) for split, s, n in drawn)


def merged(name: str, k: int, seed: int, method: str) -> Any:
    """Return a merged model, its original and the merge."""
    calibration, validation, _ = splits(name, seed)
    model = checkpoint.load(REFERENCES[name].folder)
    original = clone_sharing_parameters(model)
    return model, original, merge_(model, calibration, _config(k, method), validation)


def _config(k: int, method: str) -> MergeConfig:
    return MergeConfig(k=k, method=method, sync=True, tokens=TOKENS, batch_size=64)


def run(job: tuple[str, ...]) -> dict[str, Any]:
    """Do one job: ``(part, task, k, seed, label)``."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    part, name, k, seed, label = job
    start, spent = time.perf_counter(), time.process_time()
    found: dict[str, Any] = dict(part=part, task=name, k=k, seed=seed, label=label)
    doing = {"recovery": recovered, "selection": selected, "precision": precisions}
    found |= doing.get(part, untuned)(name, k, seed, label)
    print(f"{time.perf_counter() - start:6.0f} s  {job}", file=sys.stderr, flush=True)
    spent = time.process_time() - spent  # of this core, whatever else the machine does
    return {**found, "seconds": time.perf_counter() - start, "cpu_seconds": spent}


def untuned(name: str, k: int, seed: int, label: str) -> dict[str, Any]:
    """Merge by a method, or make the model as small in another way (``rivals.py``)."""
    model, test = checkpoint.load(REFERENCES[name].folder), splits(name, seed)[2]
    metric = REFERENCES[name].metric
    if label == "none":
        return {"parameters": size_of(model)[0], "test": metric(model, test)}
    calibration, validation, _ = splits(name, seed)
    merge, changes = choose(model, calibration, validation, _config(k, label))
    with in_place(model, changes):
        measured = metric(model, test)
    return {
        "parameters": merge.record.parameters_after,
        "window": merge.record.groups[0].layers,
        "windows": [c.value for c in merge.candidates],
        "before": merge.record.metric["before"],
        "test": measured,
    }


def recovered(name: str, k: int, seed: int, label: str) -> dict[str, Any]:
    """Merge by a method, then follow the original for STEPS steps, without labels."""
    model, original, merge = merged(name, k, seed, label)
    start = time.perf_counter()
    config = RecoverConfig(steps=STEPS, learning_rate=RATE, parts="all", seed=seed)
    recover_(model, original, splits(name, seed)[0], config)
    return {
        "parameters": merge.record.parameters_after,
        "window": merge.record.groups[0].layers,
        "tuning": time.perf_counter() - start,
        "test": REFERENCES[name].metric(model, splits(name, seed)[2]),
    }


def selected(name: str, k: int, seed: int, label: str) -> dict[str, Any]:
    """Reach the size of a merge of k layers by joining layers one by one.

    And 1 % more: in several groups more layers keep a scale and a bias of their own.
    """
    calibration, validation, test = splits(name, seed)
    model = checkpoint.load(REFERENCES[name].folder)
    size = merged(name, k, seed, "calibrated")[2].record.bytes_after
    criterion = "fidelity" if "fidelity" in label else "metric"
    config = MergeConfig(budget=f"{1.01 * size:.0f}B", batch_size=64, criterion=criterion)
    merge = merge_(model, calibration, config, validation)
    return {
        "parameters": merge.record.parameters_after,
        "groups": [f"{g.stack} {g.layers}" for g in merge.record.groups],
        "candidates": len(merge.candidates),
        "test": REFERENCES[name].metric(model, test),
    }


def precisions(name: str, k: int, seed: int, label: str) -> dict[str, Any]:
    """Export the unmerged, a calibrated or a residual model and serve it; test metric of ONNX."""
    method, dtype = label.split()
    model = checkpoint.load(REFERENCES[name].folder)
    if method != "none":
        model, _, _ = merged(name, k, seed, method)
    with TemporaryDirectory() as folder:
        config, rows = ExportConfig(dtype=dtype), splits(name, seed)[1]
        package = export(model, Path(folder) / "package", config, data=rows)
        checked = validate(package.path, data=splits(name, seed)[2])
        audited = audit(package.path, look)
        return {
            "bytes": sum(f.bytes for f in package.manifest.files if "onnx" in f.path),
            "parity": checked.ok, "audit": audited.ok,
            "test": {checked.metric.name: checked.metric.value},
        }  # fmt: skip


def jobs(seeds: int, only: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """Yield the jobs."""
    for name in ("digits", "village", "numerals"):
        if "recovery" in only:
            for k in (3, 4):
                for seed in range(seeds):
                    yield "recovery", name, k, seed, "calibrated"
        if "selection" in only:
            for seed in range(seeds):
                for label in SELECTIONS:
                    yield "selection", name, 4, seed, label
        if "precision" in only:
            for method in ("none", "calibrated", "residual"):
                for dtype in ("fp32", "int8", "int4"):
                    yield "precision", name, 3, 0, f"{method} {dtype}"
        if "methods" in only:
            yield "methods", name, 1, 0, "none"
            for k in (3, 4):
                for seed in range(seeds):
                    for method in METHODS:
                        yield "methods", name, k, seed, method
                    for method in RIVALS:
                        yield "rival", name, k, seed, method


def main() -> None:
    """Run all jobs on all cores, keep the results, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parts = ("methods", "recovery", "selection", "precision")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--tasks", nargs="+", choices=tuple(REFERENCES), default=tuple(REFERENCES))
    parser.add_argument("--missing", action="store_true", help="only what has no result yet")
    chosen = parser.parse_args()
    todo = [job for job in jobs(chosen.seeds, chosen.only) if job[1] in chosen.tasks]
    kept = json.loads(RESULTS.read_text())["results"] if RESULTS.is_file() else []
    if chosen.missing:
        todo = [job for job in todo if job not in {_job(r) for r in kept}]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for found in as_completed([pool.submit(run, job) for job in todo]):
            kept = [r for r in kept if _job(r) != _job(found.result())] + [found.result()]
            kept.sort(key=lambda r: todo.index(_job(r)) if _job(r) in todo else -1)
            RESULTS.write_text(json.dumps({"results": kept}, indent=1) + "\n")  # survives a kill
    print(tables.render(kept))


def _job(result: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(result[key] for key in ("part", "task", "k", "seed", "label"))


if __name__ == "__main__":
    main()
