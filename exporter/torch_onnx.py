"""PyTorch to ONNX: names and ties of the model kept in the graph.

``exporter/convert.py`` calls :func:`to_onnx` for every graph of a package that is not made of two
others. PyTorch translates it, initializers get the names of the parameters, the optimizer of
onnxscript simplifies it, and every weight is stored once.

The exporter's own optimizer is left off: it folds transposed weights one consumer at a time,
renames them, and copies shared ones of at most 8,192 elements. The graph passes do that work
with the ties in hand.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import onnx_ir as ir
import torch

from ffmerge.errors import ExportError
from ffmerge.exporter.bfloat16 import compute_in_float32
from ffmerge.exporter.computed import computed_once
from ffmerge.exporter.fused import fuse, fused_attention
from ffmerge.exporter.graphs import Graph
from ffmerge.exporter.last_logits import keep_last, offer_all
from ffmerge.exporter.lean import lean_exporter
from ffmerge.exporter.parts import store_parts
from ffmerge.exporter.settle import HEIGHT
from ffmerge.exporter.simplify import simplify
from ffmerge.exporter.sizes import taken_for_granted
from ffmerge.models import kv_cache, ties
from ffmerge.models.inputs import to_tensors
from ffmerge.models.kv_cache import KEPT
from ffmerge.models.read_once import give_back_weights
from ffmerge.models.record import Tie
from ffmerge.passes.graph.contract import read_ties, write_ties
from ffmerge.passes.graph.run import ShareResult, share_model

_MEANINGS = {  # of PyTorch's words
    "data-dependent": "its code decides by values that only a run has",
    "inferred a static shape": "its code takes one size for granted where any may be given",
}


class SizeError(ExportError):
    """A model cannot be traced for pictures of any size."""


def to_onnx(
    graph: Graph, opset: int, resident: bool = True, fused: bool = False
) -> tuple[ShareResult, Any]:
    """Return ``graph`` as ONNX, its initializers called by parameter name, and its program.

    The ``torch.export`` program calls its nodes as the ONNX graph calls their outputs. A tied
    parameter is one initializer under the name :func:`ffmerge.models.ties.ties` gives; parameters
    that happen to be equal are one under the first's. ``resident`` is that of
    :func:`ffmerge.passes.graph.run.share`. Of a ``fused`` graph attention is one operator, as
    :func:`ffmerge.exporter.fused.check_fused` found it can be.

    Raises:
        ExportError: PyTorch cannot trace or translate the model, or it is not float32.
        TieError: a tied parameter would be stored twice.
    """
    model = graph.module.model
    if any(p.dtype != torch.float32 for p in model.parameters()):
        raise ExportError("only float32 models are exported: call model.float() first.")
    give_back_weights(model)  # tracing reads none
    program = _translated(graph, opset, fused)
    known = ties.ties(model)
    _rename(program.model, known)
    compute_in_float32(program.model)
    fed = any(spec.name == KEPT for spec in graph.probe.inputs)
    offered = fused and not fed and _writes_text(graph)
    if fed or offered:
        keep_last(program.model)
    _optimize(program.model, graph, known)
    store_parts(program.model, {tie.name for tie in known})
    if fused:
        fuse(program.model)
    if offered:
        offer_all(program.model)
    shared = share_model(program.model, resident=resident)
    return count_tie_uses(shared, f"{graph.name}.onnx"), program.exported_program


def _writes_text(graph: Graph) -> bool:
    """Say whether a graph is a step of a decoder alone, with a cache."""
    kept = [name for name in graph.outputs if kv_cache.is_present(name)]
    return bool(kept) and not any(map(kv_cache.side_of, kept))


def _translated(graph: Graph, opset: int, fused: bool) -> Any:
    """Return what PyTorch's exporter makes of a graph, on the last of its drawn cases."""
    model, recipe = graph.module.model, graph.probe
    example = to_tensors(recipe.runs(recipe.draw(len(recipe.cases) - 1))[0], model)
    axes = {}
    for spec in recipe.inputs:
        sizes = enumerate(spec.shape)
        axes[spec.name] = {
            i: size for i, size in sizes if isinstance(size, str) and size not in recipe.fixed
        }
    try:
        with _quiet(), _traceable(model, fused), computed_once(model), lean_exporter():
            program = torch.onnx.export(
                graph.module.eval(), kwargs={"inputs": example}, dynamic_shapes={"inputs": axes},
                dynamo=True, optimize=False, verbose=False, opset_version=opset,
                input_names=list(example), output_names=list(graph.outputs),
            )  # fmt: skip
    except Exception as error:  # torch.export and torch.onnx raise errors of many kinds
        if HEIGHT in recipe.cases[-1]:
            raise SizeError(f"{type(model).__name__} is not traced at any size") from error
        raise ExportError(f"{type(model).__name__} cannot be exported: {_why(error)}") from error
    if program is None:
        raise ExportError(f"{type(model).__name__} cannot be exported.")
    asked = taken_for_granted(program.exported_program, recipe)
    if HEIGHT in recipe.cases[-1]:
        _check_sizes(graph, program)
    elif asked is not None:  # Swin's code asks for a size that needs padding, and is right for all
        try:
            _check_sizes(graph, program)
        except SizeError as error:
            raise ExportError(
                f"{type(model).__name__} cannot be exported for inputs of any size: what PyTorch "
                f"traces of it holds only where {asked}."
            ) from error
    return program


def _why(error: Exception) -> str:
    """Return why PyTorch does not trace or translate a model, in a line."""
    cause = error.__cause__ or error  # torch.onnx says how to report it, its cause says what
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    reason = [*lines, type(cause).__name__][0]
    if reason.endswith(":"):
        reason = " ".join(lines[:2])
    for sign, meaning in _MEANINGS.items():
        if sign in reason:
            return f"{meaning} ({reason})"
    return reason


def _check_sizes(graph: Graph, program: Any) -> None:
    """Raise SizeError unless what was traced at one size is right at the others."""
    traced = program.exported_program.module()
    model, recipe = graph.module.model, graph.probe
    for case in range(len(recipe.cases)):
        inputs = to_tensors(recipe.draw(case), model)
        try:
            with torch.no_grad():
                found, expected = traced(inputs=inputs), graph.module(inputs)
        except Exception as error:  # a guard of the program, of any kind
            raise SizeError("what was traced holds for one size") from error
        for one, other in zip(found, expected, strict=True):
            if one.shape != other.shape or not torch.allclose(one, other, rtol=1e-3, atol=1e-4):
                raise SizeError("what was traced holds for one size")


def _optimize(onnx_graph: ir.Model, graph: Graph, known: Sequence[Tie]) -> None:
    """Simplify a translated graph, with its ties recorded in it.

    It is shared before, as the optimizer's own deduplication does not know the ties.
    """
    held = onnx_graph.graph.initializers
    recorded = [replace(tie, places={graph.name: 1}) for tie in known if tie.name in held]
    share_model(onnx_graph, recorded, resident=False)
    with _quiet():
        simplify(onnx_graph)
    # It leaves out biases that are zero, tied or not. Any other tie that is gone is an error.
    left = []
    for tie in read_ties(onnx_graph):
        if tie.name in held or graph.module.model.get_parameter(tie.name).any():
            left.append(tie)
    write_ties(onnx_graph, left)


def count_tie_uses(shared: ShareResult, file: str) -> ShareResult:
    """Return the result with its ties saying how many nodes of ``file`` read each.

    At most one per member, as a graph of two branches reads each in both.
    """
    held = shared.model.graph.initializers
    counted = []
    for tie in shared.ties:
        uses = min(len(held[tie.name].uses()), len(tie.members))
        counted.append(replace(tie, places={file: uses}))
    write_ties(shared.model, counted)
    return replace(shared, ties=tuple(counted))


def _rename(model: ir.Model, known: tuple[Tie, ...]) -> None:
    """Give initializers their PyTorch names: the wrapper's prefix off, ties under their first."""
    canonical = {member: tie.name for tie in known for member in tie.members}
    for name, value in list(model.graph.initializers.items()):
        plain = name.removeprefix("model.")
        if plain != name:
            value.name = canonical.get(plain, plain)


@contextlib.contextmanager
def _traceable(model: Any, fused: bool) -> Iterator[None]:
    """Let the model compute attention and experts by plain matrix products, or attention fused.

    PyTorch's fused kernels are not all translated, and give rows that attend to nothing other
    values than PyTorch does: left padding has such rows.
    """
    config = model.config
    attention = config._attn_implementation
    experts = getattr(config, "_experts_implementation", None)
    model.set_attn_implementation("eager")
    if experts:
        model.set_experts_implementation("batched_mm")
    try:
        with fused_attention(model) if fused else nullcontext():
            yield
    finally:
        model.set_attn_implementation(attention)
        if experts:
            model.set_experts_implementation(experts)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what exporter and optimizer print: of torchvision, axis names, constants."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
