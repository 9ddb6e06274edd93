"""A graph run on rows: all at once, or one by one where it was made for one row of one size.

Whatever runs a graph of a package that may be for an NPU runs it here: ``parity.py``, ``metric.py``
and ``serving.py``.
"""

from collections.abc import Mapping

import numpy as np

from ffmerge.errors import InputError
from ffmerge.models.manifest import GraphRecord
from ffmerge.models.probe import Array
from ffmerge.runtime_tests.runtimes.base import Session


def run_rows(graph: GraphRecord, session: Session, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Return the outputs for complete inputs, of all their rows.

    Raises:
        InputError: there are no rows, of which a graph for one gives nothing.
        RuntimeCheckError: the engine refuses the inputs, lacks an output or fails.
    """
    parts = [session.run(graph.outputs, row) for row in graph.probe.runs(feeds)]
    if not parts:
        raise InputError("no rows are given, and the package takes one at a time.")
    if len(parts) == 1:
        return parts[0]
    return {name: np.concatenate([part[name] for part in parts]) for name in graph.outputs}


def without_padding(
    graph: GraphRecord, outputs: Mapping[str, Array], batch: Mapping[str, Array]
) -> dict[str, Array]:
    """Return outputs as long as the rows of the ``batch``, which were padded to one size."""
    length = graph.probe.sizes_of(batch).get("sequence_length")
    cut = {name: outputs[name][:, :length] for name in graph.by_token}
    return {**outputs, **cut}
