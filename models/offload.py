"""A model that is larger than its device: a block's weights are there while the block runs.

The commands call :func:`offload_` where they would move a model; all else runs the model as before.

Parameters stay where they are, on the processor as pages of the checkpoint's files. What belongs to
a block of a list comes with the block; all else, embeddings and head, for the length of a pass.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from ffmerge.models.sublayer import block_of

_DEVICE = "runs_on"  # attribute of a model that is offloaded


def offload_(model: Any, device: str | torch.device) -> None:
    """Let ``model`` run on ``device``, in place, without moving its parameters there.

    Inputs may lie anywhere, outputs lie on the device. A backward pass computes each block again:
    there is no more than one of them then either. A parameter that lies on the device already is
    used as it is.
    """
    device = torch.device(device)
    setattr(model, _DEVICE, device)
    owned: dict[str, list[nn.Module]] = {"": []}
    for path, module in model.named_modules():
        if module._parameters or module._buffers:
            block = block_of(model, f"{path}.")
            comes_with = ".".join(map(str, block or ()))
            owned.setdefault(comes_with, []).append(module)
    for path, modules in owned.items():
        owner = model.get_submodule(path)
        run = partial(_run_again if path else _run, modules, owner.forward, device)
        setattr(run, "__signature__", inspect.signature(owner.forward))  # noqa: B010
        owner.forward = run


def device_of(model: Any) -> torch.device:
    """Return where a model computes, which need not be where its parameters are."""
    found: torch.device = getattr(model, _DEVICE, None) or next(model.parameters()).device
    return found


def call(model: Any, module: nn.Module, *args: Any) -> Any:
    """Return what a module inside ``model`` gives, where the model computes."""
    device = getattr(model, _DEVICE, None)
    if device is None:
        return module(*args)
    return _run(list(module.modules()), module, device, *args)


def _run_again(modules: Sequence[nn.Module], *given: Any, **kwargs: Any) -> Any:
    """Run; for a backward pass keep no weights, nor what autocast makes of them, but run again."""
    run = partial(_run, modules, *given, **kwargs)
    if not torch.is_grad_enabled():
        return run()
    return checkpoint(run, use_reentrant=False, preserve_rng_state=False)


def _run(
    modules: Sequence[nn.Module], compute: Callable[..., Any], device: torch.device,
    *args: Any, **kwargs: Any,
) -> Any:  # fmt: skip
    """Compute with the modules' own parameters and buffers on the device."""
    home = []  # the dictionary that holds a tensor, its name there, and the tensor
    on_device = {}
    for module in modules:
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    home.append((tensors, name, tensor))
                    on_device[id(tensor)] = _there(tensor, device)
    args, kwargs = tree_map_only(Tensor, lambda x: x.to(device), (args, kwargs))
    try:
        for tensors, name, tensor in home:
            tensors[name] = on_device[id(tensor)]
        return compute(*args, **kwargs)
    finally:
        for tensors, name, tensor in home:
            tensors[name] = tensor


def _there(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device)
