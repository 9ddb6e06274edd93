"""``share`` on the backend tests that come with onnx: does every file still load and compute?

``python benchmarks/onnx_suite.py [--only NAME] [--json FILE]`` takes every test model that ONNX
Runtime loads, brings it through ``share`` as it is, in fewer bits and to other opsets, and runs the
result on the test's own inputs; where ONNX Runtime does not run the test as it is (it takes no
bfloat16 from numpy), the result is only loaded. Files are shared in child processes: one that dies
is counted. Prints a table, and every file that is not right.
"""

import argparse
import json
import multiprocessing
import pickle
import tempfile
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import numpy_helper

from ffmerge.config import ShareConfig
from ffmerge.errors import FfmergeError
from ffmerge.passes.graph.run import share_file

VARIANTS = {
    "fp32": ShareConfig(),
    "fp16": ShareConfig(dtype="fp16"),
    "int8": ShareConfig(dtype="int8"),
    "int4": ShareConfig(dtype="int4"),
    "opset 17": ShareConfig(opset=17),
    "opset 21": ShareConfig(opset=21),
}
CHUNK = 40  # tests of one child process
# Largest difference over the largest output that each may have: of float16 its own rounding, some
# roundings long; of codes a half step, and what is computed from it.
BOUNDS = {"fp32": 1e-6, "opset 17": 1e-6, "opset 21": 1e-6, "fp16": 2e-2, "int8": 5e-2, "int4": 0.3}


def main() -> None:
    """Run all and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="part of the names of the tests")
    parser.add_argument("--json", type=Path, help="where the figures go")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        names = write_tests(Path(folder), arguments.only)
        found: dict[str, dict[str, str]] = {}
        for start in range(0, len(names), CHUNK):
            found |= in_child(Path(folder), names[start : start + CHUNK])
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for name, results in sorted(found.items()):
        for variant, verdict in results.items():
            kind = verdict.partition(":")[0]
            counts[variant][kind] += 1
            if kind in ("WRONG", "DOES NOT LOAD", "FAULT", "DIED"):
                print(f"{name}, {variant}: {verdict}")
    for variant, counted in counts.items():
        print(f"{variant:9}", ", ".join(f"{kind} {count}" for kind, count in counted.most_common()))
    if arguments.json:
        about = {"onnx": onnx.__version__, "onnxruntime": ort.__version__, "tests": len(found)}
        figures = {"versions": about, "counts": counts}
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


def write_tests(folder: Path, only: str) -> list[str]:
    """Write every test's model and inputs; return their names."""
    from onnx.backend.test.case import model, node
    from onnx.backend.test.loader import load_model_tests

    names: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = [*node.collect_testcases(None), *model.collect_testcases()]
    for kind in ("pytorch-converted", "pytorch-operator", "simple"):
        cases += load_model_tests(kind=kind)
    for case in cases:
        if only not in case.name or case.name in names:
            continue
        own = folder / case.name
        own.mkdir(exist_ok=True)
        if case.model_dir:
            tested, feeds = stored_test(Path(case.model_dir))
        elif case.model is None or not case.data_sets:
            continue  # to be fetched
        else:
            tested, feeds = case.model, list(case.data_sets[0][0])
        names_of_inputs = [value.name for value in tested.graph.input]
        inputs = dict(zip(names_of_inputs, feeds, strict=False))
        onnx.save(tested, own / "model.onnx")
        (own / "inputs.pickle").write_bytes(pickle.dumps(inputs))
        names.append(case.name)
    return names


def stored_test(folder: Path) -> tuple[Any, list[Any]]:
    """Return model and inputs of a test that lies in a folder."""
    model = onnx.load(folder / "model.onnx")
    feeds: list[Any] = []
    files = sorted(folder.glob("test_data_set_0/input_*.pb"), key=lambda p: int(p.stem[6:]))
    for file in files:
        kind = model.graph.input[len(feeds)].type.WhichOneof("value")
        feeds.append(PARSED[kind](file.read_bytes()))
    return model, feeds


def tensor_of(content: bytes) -> Any:
    """Return a serialized tensor as an array."""
    tensor = onnx.TensorProto()
    tensor.ParseFromString(content)
    return numpy_helper.to_array(tensor)


def sequence_of(content: bytes) -> Any:
    """Return a serialized sequence as a list."""
    sequence = onnx.SequenceProto()
    sequence.ParseFromString(content)
    return numpy_helper.to_list(sequence)


def optional_of(content: bytes) -> Any:
    """Return a serialized optional value, None where there is none."""
    optional = onnx.OptionalProto()
    optional.ParseFromString(content)
    return numpy_helper.to_optional(optional)


PARSED = {"tensor_type": tensor_of, "sequence_type": sequence_of, "optional_type": optional_of}


def in_child(folder: Path, names: list[str]) -> dict[str, dict[str, str]]:
    """Return the verdicts of some tests; where the child dies, one at a time tells which."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as pool:
        try:
            return dict(pool.submit(check_all, folder, names).result())
        except BrokenProcessPool:
            if len(names) == 1:
                return {names[0]: {"all": "DIED"}}
    found = {}
    for name in names:
        found |= in_child(folder, [name])
    return found


def check_all(folder: Path, names: list[str]) -> list[tuple[str, dict[str, str]]]:
    """Return the verdict of every variant, of the tests that ONNX Runtime loads as they are."""
    checked = []
    for name in names:
        feeds = pickle.loads((folder / name / "inputs.pickle").read_bytes())
        try:
            before = session(folder / name / "model.onnx")
        except Exception:  # ONNX Runtime's errors have no common class of their own
            continue
        try:
            expected = before.run(None, feeds)
        except Exception:
            expected = None
        checked.append((name, dict(check(folder / name, feeds, expected))))
    return checked


def check(folder: Path, feeds: dict[str, Any], expected: Any) -> Iterator[tuple[str, str]]:
    """Yield the verdict on each variant of one model."""
    for variant, config in VARIANTS.items():
        target = folder / f"{variant}.onnx"
        try:
            share_file(folder / "model.onnx", target, config, load=False)
        except FfmergeError as error:
            yield variant, f"refused: {error}"
            continue
        except Exception as error:
            yield variant, f"FAULT: {type(error).__name__} {error}"
            continue
        try:
            after = session(target)
            got = None if expected is None else after.run(None, feeds)
        except Exception as error:
            yield variant, f"DOES NOT LOAD: {' '.join(str(error).split())[:200]}"
            continue
        if expected is None:
            yield variant, "loads"
        else:
            yield variant, verdict(expected, got, BOUNDS[variant])


def session(path: Path) -> Any:
    """Open a file so that it gives the same in every run."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def verdict(expected: list[Any], got: list[Any], bound: float) -> str:
    """Say whether outputs are equal, close, or wrong."""
    worst = 0.0
    for one, other in zip(flat(expected), flat(got), strict=True):
        if not isinstance(one, np.ndarray) or one.dtype.kind not in "fc":
            if not np.array_equal(one, other):
                return "WRONG: values that are no floats differ"
            continue
        if one.shape != other.shape:
            return f"WRONG: shape {other.shape}, not {one.shape}"
        if one.tobytes() == other.tobytes():
            continue
        one, other = one.astype(np.float64), other.astype(np.float64)
        finite = np.isfinite(one)
        if not np.array_equal(one[~finite], other[~finite], equal_nan=True):
            return "WRONG: infinite or no numbers differ"
        one, other = one[finite], other[finite]
        largest = np.abs(one).max(initial=1e-6)
        worst = max(worst, float(np.abs(one - other).max(initial=0) / largest))
    if worst == 0:
        return "bit-equal"
    if worst <= bound:
        return "close"
    return f"WRONG: off by {worst:.2g} of the largest"


def flat(values: list[Any]) -> Iterator[Any]:
    """Yield outputs, of sequences their elements."""
    for value in values:
        if isinstance(value, list):
            yield from flat(value)
        else:
            yield value


if __name__ == "__main__":
    main()
