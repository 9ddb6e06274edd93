"""ONNX Runtime sessions on exactly the execution provider that was asked for."""

from dataclasses import dataclass, field
from pathlib import Path

import onnxruntime as ort

from ffmerge.errors import InputError, RuntimeCheckError

LEVELS = ("disabled", "default")


@dataclass(frozen=True)
class Provider:
    """An execution provider by ONNX Runtime's name, the device it uses, and its options."""

    name: str
    device: str
    options: dict[str, str] = field(default_factory=dict)


PROVIDERS = {
    "cpu": Provider("CPUExecutionProvider", "cpu"),
    # TensorFloat-32 keeps 10 bits of the mantissa, too few to tell parity from a fault.
    "cuda": Provider("CUDAExecutionProvider", "cuda:0", {"use_tf32": "0"}),
    "webgpu": Provider("WebGpuExecutionProvider", "webgpu"),
}


def find_provider(provider: str) -> Provider:
    """Return the execution provider of a short name, present in this ONNX Runtime or not."""
    if provider not in PROVIDERS:
        raise InputError(f"unknown provider {provider!r}: choose from {', '.join(PROVIDERS)}.")
    return PROVIDERS[provider]


def open_session(
    model: Path | bytes,
    provider: str = "cpu",
    optimization: str = "default",
    threads: int = 0,
) -> ort.InferenceSession:
    """Return a session that runs on ``provider``; never one that fell back to the CPU.

    ``optimization`` is one of ``LEVELS``; ``threads`` is for one operator, 0 for all cores.

    Raises:
        InputError: the provider or the optimization level is unknown.
        RuntimeCheckError: the provider is absent or was not used, or the model does not load.
    """
    wanted = find_provider(provider)
    if optimization not in LEVELS:
        raise InputError(f"unknown optimization {optimization!r}: choose from {LEVELS}.")
    if wanted.name not in ort.get_available_providers():
        raise RuntimeCheckError(
            f"{wanted.name} is not in this ONNX Runtime ({ort.__version__}): install a build "
            f"that has it, or leave out the provider {provider}."
        )
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    if optimization == "disabled":
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        source = model if isinstance(model, bytes) else str(model)
        session = ort.InferenceSession(source, options, providers=[(wanted.name, wanted.options)])
    except Exception as error:  # ONNX Runtime's errors have no common class of their own
        raise RuntimeCheckError(f"ONNX Runtime does not load the model: {error}") from error
    used = session.get_providers()[0]
    if used != wanted.name:
        raise RuntimeCheckError(
            f"{wanted.name} was asked for and ONNX Runtime fell back to {used}: its libraries "
            f"or its device are missing on this machine."
        )
    return session
