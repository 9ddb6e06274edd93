"""ONNX Runtime, one runtime for each of its execution providers."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import onnxruntime as ort

from ffmerge.errors import NotInstalled, RuntimeCheckError
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
CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
WEBGPU = "WebGpuExecutionProvider"
ALLOWED = "ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER"
_REGISTERED: list[str] = []  # a library may be registered once in a process


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
        options.intra_op_num_threads = threads
        options.graph_optimization_level = _LEVELS[level]
        return self._create(model, options)

    def place(
        self, model: Path, names: Sequence[str], feeds: Mapping[str, Array]
    ) -> Placement | None:
        """Return where the nodes of a model ran, from ONNX Runtime's own profile of one run."""
        with tempfile.TemporaryDirectory(prefix="ffmerge-") as folder:
            options = ort.SessionOptions()
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(folder) / "run")
            session = self._create(model, options)
            session.run(names, feeds)
            events = json.loads(Path(session.session.end_profiling()).read_text())
        return _placement(events)

    def _create(self, model: Path | bytes, options: Any) -> "OrtSession":
        options.log_severity_level = 3
        providers: list[tuple[str, dict[str, str]]] | None = [(self.name, dict(self.options))]
        device = self.device
        if found := _plugged_in(self.name):
            options.add_provider_for_devices([found], dict(self.options))
            providers = None  # named here, they would replace that
            if found.device.type == ort.OrtHardwareDeviceType.CPU:
                device = f"{device}, in software"
        elif self.name not in ort.get_available_providers():
            raise NotInstalled(
                f"{self.name} was not used, it is not in this ONNX Runtime ({ort.__version__}): "
                f"install {self.install}."
            )
        elif self.name == CUDA:
            # packages of NVIDIA lie where no loader looks; the session tells what is missing
            with redirect_stdout(StringIO()):
                ort.preload_dlls()
        source = model if isinstance(model, bytes) else str(model)
        # else an error of a provider, in a run too, is printed and the CPU takes over
        create = partial(ort.InferenceSession, source, options, providers, enable_fallback=0)
        try:
            session = failing(ENGINE, "load", create)
        except RuntimeCheckError as error:
            if "Failed to get a WebGPU adapter" in str(error):
                raise NotInstalled(f"{self.name} was not used: no Vulkan driver works.") from error
            raise
        return OrtSession(session, device)


def _plugged_in(name: str) -> Any:
    """Return the device of a provider that is a package of its own; a GPU before the processor.

    Once registered it is listed as available, but only a device adds it to a session. The
    processor is a device where ONNX Runtime's own variable ``ALLOWED`` is set. None if the
    provider is no such package, or it is not installed.

    Raises:
        NotInstalled: it is, and finds no device.
    """
    if name != WEBGPU:
        return None
    try:
        import onnxruntime_ep_webgpu as plugin
    except ModuleNotFoundError:
        return None
    if not _REGISTERED:
        path = plugin.get_library_path()
        failing(ENGINE, "take", lambda: ort.register_execution_provider_library("webgpu", path))
        _REGISTERED.append(path)
    found = [device for device in ort.get_ep_devices() if device.ep_name == name]
    if not found:
        raise NotInstalled(
            f"{name} was not used: this machine shows no GPU. A Vulkan driver in software is used "
            f"if {ALLOWED}=1 is set."
        )
    return min(found, key=lambda each: each.device.type == ort.OrtHardwareDeviceType.CPU)


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
    """Count each node of a profile once, however often it ran."""
    nodes = {}
    for event in events:
        found = event.get("args", {})
        if event.get("cat") == "Node" and "provider" in found:
            nodes[event["name"], found.get("node_index")] = found
    compute: dict[str, dict[str, int]] = {}
    other: dict[str, int] = {}
    for found in nodes.values():
        part, op = found["provider"], found["op_name"]
        kinds = {kind for shaped in found.get("output_type_shape", []) for kind in shaped}
        copies = op.startswith(_COPIES) or kinds <= _SHAPES
        counts, key = (other, part) if copies else (compute.setdefault(part, {}), op)
        counts[key] = counts.get(key, 0) + 1
    held = [
        int(found["mem_in_use_peak"])
        for found in nodes.values()
        if found["provider"] != CPU and "mem_in_use_peak" in found
    ]
    return Placement(compute, other, max(held, default=None))


def _runtime(name: str, provider: Provider, arithmetic: str = "fp32") -> Runtime:
    levels = tuple(_LEVELS) if name == "cpu" else (LEVEL,)
    return Runtime(name, provider.name, provider.start, levels, arithmetic, provider.place)


_GPU = "onnxruntime-gpu[cuda,cudnn] in place of onnxruntime, on a machine with an NVIDIA GPU"
_CUDA = partial(Provider, CUDA, "cuda:0", _GPU)
# By default the memory doubles whenever it is short: 612 MB for 346 MB of weights, tied or not.
_EXACT = ("arena_extend_strategy", "kSameAsRequested")
RUNTIMES = (
    _runtime("cpu", Provider(CPU, "cpu", "onnxruntime")),
    # TensorFloat-32 keeps 10 bits of the mantissa, too few to tell parity from a fault.
    _runtime("cuda", _CUDA((("use_tf32", "0"), _EXACT))),
    _runtime("cuda-tf32", _CUDA((("use_tf32", "1"), _EXACT)), "tf32"),
    _runtime("webgpu", Provider(WEBGPU, "webgpu", "onnxruntime-ep-webgpu")),
)
