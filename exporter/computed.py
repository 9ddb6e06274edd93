"""Weights that PyTorch computes from others in every pass, as a weight norm does, as what they are.

``exporter/torch_onnx.py`` translates a model in :func:`computed_once`: a graph then holds the
weight, which is shared and quantized like any, and computes nothing of it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.utils import parametrize


@contextmanager
def computed_once(model: Any) -> Iterator[None]:
    """Let every weight of the model be a parameter of its own name for the length of the block."""
    found = [module for module in model.modules() if parametrize.is_parametrized(module)]
    whole = [(module, type(module), module.parametrizations) for module in found]
    for module, kind, made_of in whole:
        values = {name: getattr(module, name).detach() for name in made_of}
        del module.parametrizations
        module.__class__ = kind.__bases__[0]  # PyTorch made a class that computes them
        for name, value in values.items():
            module.register_parameter(name, nn.Parameter(value, requires_grad=False))
    try:
        yield
    finally:
        for module, kind, made_of in whole:
            for name in made_of:
                delattr(module, name)
            module.__class__ = kind
            module.parametrizations = made_of
