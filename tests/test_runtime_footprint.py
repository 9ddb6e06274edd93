import json
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from onnx import helper
from packages import CASES, linear_package, write_package

from ffmerge.errors import RuntimeCheckError
from ffmerge.models.codes import Form
from ffmerge.models.manifest import Manifest, reference_key
from ffmerge.models.probe import InputSpec, Probe
from ffmerge.runtime_tests import footprint
from ffmerge.runtime_tests.footprint import measure_footprint
from ffmerge.runtime_tests.results import sharing
from ffmerge.runtime_tests.runtimes.base import Session
from ffmerge.runtime_tests.runtimes.registry import RUNTIMES, find_runtime

WIDTH = 3162  # 3162 x 3162 float32 are 40 MB
SMALL = 1500  # 9 MB
COPY = 4 * WIDTH * WIDTH

linux = pytest.mark.skipif(
    not Path("/proc/self/smaps_rollup").exists(), reason="this system has no smaps_rollup"
)


def two_products(folder: Path, second: str, width: int = WIDTH, external: bool = True) -> None:
    """Write a package of x W W' where W' is W itself or a second matrix."""
    weight = np.eye(width, dtype=np.float32)
    weights = {"first": weight, second: weight + (second == "second")}
    nodes = [
        helper.make_node("MatMul", ["x", "first"], ["hidden"]),
        helper.make_node("MatMul", ["hidden", second], ["logits"]),
    ]
    probe = Probe((InputSpec("x", "float32", ("batch_size", width)),), CASES)
    reference = {reference_key("model.onnx", 0, "logits"): np.zeros(1, np.float32)}
    write_package(folder, nodes, weights, reference, probe, external)


@pytest.mark.parametrize(("more", "told"), [(2_000, False), (400_000, True)])
def test_sharing_is_told_where_more_than_nodes_is_gone(
    more: int, told: bool, tmp_path: Path
) -> None:
    """Of a few kB that a graph has less than another its memory tells nothing."""
    two_products(tmp_path / "shared", "first", 500)
    after = Manifest.read(tmp_path / "shared")
    files = [replace(f, bytes=f.bytes + more * (f.path == "model.onnx")) for f in after.files]
    before = replace(after, files=tuple(files))
    both = [SimpleNamespace(manifest=m, footprint=None, label="it") for m in (before, after)]
    found = sharing(*both)  # type: ignore[arg-type]
    assert (found is not None) == told
    assert found is None or found.bytes_removed == more


@linux
def test_memory_is_that_of_the_stored_weights(tmp_path: Path) -> None:
    two_products(tmp_path / "shared", "first")
    two_products(tmp_path / "separate", "second")
    shared = measure_footprint(tmp_path / "shared")
    separate = measure_footprint(tmp_path / "separate")
    assert shared.rss_bytes is not None and separate.rss_bytes is not None
    assert shared.anonymous_bytes is not None
    assert COPY <= shared.rss_bytes <= 1.3 * COPY  # measured 1.005
    assert separate.rss_bytes - shared.rss_bytes >= 0.95 * COPY  # measured 1.002
    assert shared.anonymous_bytes <= shared.rss_bytes
    assert (shared.given, shared.threads) == (f"x 1 x {WIDTH}", 1)


@linux
def test_memory_while_it_runs_holds_what_loading_did_not_read(tmp_path: Path) -> None:
    """A weight that stays in its mapped file is in memory once a run has read it."""
    table = {"table": np.ones(COPY // 4, np.float32)}
    nodes = [helper.make_node("Mul", ["x", "table"], ["logits"])]
    probe = Probe((InputSpec("x", "float32", ("batch_size", 1)),), CASES)
    reference = {reference_key("model.onnx", 0, "logits"): np.zeros(1, np.float32)}
    write_package(tmp_path / "mapped", nodes, table, reference, probe)
    cost = measure_footprint(tmp_path / "mapped")
    assert cost.rss_bytes is not None and cost.running_bytes is not None
    assert cost.rss_bytes < 0.1 * COPY  # measured 0.005
    assert cost.running_bytes - cost.rss_bytes >= COPY  # measured 2.06, the output with it


def test_sharing_is_not_told_of_other_bits(tmp_path: Path) -> None:
    two_products(tmp_path / "it", "second", 500)
    before = Manifest.read(tmp_path / "it")
    files = [replace(f, bytes=f.bytes // 4) for f in before.files]
    cost = SimpleNamespace(rss_bytes=10)
    found = []
    four, two = {"W": Form(4, 32), "V": Form(4, 32)}, {"W": Form(2, 32)}  # V is W once it is merged
    for dtype, bits, fewer in (
        (before.dtype, {}, {}), ("int8", {}, {}),
        (before.dtype, four, {"W": Form(4, 64)}), (before.dtype, four, two),
        (before.dtype, {}, two), (before.dtype, {}, four),
    ):  # fmt: skip
        after = replace(before, files=tuple(files), dtype=dtype, bits=fewer)
        given = (replace(before, bits=bits), after)
        both = [SimpleNamespace(manifest=m, footprint=cost, label="it") for m in given]
        kept = sharing(*both)  # type: ignore[arg-type]
        assert kept is not None and kept.resident_saved == 0
        found.append(kept.fraction)
    assert found == [0, None, 0, None, None, 0]


def test_the_sizes_of_a_run_are_told_of_a_number_too() -> None:
    ids, past = np.zeros((1, 8)), np.zeros((1, 2, 3, 4))
    assert footprint._sizes({"ids": ids}) == "ids 1 x 8"
    told = footprint._sizes({"flag": np.array(True), "past_key_values.0.key": past})
    assert told == "flag, past_key_values.0.key 1 x 2 x 3 x 4"


@linux
def test_validate_tells_what_part_of_the_removed_bytes_is_gone_from_memory(
    tmp_path: Path, command: Any
) -> None:
    shared, separate = tmp_path / "shared", tmp_path / "separate"
    two_products(shared, "first")
    two_products(separate, "second")
    _, out, _ = command("validate", shared, "--against", separate, "--json")
    kept, memory = json.loads(out)["sharing"], json.loads(out)["providers"][0]["memory"]
    sizes = [sum(f.stat().st_size for f in p.glob("model.onnx*")) for p in (separate, shared)]
    assert (kept["against"], kept["bytes_removed"]) == ("separate", sizes[0] - sizes[1])
    assert COPY <= kept["bytes_removed"] < COPY + 1000
    assert kept["resident_saved"] == kept["fraction"] * kept["bytes_removed"]
    assert 0.95 < kept["fraction"] < 1.05  # measured 1.002
    assert memory["file_bytes"] == memory["rss_bytes"] - memory["anonymous_bytes"]
    page = (shared / "report.html").read_text()
    assert "Sharing kept" in page and "separate" in page
    assert command("validate", shared, "--json")[1].count('"sharing": null') == 1

    for target, other, said in (
        (separate, shared, "is not larger than"),
        (shared, tmp_path, "is no package, as it holds no ffmerge.json: ffmerge export makes one"),
    ):
        code, _, err = command("validate", target, "--against", other)
        assert code == 2 and said in " ".join(err.split())


def test_a_validation_is_kept_if_its_original_does_not_run(tmp_path: Path, command: Any) -> None:
    two_products(tmp_path / "shared", "first", 8)
    two_products(tmp_path / "broken", "second", 64)
    (tmp_path / "broken" / "model.onnx").write_bytes(b"no graph")
    code, _, err = command("validate", tmp_path / "shared", "--against", tmp_path / "broken")
    assert code == 2 and "broken" in err, err
    found = json.loads((tmp_path / "shared" / "validation.json").read_text())
    assert found["providers"][0]["memory"]["rss_bytes"] is not None and found["sharing"] is None


@linux
def test_memory_that_the_parser_freed_is_not_counted(tmp_path: Path) -> None:
    two_products(tmp_path / "inline", "second", SMALL, external=False)
    cost = measure_footprint(tmp_path / "inline")
    assert cost.rss_bytes is not None
    size = 2 * 4 * SMALL * SMALL
    assert size <= cost.rss_bytes <= 1.1 * size  # measured 1.01, and 1.51 without the trim


def test_latency_is_measured_on_a_fixed_number_of_threads(tmp_path: Path) -> None:
    linear_package(tmp_path / "package", np.eye(4, dtype=np.float32), np.zeros(4, np.float32))
    cost = measure_footprint(tmp_path / "package")
    assert cost.threads == 1
    assert cost.runs == footprint.RUNS
    assert 0 < cost.median_ms <= cost.p95_ms
    assert cost.first_ms > 0
    assert 0 < cost.load_s < 5


def test_batch_is_one_whatever_the_probe_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    linear_package(
        tmp_path / "package",
        np.eye(4, dtype=np.float32),
        np.zeros(4, np.float32),
        cases=({"batch_size": 3},),
    )
    shapes = set()
    run = Session.run

    def spy(session, names, feeds):  # type: ignore[no-untyped-def]
        shapes.add(feeds["x"].shape)
        return run(session, names, feeds)

    monkeypatch.setattr(Session, "run", spy)
    footprint._measure_here(tmp_path / "package", "onnx", "cpu", 1)
    assert shapes == {(1,), (1, 4)}  # the trivial model's, then the package's


def test_tokens_per_second_are_those_of_the_graph_with_a_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that only running advances: 100 ms for the encoder, 20 ms for the decoder."""
    now = 0.0

    def run(session, names, feeds):  # type: ignore[no-untyped-def]
        nonlocal now
        now += 0.02 if "past_key_values.0.key" in feeds else 0.1

    monkeypatch.setattr(Session, "run", run)
    monkeypatch.setattr(footprint, "time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setitem(RUNTIMES, "cpu", replace(find_runtime("cpu"), profile=lambda *of: None))
    weights = np.eye(4, dtype=np.float32), np.zeros(4, np.float32)
    manifest = linear_package(tmp_path / "one", *weights)
    assert footprint._measure_here(tmp_path / "one", "onnx", "cpu", 1).tokens_per_s is None

    past = InputSpec("past_key_values.0.key", "float32", ("batch_size", 1))
    encoder = manifest.graphs[0]
    decoder = replace(encoder, path="decoder.onnx", probe=Probe((past,), CASES))
    shutil.copyfile(tmp_path / "one" / "model.onnx", tmp_path / "one" / "decoder.onnx")
    replace(manifest, graphs=(encoder, decoder)).write(tmp_path / "one")
    cost = footprint._measure_here(tmp_path / "one", "onnx", "cpu", 1)
    assert cost.tokens_per_s == pytest.approx(50, rel=1e-14)  # measured 8.5e-16
    assert cost.median_ms == pytest.approx(120, rel=1e-14)  # measured 8.3e-16


def test_memory_is_null_with_a_reason_where_the_system_does_not_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    linear_package(tmp_path / "package", np.eye(4, dtype=np.float32), np.zeros(4, np.float32))
    silent = replace(find_runtime("cpu"), resident=lambda: None)
    monkeypatch.setitem(RUNTIMES, "cpu", silent)
    cost = asdict(footprint._measure_here(tmp_path / "package", "onnx", "cpu", 1))
    assert (cost["rss_bytes"], cost["anonymous_bytes"]) == (None, None)
    assert "smaps_rollup" in cost["memory_reason"]
    assert cost["median_ms"] > 0


def test_a_failing_process_is_an_error_with_its_last_line(tmp_path: Path) -> None:
    linear_package(tmp_path / "package", np.eye(4, dtype=np.float32), np.zeros(4, np.float32))
    (tmp_path / "package" / "model.onnx").write_bytes(b"not a model")
    with pytest.raises(RuntimeCheckError, match="failed: ONNX Runtime does not load the model"):
        measure_footprint(tmp_path / "package")


def test_the_room_never_imports_torch() -> None:
    program = """
import sys, importlib
for name in ("runtimes.registry", "tolerance", "parity", "footprint", "validate", "report"):
    importlib.import_module(f"ffmerge.runtime_tests.{name}")
print(sorted({"torch", "transformers"} & set(sys.modules)))
"""
    path = {"PYTHONPATH": ":".join(filter(None, sys.path))}
    child = subprocess.run(
        [sys.executable, "-P", "-c", program], env=path, capture_output=True, text=True, check=True
    )
    assert child.stdout.strip() == "[]"
