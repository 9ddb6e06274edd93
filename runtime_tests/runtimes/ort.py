"""ONNX Runtime, one runtime for each of its execution providers."""

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from types import MappingProxyType
from typing import Any

import onnxruntime as ort

from ffmerge.errors import NotInstalled, RuntimeCheckError
from ffmerge.models.probe import Array
from ffmerge.runtime_tests.runtimes.base import LEVEL, Placement, Runtime, Session, failing

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
Create = Callable[[Path | bytes, Any], Any]  # a session from a model and its options
_REGISTERED: list[str] = []  # a library may be registered once in a process


def _create(
    provider: str, install: str, settings: Mapping[str, str], source: Path | bytes, options: Any
) -> ort.InferenceSession:
    """Return a session of ``provider``; it is for the caller to look at what it really uses.

    ``install`` says what to install where it is missing.

    Raises:
        NotInstalled: it is not in this ONNX Runtime, or the device it needs is not here.
        RuntimeCheckError: the model is not loaded.
    """
    options.log_severity_level = 3
    providers: list[tuple[str, dict[str, str]]] | None = [(provider, dict(settings))]
    if found := _plugged_in(provider):
        options.add_provider_for_devices([found], dict(settings))
        providers = None  # named here, they would replace that
    elif provider not in ort.get_available_providers():
        raise NotInstalled(
            f"{provider} was not used, it is not in this ONNX Runtime ({ort.__version__}): "
            f"install {install}."
        )
    elif provider == CUDA:
        # packages of NVIDIA lie where no loader looks; the session tells what is missing
        with redirect_stdout(StringIO()):
            ort.preload_dlls()
    model: Any = source
    if isinstance(source, Path):
        model = str(source)
    # else an error of a provider, in a run too, is printed and the CPU takes over
    create = partial(ort.InferenceSession, model, options, providers, enable_fallback=0)
    try:
        session: ort.InferenceSession = failing(ENGINE, "load", create)
    except RuntimeCheckError as error:
        if "Failed to get a WebGPU adapter" in str(error):
            raise NotInstalled(f"{provider} was not used: no Vulkan driver works.") from error
        raise
    return session


def _start(create: Create, device: str, model: Path | bytes, level: str, threads: int) -> Session:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.graph_optimization_level = _LEVELS[level]
    session = create(model, options)
    used = str(session.get_providers()[0])  # of a session that fell back, the CPU's
    return Session(ENGINE, used, _device(used, device), session.run)


def _device(used: str, device: str) -> str:
    """Return where a session runs; a device that is plugged in may be the processor."""
    found = _plugged_in(used)
    if found and found.device.type == ort.OrtHardwareDeviceType.CPU:
        return f"{device}, in software"
    return device


def _profile(
    create: Create, model: Path, names: Sequence[str], feeds: Mapping[str, Array]
) -> Placement:
    """Return where the nodes of a model ran, from ONNX Runtime's own profile of one run."""
    with tempfile.TemporaryDirectory(prefix="ffmerge-") as folder:
        options = ort.SessionOptions()
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "run")
        session = create(model, options)
        failing(ENGINE, "run", lambda: session.run(list(names), dict(feeds)))
        events = json.loads(Path(session.end_profiling()).read_text())
    return _placement(events)


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


def _placement(events: Sequence[Mapping[str, Any]]) -> Placement:
    """Return where the nodes of a profile ran, and what providers held of memory."""
    compute: dict[str, Counter[str]] = {}
    other: Counter[str] = Counter()
    held: int | None = None
    for found in _nodes(events):
        part, op = found["provider"], found["op_name"]
        kinds = {kind for shaped in found.get("output_type_shape", []) for kind in shaped}
        if op.startswith(_COPIES) or kinds <= _SHAPES:
            other[part] += 1
        else:
            compute.setdefault(part, Counter())[op] += 1
        if part != CPU and "mem_in_use_peak" in found:
            held = max(held or 0, int(found["mem_in_use_peak"]))
    return Placement({part: dict(ops) for part, ops in compute.items()}, dict(other), held)


def _nodes(events: Sequence[Mapping[str, Any]]) -> Collection[Mapping[str, Any]]:
    """Return what a profile says of each node, once however often it ran."""
    nodes = {}
    for event in events:
        about = event.get("args", {})
        if event.get("cat") == "Node" and "provider" in about:
            nodes[event["name"], about.get("node_index")] = about
    return nodes.values()


def _runtime(
    name: str,
    provider: str,
    device: str,
    install: str,
    settings: Mapping[str, str] = MappingProxyType({}),
    arithmetic: str = "fp32",
) -> Runtime:
    levels: tuple[str, ...] = (LEVEL,)
    if provider == CPU:
        levels = tuple(_LEVELS)
    create = partial(_create, provider, install, settings)
    start, profile = partial(_start, create, device), partial(_profile, create)
    return Runtime(name, provider, start, levels, arithmetic, profile)


_GPU = "onnxruntime-gpu[cuda,cudnn] in place of onnxruntime, on a machine with an NVIDIA GPU"
# By default the memory doubles whenever it is short: 612 MB for 346 MB of weights, tied or not.
_EXACT = {"arena_extend_strategy": "kSameAsRequested"}
RUNTIMES = (
    _runtime("cpu", CPU, "cpu", "onnxruntime"),
    # TensorFloat-32 keeps 10 bits of the mantissa, too few to tell parity from a fault.
    _runtime("cuda", CUDA, "cuda:0", _GPU, {"use_tf32": "0", **_EXACT}),
    _runtime("cuda-tf32", CUDA, "cuda:0", _GPU, {"use_tf32": "1", **_EXACT}, "tf32"),
    # its shaders add float16 numbers in float16
    _runtime("webgpu", WEBGPU, "webgpu", "onnxruntime-ep-webgpu", arithmetic="native"),
)
