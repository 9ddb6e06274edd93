"""Sizes for which a traced program holds: of any, or of some that its code took for granted.

``exporter/torch_onnx.py`` calls :func:`taken_for_granted` when a program is traced. Where a model's
code branches by a size, as LongT5's pads rows to whole blocks, PyTorch follows one branch and notes
what it went by; in ONNX nothing is left of the note.
"""

from typing import Any

import sympy
import torch

from ffmerge.models.probe import Probe


def taken_for_granted(program: Any, recipe: Probe) -> str | None:
    """Return what a program asks of its sizes that is not so in a case it is compared on, if any.

    Sizes are called as the inputs of the ``recipe`` call them. That a size is not 0 or 1 is asked
    of every program, to tell what is repeated: that holds or does no harm.
    """
    names, environment = _names(program, recipe)
    noted = getattr(environment, "deferred_runtime_asserts", {})
    for each in (each for some in noted.values() for each in some):
        if isinstance(each.expr, sympy.Ne):
            continue
        for sizes in recipe.cases:
            known = {symbol: sympy.Integer(sizes[name]) for symbol, name in names.items()}
            if each.expr.xreplace(known) == sympy.false:
                told = {symbol: sympy.Symbol(name) for symbol, name in names.items()}
                return str(each.expr.xreplace(told))
    return None


def _names(program: Any, recipe: Probe) -> tuple[dict[Any, str], Any]:
    """Return the name of each size's symbol, and where PyTorch keeps what it notes of them."""
    held = {node.name: node.meta.get("val") for node in program.graph.nodes}
    names: dict[Any, str] = {}
    environment = None
    for given, spec in zip(program.graph_signature.user_inputs, recipe.inputs, strict=False):
        for size, name in zip(getattr(held.get(given), "shape", ()), spec.shape, strict=False):
            if isinstance(size, torch.SymInt) and isinstance(name, str):
                names[size.node.expr] = name
                environment = size.node.shape_env
    return names, environment
