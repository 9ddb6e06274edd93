"""Merges and ties as data: which layers share one feed-forward sublayer, and by which names.

A merge returns a :class:`MergeRecord`; the checkpoint keeps it in ``config.json``, from where
loading reads it to tie again, and a package in its manifest. A :class:`Tie` names one shared
tensor: ``models/ties.py`` lists those of a model, the graph passes keep them, audits check them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ffmerge.errors import InputError
from ffmerge.files import plain, restored

ALREADY = "this model is merged already: start from the original checkpoint."


@dataclass(frozen=True)
class Group:
    """Layers of one stack that share one feed-forward sublayer; the first is the anchor."""

    stack: str
    layers: tuple[int, ...]


@dataclass(frozen=True)
class Narrowed:
    """Layers of one stack whose sublayers have ``widths`` hidden neurons each, of ``full``."""

    stack: str
    layers: tuple[int, ...]
    widths: tuple[int, ...]
    full: tuple[int, ...]

    @property
    def text(self) -> str:
        """How many neurons the layers have, and had."""
        least, most = min(self.widths), max(self.widths)
        widths = f"{least:,}" if least == most else f"{least:,} to {most:,}"
        return f"{widths} of {max(self.full):,} neurons"


@dataclass(frozen=True, repr=False)
class MergeRecord:
    """What a merge did: kept in the checkpoint's ``config.json`` and in the manifest.

    Stacks and layers are numbers and stack names, never parameter names: those differ between
    releases of transformers, these do not. ``own`` are the parts that each layer has for itself:
    ``bias``, ``scale``, and of a low-rank residual ``down`` and ``up``. ``narrowed`` tells what has
    fewer neurons: of a model with groups these, too, and what is before is the merged model then.
    """

    method: str
    groups: tuple[Group, ...]
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    metric: Mapping[str, Any]
    own: tuple[str, ...] = ()
    narrowed: tuple[Narrowed, ...] = ()

    @property
    def stages(self) -> tuple[str, str]:
        """What is before and after: of what was merged already that is no original."""
        return ("merged", "narrowed") if self.groups and self.narrowed else ("original", "merged")

    def __repr__(self) -> str:
        groups = ", ".join(f"{g.stack} {'+'.join(map(str, g.layers))}" for g in self.groups)
        done = [f"{each.stack} narrowed" for each in self.narrowed]
        if groups or not done:
            done.insert(0, f"{groups or 'nothing'} shared")
        counts = f"{self.parameters_before:,} -> {self.parameters_after:,} parameters"
        return f"<MergeRecord: {self.method}, {', '.join(done)}, {counts}>"

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values, the inverse of :func:`from_json`.

        Of what is not narrowed nothing is said: so earlier releases read it too.
        """
        value = plain(self)
        if not self.narrowed:
            del value["narrowed"]
        return value

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "MergeRecord":
        """Read a record; an unknown or missing key is an error."""
        try:
            record: MergeRecord = restored(cls, value)
            return record
        except (TypeError, KeyError) as error:
            raise InputError(f"the merge record is not one this version reads: {error}.") from error


def merge_record(config: Any) -> MergeRecord | None:
    """Return what a merge recorded in a model's configuration, None where nothing is merged."""
    value = getattr(config, "ffmerge", None)
    return MergeRecord.from_json(value) if value else None


def kind_of(config: Any) -> str:
    """Return what a model is by its configuration: original, merged or narrowed.

    What was merged and then narrowed is narrowed.
    """
    record = merge_record(config)
    if record is None:
        return "original"
    return "narrowed" if record.narrowed else "merged"


@dataclass(frozen=True)
class Tie:
    """One tensor that stands in several places of the model.

    ``name`` is the parameter name of the first place and the name of the one initializer;
    ``members`` are all places, ``name`` among them. ``places`` says how many of them each graph
    file reads: a package may have several, and a module may hold a parameter it never uses.
    """

    name: str
    members: tuple[str, ...]
    places: Mapping[str, int] = field(default_factory=dict)

    def places_in(self, file: str) -> int:
        """Return the places in a graph; of one that is not listed, what is surely there."""
        return self.places.get(file, min(self.places.values(), default=len(self.members)))

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {key: value for key, value in plain(self).items() if value}
