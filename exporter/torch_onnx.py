"""PyTorch to ONNX: names and ties of the model kept in the graph.

The exporter's own optimizer is left off: it folds transposed weights one consumer at a time,
renames them, and copies shared ones of at most 8,192 elements. The graph passes do that work
with the ties in hand.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import onnx_ir as ir
import onnxscript.optimizer
import onnxscript.rewriter
import torch

from ffmerge.errors import ExportError
from ffmerge.exporter.graphs import Graph
from ffmerge.models import ties
from ffmerge.models.inputs import to_tensors
from ffmerge.models.record import Tie
from ffmerge.passes.graph.contract import read_ties, write_ties
from ffmerge.passes.graph.run import ShareResult, share


def to_onnx(graph: Graph, opset: int) -> tuple[ShareResult, Any]:
    """Return ``graph`` as ONNX, its initializers called by parameter name, and its program.

    The ``torch.export`` program calls its nodes as the ONNX graph calls their outputs.

    A tied parameter is one initializer under the name :func:`ffmerge.models.ties.ties` gives;
    parameters that happen to be equal are one under the first's.

    Raises:
        ExportError: PyTorch cannot trace or translate the model, or it is not float32.
        TieError: a tied parameter would be stored twice.
    """
    model, recipe = graph.module.model, graph.probe
    if any(p.dtype != torch.float32 for p in model.parameters()):
        raise ExportError("only float32 models are exported: call model.float() first.")
    example = to_tensors(recipe.draw(len(recipe.cases) - 1), model)
    axes = {
        spec.name: {i: d for i, d in enumerate(spec.shape) if isinstance(d, str)}
        for spec in recipe.inputs
    }
    try:
        with _quiet(), _traceable(model):
            program = torch.onnx.export(
                graph.module.eval(), kwargs={"inputs": example}, dynamic_shapes={"inputs": axes},
                dynamo=True, optimize=False, verbose=False, opset_version=opset,
                input_names=list(example), output_names=list(graph.outputs),
            )  # fmt: skip
    except Exception as error:  # torch.export and torch.onnx raise errors of many kinds
        cause = error.__cause__ or error  # torch.onnx says how to report it, its cause says what
        reason = next(
            (line for line in str(cause).splitlines() if line.strip()), type(cause).__name__
        )
        raise ExportError(f"{type(model).__name__} cannot be exported: {reason}") from error
    if program is None:
        raise ExportError(f"{type(model).__name__} cannot be exported.")
    graph_model = program.model
    known = ties.ties(model)
    _rename(graph_model, known)
    held = graph_model.graph.initializers
    known = tuple(replace(tie, places={graph.name: 1}) for tie in known if tie.name in held)
    # Share before the optimizer, whose own deduplication does not know the ties, and after it,
    # for the constants it folds.
    share(graph_model, known, resident=False)
    onnxscript.optimizer.optimize_ir(graph_model)
    onnxscript.rewriter.rewrite(_trivial())  # its rules hold the last graph they saw
    # It leaves out biases that are zero, tied or not. Any other tie that is gone is an error.
    known = read_ties(graph_model)
    write_ties(
        graph_model, [t for t in known if t.name in held or model.get_parameter(t.name).any()]
    )
    return placed(share(graph_model), f"{graph.name}.onnx"), program.exported_program


def placed(shared: ShareResult, file: str) -> ShareResult:
    """Return the result with its ties' places counted: how many nodes of ``file`` read each.

    At most one per member, as a graph of two branches reads each in both.
    """
    held = shared.model.graph.initializers
    counts = {t.name: min(len(held[t.name].uses()), len(t.members)) for t in shared.ties}
    counted = tuple(replace(tie, places={file: counts[tie.name]}) for tie in shared.ties)
    write_ties(shared.model, counted)
    return replace(shared, ties=counted)


def _trivial() -> ir.Model:
    """Return a graph that every rule of the optimizer tries: one of them looks at slices only."""
    inputs = [ir.Value(name=name) for name in ("x", "start", "end")]
    node = ir.Node("", "Slice", inputs)
    graph = ir.Graph(inputs, node.outputs, nodes=[node], opset_imports={"": 20})
    return ir.Model(graph, ir_version=10)


def _rename(model: ir.Model, known: tuple[Tie, ...]) -> None:
    """Give initializers their PyTorch names: the wrapper's prefix off, ties under their first."""
    canonical = {member: tie.name for tie in known for member in tie.members}
    for name, value in list(model.graph.initializers.items()):
        plain = name.removeprefix("model.")
        if plain != name:
            value.name = canonical.get(plain, plain)


@contextlib.contextmanager
def _traceable(model: Any) -> Iterator[None]:
    """Let the model compute attention and experts by plain matrix products.

    The fused kernels are not all translated, and give rows that attend to nothing other values
    than PyTorch does: left padding has such rows.
    """
    config = model.config
    attention = config._attn_implementation
    experts = getattr(config, "_experts_implementation", None)
    model.set_attn_implementation("eager")
    if experts:
        model.set_experts_implementation("batched_mm")
    try:
        yield
    finally:
        model.set_attn_implementation(attention)
        if experts:
            model.set_experts_implementation(experts)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what the exporter prints: notes on torchvision, axis names and tree specs."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)
