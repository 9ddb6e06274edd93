"""PyTorch to ONNX: names and ties of the model kept in the graph.

The exporter's own optimizer is left off: it folds transposed weights one consumer at a time,
renames them, and copies shared ones of at most 8,192 elements. The graph passes do that work
with the ties in hand.
"""

import contextlib
import inspect
import io
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import onnx_ir as ir
import onnxscript.optimizer
import torch
from torch import Tensor, nn

from ffmerge.errors import ExportError
from ffmerge.models import tasks, ties
from ffmerge.models.inputs import probe, to_tensors
from ffmerge.models.plan import Tie
from ffmerge.passes.graph.contract import write_ties
from ffmerge.passes.graph.run import ShareResult, share


class _Outputs(nn.Module):
    """The model as a function from a dictionary of inputs to the task's outputs in order."""

    def __init__(self, model: Any, task: str) -> None:
        super().__init__()
        self.model = model
        self.names = tasks.OUTPUTS[task]
        accepted = inspect.signature(model.forward).parameters
        self.settings = {"use_cache": False} if "use_cache" in accepted else {}

    def forward(self, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        out = self.model(**inputs, **self.settings, return_dict=True)
        return tuple(out[name] for name in self.names)


def to_onnx(model: Any, task: str, opset: int) -> ShareResult:
    """Return the graph of ``model`` for ``task``, its initializers called by parameter name.

    A tied parameter is one initializer under the name :func:`ffmerge.models.ties.ties` gives;
    parameters that happen to be equal are one under the first's.

    Raises:
        ExportError: PyTorch cannot trace or translate the model, or it is not float32.
        TieError: a tied parameter would be stored twice.
    """
    wrapper = _Outputs(model, task).eval()
    if any(p.dtype != torch.float32 for p in model.parameters()):
        raise ExportError("only float32 models are exported: call model.float() first.")
    recipe = probe(model)
    example = to_tensors(recipe.draw(len(recipe.cases) - 1), model)
    axes = {
        spec.name: {i: d for i, d in enumerate(spec.shape) if isinstance(d, str)}
        for spec in recipe.inputs
    }
    return translate(wrapper, {"inputs": example}, {"inputs": axes}, example, wrapper.names, opset)


def translate(
    wrapper: Any,
    arguments: Mapping[str, Any],
    axes: Mapping[str, Any],
    inputs: Iterable[str],
    outputs: Iterable[str],
    opset: int,
    file: str = "model.onnx",
) -> ShareResult:
    """Return the graph of a module that wraps the transformers model ``wrapper.model``.

    ``arguments`` are those of ``forward`` and ``axes`` name their dynamic dimensions; ``inputs``
    and ``outputs`` are the names in the graph, in order; ``file`` is what it will be called.
    """
    model = wrapper.model
    try:
        with _quiet():
            program = torch.onnx.export(
                wrapper, kwargs=dict(arguments), dynamic_shapes=dict(axes), dynamo=True,
                optimize=False, verbose=False, opset_version=opset,
                input_names=list(inputs), output_names=list(outputs),
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
    known = tuple(replace(tie, places={file: 1}) for tie in known if tie.name in held)
    # Share before the optimizer, whose own deduplication does not know the ties, and after it,
    # for the constants it folds.
    share(graph_model, known, resident=False)
    onnxscript.optimizer.optimize_ir(graph_model)
    shared = share(graph_model)
    counted = tuple(replace(tie, places={file: _uses(graph_model, tie)}) for tie in shared.ties)
    write_ties(graph_model, counted)
    return replace(shared, ties=counted)


def reference_outputs(model: Any, task: str) -> list[dict[str, Any]]:
    """Return what PyTorch gives on each case of the probe, by output name, as arrays."""
    wrapper = _Outputs(model, task).eval()
    recipe = probe(model)
    outputs = []
    with torch.no_grad():
        for case in range(len(recipe.cases)):
            got = wrapper(to_tensors(recipe.draw(case), model))
            outputs.append({n: t.cpu().numpy() for n, t in zip(wrapper.names, got, strict=True)})
    return outputs


def _rename(model: ir.Model, known: tuple[Tie, ...]) -> None:
    """Give initializers their PyTorch names: the wrapper's prefix off, ties under their first."""
    canonical = {member: tie.name for tie in known for member in tie.members}
    for name, value in list(model.graph.initializers.items()):
        plain = name.removeprefix("model.")
        if plain != name:
            value.name = canonical.get(plain, plain)


def _uses(model: ir.Model, tie: Tie) -> int:
    """Return how many nodes read a tie's initializer, at most one per member."""
    return min(len(model.graph.initializers[tie.name].uses()), len(tie.members))


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
