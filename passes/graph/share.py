"""Tensors with the same bytes are stored once."""

from collections.abc import Sequence
from dataclasses import replace

import onnx_ir as ir

from ffmerge.models.manifest import Skip
from ffmerge.models.record import Tie
from ffmerge.passes.graph.contract import join_ties
from ffmerge.passes.graph.tensors import find_copies, stored
from ffmerge.passes.graph.transposed import obstacle, read_transposed

_ALSO = "ffmerge.also"


def names_of(value: ir.Value) -> list[str]:
    """Return the name of an initializer, and those of the equal ones that it stands for."""
    return [value.name or "", *value.meta.get(_ALSO, ())]


class SharePass(ir.passes.InPlacePass):
    """No two initializers of the main graph hold the same bytes, or ``skipped`` says why.

    Of equal tensors of any size and dtype the first in graph order stays, or the one a tie
    names; the result's name is the tie's. Of a transposed pair the second goes if its consumers
    can read the first through ``transB``, else the first if its can. When tensors of two ties
    turn out equal the ties become one: ``ties`` is what holds afterwards. Initializers of
    subgraphs are to be lifted first; what cannot be lifted, graph inputs and outputs are left.
    """

    def __init__(self, ties: Sequence[Tie] = ()) -> None:
        super().__init__()
        self.ties = join_ties(ties)
        self.skipped: list[Skip] = []

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Merge each set of equal tensors, then give tied ones their tie's name."""
        self.skipped = []
        before = len(model.graph.initializers)
        items = stored(model)
        for copies in find_copies([item.tensor for item in items]):
            same = [items[index].value for index in (copies.first, *copies.identical)]
            turned = [items[index].value for index in copies.transposed]
            self._skip_fixed(same + turned, model.graph)
            one, other = self._merge(same, model.graph), self._merge(turned, model.graph)
            if one and other:
                self._merge_transposed(one, other, model)
        modified = self._rename(model.graph) or len(model.graph.initializers) < before
        return ir.passes.PassResult(model, modified)

    def _skip_fixed(self, values: Sequence[ir.Value], main: ir.Graph) -> None:
        for value in values:
            if reason := _fixed(value, main):
                other = values[1] if value is values[0] else values[0]
                self.skipped.append(Skip(value.name or "", f"equal to {other.name}, but {reason}"))

    def _merge(self, values: Sequence[ir.Value], main: ir.Graph) -> ir.Value | None:
        """Leave one of those identical initializers that may go, and return it."""
        free = [value for value in values if not _fixed(value, main)]
        if not free:
            return None
        keep = min(free, key=self._rank)
        for value in free:
            if value is not keep:
                value.replace_all_uses_with(keep)
                self._forget(value, keep)
        return keep

    def _merge_transposed(self, one: ir.Value, other: ir.Value, model: ir.Model) -> None:
        """Leave one of a transposed pair, if the consumers of the other can read it."""
        keep, lose = sorted((one, other), key=self._rank)  # stable: the first, unless tied
        opset = model.opset_imports.get("", 0)
        reason = _first_obstacle(lose, opset)
        if reason and self._rank(keep) == self._rank(lose) and not _first_obstacle(keep, opset):
            keep, lose, reason = lose, keep, None
        if reason:
            why = f"the transpose of {keep.name}, but {reason}"
            self.skipped.append(Skip(lose.name or "", why))
            return
        for use in tuple(lose.uses()):
            read_transposed(*use, keep, model.graph)
        self._forget(lose, keep)

    def _rank(self, value: ir.Value) -> int:
        """Return 0 for the name of a tie, 1 for another of its names, 2 for all else."""
        rank = 2
        for tie in self.ties:
            if value.name == tie.name:
                return 0
            if value.name in tie.members:
                rank = 1
        return rank

    def _forget(self, value: ir.Value, keep: ir.Value) -> None:
        assert value.graph is not None and value.name is not None
        value.graph.initializers.pop(value.name)
        keep.meta[_ALSO] = [*keep.meta.get(_ALSO, ()), *names_of(value)]
        places = {value.name, keep.name}
        meeting = [tie for tie in self.ties if places & set(tie.members)]
        if len(meeting) > 1:
            # The kept name's tie first: its name stays the name of the initializer.
            meeting.sort(key=lambda tie: keep.name not in tie.members)
            first = replace(meeting[0], members=tuple(m for tie in meeting for m in tie.members))
            self.ties = join_ties(first if tie is meeting[0] else tie for tie in self.ties)

    def _rename(self, graph: ir.Graph) -> bool:
        renamed = False
        for tie in self.ties:
            holders = [name for name in tie.members if name in graph.initializers]
            if len(holders) == 1 and holders[0] != tie.name:
                value = graph.initializers[holders[0]]
                if not _fixed(value, graph):
                    value.name = tie.name
                    renamed = True
        return renamed


def _fixed(value: ir.Value, main: ir.Graph) -> str | None:
    """Return why a stored tensor stays where it is, or None."""
    if value.is_graph_input():
        return "a graph input: a caller may replace it"
    if value.is_graph_output():
        return "a graph output"
    if not value.is_initializer() or value.graph is not main:
        return "it belongs to a function or a subgraph"
    return None


def _first_obstacle(weight: ir.Value, opset: int) -> str | None:
    assert weight.const_value is not None
    for use in weight.uses():
        if reason := obstacle(*use, weight.const_value.dtype, opset):
            return reason
    return None
