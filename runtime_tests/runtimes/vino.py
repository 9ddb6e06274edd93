"""OpenVINO on the processor: in float32, and in bfloat16 as it does by itself where it can."""

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ffmerge.errors import NotInstalled
from ffmerge.models.probe import Array
from ffmerge.runtime_tests.runtimes.base import Runtime, Session, failing

ENGINE = "OpenVINO"


def _start(hint: str, model: Path | bytes, level: str, threads: int) -> Session:
    core = _core()
    if hint == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise NotInstalled(
            "OpenVINO was not used in bfloat16: this processor has no such products."
        )
    options = {"INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY"}
    if threads:
        options["INFERENCE_NUM_THREADS"] = str(threads)
    source: Any = model
    if isinstance(model, Path):
        source = str(model)

    def compiled() -> Any:
        return core.compile_model(core.read_model(source), "CPU", options)

    loaded = failing(ENGINE, "load", compiled)
    request = loaded.create_infer_request()

    def infer(names: Sequence[str], feeds: Mapping[str, Array]) -> list[Array]:
        results = request.infer(feeds)
        return [results[name] for name in names]

    devices = "+".join(loaded.get_property("EXECUTION_DEVICES"))
    precision = loaded.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    return Session(ENGINE, f"{ENGINE} {devices} {precision}", "cpu", infer)


def _core() -> Any:
    """Return OpenVINO's core, loaded without its telemetry: it takes a missing package for a no."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    try:
        import openvino
    except ModuleNotFoundError as error:
        raise NotInstalled(
            "OpenVINO was not used, it is not installed: pip install 'ffmerge[openvino]'."
        ) from error
    return openvino.Core()


RUNTIMES = tuple(
    Runtime(name, f"{ENGINE} CPU {precision}", partial(_start, hint), arithmetic=arithmetic)
    for name, hint, precision, arithmetic in (
        ("openvino", "f32", "f32", "fp32"),
        ("openvino-bf16", "bf16", "bf16", "bf16"),
    )
)
