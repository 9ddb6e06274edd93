"""Checkpoints whose weights are stored in fewer bits by another tool.

``checkpoint.load`` calls :func:`refuse_unreadable` before weights are read and :func:`plain` after:
everything behind it merges and exports weights of 16 or 32 bits.
"""

from pathlib import Path
from typing import Any

from ffmerge.errors import InputError, first_line


def method_of(config: Any) -> str | None:
    """Return the method by which ``config.json`` says that weights are quantized; None: none is."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    if not isinstance(settings, dict):
        settings = settings.to_dict()
    method = settings.get("quant_method")
    if method is None and (settings.get("load_in_8bit") or settings.get("load_in_4bit")):
        method = "bitsandbytes"
    return str(getattr(method, "value", method))


def refuse_unreadable(config: Any, folder: Path) -> None:
    """Raise InputError where transformers cannot read the quantized weights on this machine."""
    method = method_of(config)
    if method is None:
        return
    from transformers.quantizers import AutoHfQuantizer

    try:
        quantizer = AutoHfQuantizer.from_config(config.quantization_config, pre_quantized=True)
        quantizer.validate_environment(device_map=None)
    except Exception as error:  # a library that is missing, a device, a method that is unknown
        raise InputError(
            f"{folder} is quantized by {method}, which cannot be read here: {first_line(error)}"
        ) from error


def plain(model: Any, folder: Path) -> Any:
    """Return a model with weights in 16 or 32 bits.

    Raises:
        InputError: its quantization has no way back.
    """
    if getattr(model, "hf_quantizer", None) is None:
        return model
    method = method_of(model.config)
    try:
        model = model.dequantize()
    except Exception as error:  # NotImplementedError, and whatever a library raises
        raise InputError(
            f"{folder} is quantized by {method}, which transformers cannot undo "
            f"({first_line(error)}): give the checkpoint that was quantized."
        ) from error
    del model.hf_quantizer
    return model
