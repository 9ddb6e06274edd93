"""The engines behind one interface: what is asked for is what runs, or it is said why not."""

import json
import os
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn, cast

import numpy as np
import onnxruntime as ort
import pytest
import tiny
from packages import linear_package
from rich.console import Console

from ffmerge.__main__ import main
from ffmerge.config import ValidateConfig
from ffmerge.errors import InputError, NotInstalled, RuntimeCheckError
from ffmerge.exporter.package import export
from ffmerge.models.codes import Form
from ffmerge.runtime_tests.footprint import TRIVIAL, measure_footprint
from ffmerge.runtime_tests.results import ran_elsewhere
from ffmerge.runtime_tests.runtimes.base import Placement, Runtime
from ffmerge.runtime_tests.runtimes.ort import CPU, _placement
from ffmerge.runtime_tests.runtimes.registry import RUNTIMES, find_runtime
from ffmerge.runtime_tests.tolerance import ARITHMETIC, TOLERANCES, for_dtype, row_of
from ffmerge.runtime_tests.validate import validate
from ffmerge.tables import validation_table

EYE, ZEROS = np.eye(4, dtype=np.float32), np.zeros(4, np.float32)
CUDA_HERE = "CUDAExecutionProvider" in ort.get_available_providers()


@pytest.fixture
def package(tmp_path: Path) -> Path:
    linear_package(tmp_path / "package", EYE, ZEROS)
    return tmp_path / "package"


def test_the_level_reaches_the_engine(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    levels = []
    session = ort.InferenceSession

    def create(model: Any, options: Any, *given: Any, **more: Any) -> Any:
        levels.append(options.graph_optimization_level)
        return session(model, options, *given, **more)

    monkeypatch.setattr(ort, "InferenceSession", create)
    for level in find_runtime("cpu").levels:
        find_runtime("cpu").open(package / "model.onnx", level)
    assert levels == [
        ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
        ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
        ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    ]


def test_unknown_names_are_input_errors() -> None:
    with pytest.raises(InputError, match="unknown provider 'tpu'"):
        find_runtime("tpu")
    with pytest.raises(InputError, match="unknown optimization 'max'"):
        find_runtime("cpu").open(TRIVIAL, "max")
    with pytest.raises(InputError, match="no tolerance for dtype 'fp8'"):
        for_dtype("fp8")


@pytest.mark.parametrize("name", ["cuda", "cuda-tf32"])
def test_a_provider_that_is_absent_was_not_used(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(NotInstalled, match=r"CUDAExecutionProvider was not used.*onnxruntime-gpu"):
        find_runtime(name).open(TRIVIAL)


def test_a_silent_fall_back_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A build with CUDA on a machine without it lists CUDA and then runs on the CPU."""
    on_cpu = ort.InferenceSession(TRIVIAL, providers=["CPUExecutionProvider"])
    listed = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(ort, "get_available_providers", lambda: listed)
    monkeypatch.setattr(ort, "InferenceSession", lambda *args, **options: on_cpu)
    with pytest.raises(
        RuntimeCheckError, match=r"not used.*fell back to CPUExecutionProvider"
    ) as e:
        find_runtime("cuda").open(TRIVIAL)
    assert not isinstance(e.value, NotInstalled)  # it is a failure even where all are tried


@pytest.mark.parametrize(("name", "tf32"), [("cuda", "0"), ("cuda-tf32", "1")])
def test_tensorfloat_is_on_only_where_it_is_asked_for(
    name: str, tf32: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked, loaded = [], []
    monkeypatch.setattr(ort, "preload_dlls", lambda: loaded.append(print("libcublas not found")))
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(
        ort, "InferenceSession", lambda model, options, *given, **more: asked.append((*given, more))
    )
    with pytest.raises(AttributeError):  # what was made is no session
        find_runtime(name).open(TRIVIAL)
    fall_back_off = {"enable_fallback": 0}
    options = {"use_tf32": tf32, "arena_extend_strategy": "kSameAsRequested"}
    assert asked == [([("CUDAExecutionProvider", options)], fall_back_off)]
    assert loaded == [None] and not capsys.readouterr().out  # where --json goes


@pytest.mark.parametrize("name", ["cuda", "cuda-tf32"])
def test_cuda_computes_what_pytorch_computed(name: str, tmp_path: Path) -> None:
    if not CUDA_HERE:
        missing = f"no CUDA in this ONNX Runtime {ort.__version__}: install onnxruntime-gpu"
        (pytest.fail if os.environ.get("FFMERGE_CUDA") == "required" else pytest.skip)(missing)
    export(tiny.gpt2(layers=2), tmp_path / "gpt2")
    result = validate(tmp_path / "gpt2", ValidateConfig(providers=(name,)))
    assert result.ok, result.providers[0].reason


@pytest.mark.skipif(CUDA_HERE, reason="this ONNX Runtime has CUDA: the test above runs it")
def test_cuda_on_a_machine_without_it_exits_with_1(
    package: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["validate", str(package), "--provider", "cuda", "--json"])
    assert end.value.code == 1
    result = json.loads(capsys.readouterr().out)
    (cuda,) = result["providers"]
    assert (result["ok"], cuda["ok"], cuda["used"], cuda["outputs"]) == (False, False, None, [])
    assert "CUDAExecutionProvider was not used" in cuda["reason"]


def test_the_table_says_why_a_runtime_failed_whose_outputs_are_right(package: Path) -> None:
    result = validate(package)
    (cpu,) = result.providers
    reason = "GPU ran 1 of 2 compute nodes"
    failed = replace(result, providers=(replace(cpu, stopped=reason),))
    absent = replace(failed, not_tested={"wasm": "install ffmerge[browser]"})
    console = Console(width=200, record=True, file=StringIO())
    console.print(validation_table(absent))
    shown = console.export_text()
    assert "NOT ok" in shown and reason in shown and "Memory, of files" in shown
    assert "not tested: install ffmerge[browser]" in shown  # brackets are no markup
    nothing_ran = replace(failed, providers=(replace(cpu, footprint=None),))
    console.print(validation_table(nothing_ran))
    assert "Memory" not in console.export_text().split("Where it was run")[0]


def test_all_lists_what_is_not_installed_and_does_not_fail(
    package: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(model: object, level: str, threads: int) -> NoReturn:
        raise NotInstalled("install it")

    for name in set(RUNTIMES) - {"cpu"}:
        monkeypatch.delitem(RUNTIMES, name)
    monkeypatch.setitem(RUNTIMES, "missing", Runtime("missing", "MissingProvider", refuse))
    with pytest.raises(SystemExit) as end:
        main(["validate", str(package), "--all", "--json"])
    assert end.value.code in (None, 0)
    result = json.loads(capsys.readouterr().out)
    assert [p["name"] for p in result["providers"]] == ["cpu"]
    assert result["not_tested"] == [
        {"name": "missing", "requested": "MissingProvider", "reason": "install it"}
    ]
    asked = validate(package, ValidateConfig(providers=("missing",), installed=True))
    assert not asked.ok  # asked for by name, it is a failure
    assert [(p.name, p.ok) for p in asked.providers] == [("missing", False), ("cpu", True)]


def test_nodes_are_counted_once_and_shapes_apart() -> None:
    def event(name: str, op: str, provider: str, *kinds: str, index: str = "0") -> dict:  # type: ignore[type-arg]
        shapes = [{kind: [1]} for kind in kinds]
        found = {"op_name": op, "provider": provider, "output_type_shape": shapes}
        return {"cat": "Node", "name": name, "args": {**found, "node_index": index}}

    events = [
        {"cat": "Session", "name": "model_run", "args": {}},
        *2 * [event("product", "MatMul", "GPU", "float")],  # of two runs
        event("", "Add", "GPU", "float16", index="1"),
        event("", "Add", "GPU", "float16", index="2"),  # another without a name
        event("lookup", "Gather", "CPU", "float"),
        event("codes", "DynamicQuantizeLinear", "CPU", "uint8", "float", "uint8"),
        event("shape", "Shape", "CPU", "int64"),
        event("mask", "And", "CPU", "bool"),
        event("copy", "MemcpyToHost", "GPU", "float"),
    ]
    assert _placement(events) == Placement(
        {"GPU": {"MatMul": 1, "Add": 2}, "CPU": {"Gather": 1, "DynamicQuantizeLinear": 1}},
        {"CPU": 2, "GPU": 1},
    )


def test_what_a_device_holds_is_the_peak_of_its_allocator() -> None:
    def event(provider: str, peak: str) -> dict[str, object]:
        found = {"op_name": "MatMul", "provider": provider, "output_type_shape": [{"float": [1]}]}
        return {"cat": "Node", "name": provider + peak, "args": {**found, "mem_in_use_peak": peak}}

    gpu = _placement([event("GPU", "100"), event("GPU", "300"), event(CPU, "900")])
    assert gpu.device_bytes == 300
    cpu = _placement([event(CPU, "900")])
    assert cpu.device_bytes is None
    two = Placement.total([gpu, cpu, gpu, None])
    assert two == Placement({"GPU": {"MatMul": 4}, CPU: {"MatMul": 3}}, {}, 600)


def test_a_runtime_that_takes_few_nodes_was_not_really_used() -> None:
    good = Placement({"GPU": {"MatMul": 9}, "CPU": {"Gather": 1}}, {"CPU": 50})
    assert ran_elsewhere("GPU", good) is None
    assert ran_elsewhere("GPU", None) is None  # this engine does not tell
    few = Placement({"GPU": {"MatMul": 8}, "CPU": {"Gather": 1}}, {})
    assert ran_elsewhere("GPU", few) == (
        "GPU ran 8 of 9 compute nodes, at least 90% are needed; elsewhere: 1 Gather on CPU"
    )
    assert "0 of 0" in str(ran_elsewhere("GPU", Placement({}, {"CPU": 3})))


def test_the_nodes_of_a_package_are_counted_by_the_engine(package: Path) -> None:
    cost = measure_footprint(package)
    # MatMul and Add; ONNX Runtime makes one Gemm of them
    assert cost.placement == Placement({"CPUExecutionProvider": {"Gemm": 1}}, {})
    assert cost.device == "cpu"


def test_of_runtimes_none_need_be_named_where_all_are_asked_for() -> None:
    assert ValidateConfig(providers=(), installed=True).providers == ()
    with pytest.raises(InputError, match="no runtime is named"):
        ValidateConfig(providers=())


def test_a_package_with_weights_of_2_bits_has_bounds_of_its_own() -> None:
    """Wider in every column than int4's, but for single elements."""
    forms = {"W": Form(4, 64), "V": Form(8, 64)}
    package = SimpleNamespace(dtype="int4", bits=forms)
    assert row_of(cast(Any, package)) == "int4"
    forms["V"] = Form(2, 64)
    wide, narrow = TOLERANCES[row_of(cast(Any, package))], TOLERANCES["int4"]
    assert (wide.atol, wide.rtol, wide.tie) == (narrow.atol, narrow.rtol, narrow.tie)
    for column in ("cosine", "cache", "agreement", "tokens"):
        assert getattr(wide, column) < getattr(narrow, column)
    assert wide.kl > narrow.kl and wide.node > narrow.node


def test_every_bound_leaves_room_above_what_was_measured_but_not_much() -> None:
    for tolerance in (*TOLERANCES.values(), *ARITHMETIC.values()):
        assert tolerance.measured < tolerance.atol < 25 * tolerance.measured


def test_of_package_and_arithmetic_the_looser_bound_counts() -> None:
    assert for_dtype("fp32", "bf16") == ARITHMETIC["bf16"]
    assert for_dtype("int4", "tf32") == TOLERANCES["int4"]
    assert for_dtype("fp32") == for_dtype("fp32", "native") == TOLERANCES["fp32"]
    assert for_dtype("int8", "native") == TOLERANCES["int8"]
    assert for_dtype("fp16", "native") == ARITHMETIC["native"]  # the evaluator adds in float16
    both = for_dtype("int8-dynamic", "bf16")
    assert (both.atol, both.rtol) == (
        TOLERANCES["int8-dynamic"].atol,
        TOLERANCES["int8-dynamic"].rtol,
    )
    assert (both.node, both.tokens, both.real) == (TOLERANCES["int8-dynamic"].node, 0.8, True)
    assert {runtime.arithmetic for runtime in RUNTIMES.values()} <= set(ARITHMETIC)
