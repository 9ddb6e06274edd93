"""ONNX Runtime, one runtime for each of its execution providers."""

import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime as ort

from ffmerge.errors import NotInstalled
from ffmerge.models.probe import Array
from ffmerge.runtime_tests.runtimes.base import LEVEL, Placement, Runtime, failing

ENGINE = "ONNX Runtime"
_LEVELS = {
    "disabled": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    LEVEL: ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
_SHAPES = {"int64", "bool"}  # what shapes, positions and masks are made of
_COPIES = ("Memcpy", "Constant")


@dataclass(frozen=True)
class Provider:
    """An execution provider by ONNX Runtime's name, the device it uses, and its options."""

    name: str
    device: str
    install: str
    options: tuple[tuple[str, str], ...] = ()

    def start(self, model: Path | bytes, level: str, threads: int) -> "OrtSession":
        """Return a session; it is for the caller to look at what it really uses."""
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        options.graph_optimization_level = _LEVELS[level]
        return OrtSession(self._create(model, options), self.device)

    def place(
        self, model: Path, names: Sequence[str], feeds: Mapping[str, Array]
    ) -> Placement | None:
        """Return where the nodes of a model ran, from ONNX Runtime's own profile of one run."""
        with tempfile.TemporaryDirectory(prefix="ffmerge-") as folder:
            options = ort.SessionOptions()
            options.log_severity_level = 3
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(folder) / "run")
            session = OrtSession(self._create(model, options), self.device)
            session.run(names, feeds)
            events = json.loads(Path(session.session.end_profiling()).read_text())
        return _placement(events)

    def _create(self, model: Path | bytes, options: Any) -> Any:
        if self.name not in ort.get_available_providers():
            raise NotInstalled(
                f"{self.name} was not used, it is not in this ONNX Runtime ({ort.__version__}): "
                f"install {self.install}."
            )
        source = model if isinstance(model, bytes) else str(model)
        providers = [(self.name, dict(self.options))]
        return failing(
            ENGINE, "load", lambda: ort.InferenceSession(source, options, providers=providers)
        )


@dataclass(frozen=True)
class OrtSession:
    """A session of ONNX Runtime on ``device``."""

    session: Any
    device: str

    @property
    def used(self) -> str:
        """Return the provider that takes nodes first; a session that fell back names the CPU."""
        return str(self.session.get_providers()[0])

    def run(self, names: Sequence[str], feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Return the named outputs."""
        outputs = failing(ENGINE, "run", partial(self.session.run, list(names), dict(feeds)))
        return dict(zip(names, outputs, strict=True))


def _placement(events: Sequence[Mapping[str, Any]]) -> Placement:
    """Count each node of a profile once, in a subgraph that ran often too."""
    nodes = dict(_nodes(events))
    return Placement(
        *(
            dict(Counter(part for part, computes in nodes.values() if computes is wanted))
            for wanted in (True, False)
        )
    )


def _nodes(events: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Any, tuple[str, bool]]]:
    """Yield of each event that is a node's run its identity, its provider, if it computes."""
    for event in events:
        found = event.get("args", {})
        if event.get("cat") != "Node" or "provider" not in found:
            continue
        kinds = {kind for shaped in found.get("output_type_shape", []) for kind in shaped}
        computes = not found["op_name"].startswith(_COPIES) and not kinds <= _SHAPES
        yield (event["name"], found.get("node_index")), (found["provider"], computes)


def _runtime(name: str, provider: Provider, arithmetic: str = "fp32") -> Runtime:
    levels = tuple(_LEVELS) if name == "cpu" else (LEVEL,)
    return Runtime(name, provider.name, provider.start, levels, arithmetic, provider.place)


_GPU = "onnxruntime-gpu[cuda,cudnn] in place of onnxruntime, on a machine with an NVIDIA GPU"
_CUDA = partial(Provider, "CUDAExecutionProvider", "cuda:0", _GPU)
RUNTIMES = (
    _runtime("cpu", Provider("CPUExecutionProvider", "cpu", "onnxruntime")),
    # TensorFloat-32 keeps 10 bits of the mantissa, too few to tell parity from a fault.
    _runtime("cuda", _CUDA((("use_tf32", "0"),))),
    _runtime("cuda-tf32", _CUDA((("use_tf32", "1"),)), "tf32"),
    _runtime("webgpu", Provider("WebGpuExecutionProvider", "webgpu", "onnxruntime-ep-webgpu")),
)
