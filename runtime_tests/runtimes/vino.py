"""OpenVINO on the processor: in float32, and in bfloat16 as it does by itself where it can."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ffmerge.errors import NotInstalled
from ffmerge.models.probe import Array
from ffmerge.runtime_tests.runtimes.base import Runtime, failing

ENGINE = "OpenVINO"


@dataclass(frozen=True)
class VinoSession:
    """A request to a model that OpenVINO compiled."""

    request: Any
    used: str
    device: str

    def run(self, names: Sequence[str], feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Return the named outputs."""

        def infer() -> dict[str, Array]:
            results = self.request.infer(dict(feeds))
            return {name: results[name] for name in names}

        outputs: dict[str, Array] = failing(ENGINE, "run", infer)
        return outputs


def _start(hint: str, model: Path | bytes, level: str, threads: int) -> VinoSession:
    core = _core()
    if hint == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise NotInstalled(
            "OpenVINO was not used in bfloat16: this processor has no such products."
        )
    options = {"INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY"}
    if threads:
        options["INFERENCE_NUM_THREADS"] = str(threads)
    source = model if isinstance(model, bytes) else str(model)

    def compiled() -> Any:
        return core.compile_model(core.read_model(source), "CPU", options)

    loaded = failing(ENGINE, "load", compiled)
    devices = "+".join(loaded.get_property("EXECUTION_DEVICES"))
    precision = loaded.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    return VinoSession(loaded.create_infer_request(), f"{ENGINE} {devices} {precision}", "cpu")


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
