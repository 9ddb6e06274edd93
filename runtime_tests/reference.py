"""What a package stores of PyTorch: outputs, real inputs, a trace, and ids of greedy decoding.

``reference.safetensors`` is read once for a validation, and handed to every check.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file

from ffmerge.errors import InputError
from ffmerge.models.manifest import (
    LABELS,
    REFERENCE,
    GraphRecord,
    Manifest,
    best_keys,
    input_key,
    reference_key,
)
from ffmerge.models.probe import Array
from ffmerge.models.trace import GREEDY, TRACES, Description, Trace, split, trace_key


@dataclass(frozen=True)
class Reference:
    """The tensors of the file in ``folder`` by name, and what each trace among them is of.

    Of a graph in several precisions outputs and inputs are stored once, under the path of the
    first: ``first`` has that of each other one.
    """

    folder: Path
    tensors: Mapping[str, Array]
    traces: Mapping[str, Sequence[Description]]
    first: Mapping[str, str] = field(default_factory=dict)

    def feeds(self, graph: GraphRecord, case: int) -> dict[str, Array]:
        """Return the inputs of one case of a graph.

        Raises:
            InputError: what the manifest says of them means nothing.
        """
        try:
            return graph.probe.feeds(case, self.real(graph))
        except (ValueError, TypeError, LookupError, OverflowError, MemoryError) as error:
            raise InputError(
                f"{self.folder} describes inputs of {graph.path} that cannot be made: {error}. "
                "Export the package again."
            ) from error

    def expected(self, graph: GraphRecord, case: int, output: str) -> Array | None:
        """Return what is stored of the output that PyTorch gave, if anything is."""
        return self.tensors.get(reference_key(self._of(graph.path), case, output))

    def best(self, graph: GraphRecord, case: int, output: str) -> list[Array | None]:
        """Return the best classes of logits that PyTorch gave and their scores, if stored."""
        return [self.tensors.get(key) for key in best_keys(self._of(graph.path), case, output)]

    def real(self, graph: GraphRecord) -> dict[str, Array]:
        """Return the stored inputs of a graph; one made of parts is given what its first is."""
        prefix = input_key(self._of((graph.parts or (graph.path,))[0]), "")
        return self._below(prefix)

    def labelled(self, manifest: Manifest) -> dict[str, Array]:
        """Return the real rows as a batch of examples, on which PyTorch's metric is known."""
        first, *rest = manifest.served().values()
        batch = self.real(first)
        if rest:
            batch["decoder_input_ids"] = self.real(rest[-1])["input_ids"]
        if LABELS in self.tensors:
            batch["labels"] = self.tensors[LABELS]
        return batch

    def greedy(self) -> dict[str, Array]:
        """Return prompts and PyTorch's ids, or nothing."""
        return self._below(GREEDY)

    def trace(self, graph: GraphRecord) -> Trace | None:
        """Return what PyTorch gave at the nodes of a graph, if that is known."""
        key = trace_key(graph.path)
        if key not in self.traces:
            return None
        return split(self.traces[key], self.tensors[key])

    def _of(self, path: str) -> str:
        return self.first.get(path, path)

    def _below(self, prefix: str) -> dict[str, Array]:
        return {
            name.removeprefix(prefix): array
            for name, array in self.tensors.items()
            if name.startswith(prefix)
        }


def read_reference(folder: Path, manifest: Manifest | None = None) -> Reference:
    """Return the reference of the package in ``folder``; for several precisions its manifest tells.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    path, first = folder / REFERENCE, {}
    if manifest is not None:
        first = {variant.path: variant.graph for variant in manifest.variants}
    try:
        with safe_open(path, "numpy") as file:
            about = dict(file.metadata() or {})
        traces = {key: json.loads(text) for key, text in about.items()}
        # older packages have a key for each trace, and no others
        return Reference(folder, load_file(path), traces.get(TRACES, traces), first)
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read: {error}. Export the package again.") from error
