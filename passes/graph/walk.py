"""A graph that runs front to back in parts, on batches of its inputs.

``gptq.py`` rounds the weights of a part, then lets the batches go on through it. What later parts
read is kept on disk (:class:`Walk`): nothing runs twice, a session holds the weights of one part,
and in memory are the values of one batch.
"""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ffmerge.errors import InputError
from ffmerge.passes.graph.tensors import Array

Batch = Mapping[str, Array]


class Kept(Sequence[Batch]):
    """Batches in a folder of their own, which goes with them; each is read when it is asked for."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._names: list[list[str]] = []
        for number, batch in enumerate(batches):
            self._names.append(list(batch))
            with open(self._path(number), "wb") as file:
                for array in batch.values():
                    np.save(file, array)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, number: Any) -> Any:
        names = self._names[number]
        with open(self._path(number), "rb") as file:
            return {name: np.load(file) for name in names}

    def _path(self, number: int) -> Path:
        return Path(self._folder.name) / str(number)


class Walk:
    """Batches on their way through a sorted graph: of each, what was computed and is still read.

    ``batches`` hold by name what is known at the place reached: the graph's inputs at first.
    """

    def __init__(self, model: ir.Model, batches: Sequence[Batch]) -> None:
        self.model, self.batches = model, batches
        self._known: list[ir.Value] = []
        for value in model.graph.inputs:
            if batches and value.name in batches[0]:
                self._known.append(value)

    def run(self, wanted: Sequence[ir.Value]) -> Iterator[Batch]:
        """Yield of each batch the values that are wanted, computed from the place reached.

        Raises:
            InputError: a batch is not what the graph takes.
        """
        computed = [value for value in wanted if value not in self._known]
        names = [str(value.name) for value in computed]
        session = None
        if names:
            session = self._session(computed)
        for batch in self.batches:
            found = {str(v.name): batch[str(v.name)] for v in wanted if v in self._known}
            if session is not None:
                try:
                    found.update(zip(names, session.run(names, dict(batch)), strict=True))
                except Exception as error:  # ONNX Runtime's have no common class of their own
                    reason = str(error).splitlines()[0]
                    raise InputError(
                        f"the calibration data does not fit the model: {reason}"
                    ) from error
            yield found

    def trial(
        self, wanted: Sequence[ir.Value], weights: Sequence[ir.Value]
    ) -> Callable[[Batch], list[Array]]:
        """Return what runs the first batch to the values that are wanted, with weights changed.

        It takes arrays by the names of ``weights``; those it is not given are as they are.
        """
        session = self._session(wanted, weights)
        names = [str(value.name) for value in wanted]

        def run(changed: Batch) -> list[Array]:
            found: list[Array] = session.run(names, {**self.batches[0], **changed})
            return found

        return run

    def go(self, node: ir.Node) -> None:
        """Go on to a node: keep what it and those behind it read.

        Raises:
            InputError: a batch is not what the graph takes.
        """
        kept = _read_from(self.model.graph, node)
        if all(value.type is not None for value in kept):  # what a session can be given
            self.batches = Kept(self.run(kept))
            self._known = kept

    def fork(self) -> "Walk":
        """Return another walk from the place reached."""
        other = Walk(self.model, self.batches)
        other._known = self._known
        return other

    def _session(self, computed: Sequence[ir.Value], weights: Sequence[ir.Value] = ()) -> Any:
        """Return a session from the place reached; ``weights`` are inputs of it that may stay."""
        import onnxruntime

        inputs = [*self._known, *weights]
        graph = ir.convenience.extract(self.model.graph, inputs, computed)
        for value in graph.inputs:
            if value.shape is not None and not value.is_initializer():
                value.shape = ir.Shape([None] * value.shape.rank())
        functions = tuple(self.model.functions.values())
        part = ir.Model(graph, ir_version=self.model.ir_version, functions=functions)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            ir.save(part, path, external_data="data")
            return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _read_from(graph: ir.Graph, first: ir.Node) -> list[ir.Value]:
    """Return the values that a node or one behind it reads, and no such node computes."""
    nodes = list(graph)
    behind = nodes[nodes.index(first) :]
    computed = {value for node in behind for value in node.outputs}
    read: dict[ir.Value, None] = {}
    for node in ir.traversal.RecursiveGraphIterator(ir.GraphView((), (), nodes=behind)):
        read |= dict.fromkeys(value for value in node.inputs if value is not None)
    return [
        value
        for value in read
        if value.graph is graph and value not in computed and not value.is_initializer()
    ]
