"""Merges and ties as data: which layers share one feed-forward sublayer, and by which names.

A merge returns a :class:`MergeRecord`; the checkpoint keeps it in ``config.json``, from where
loading reads it to tie again, and a package in its manifest. A :class:`Tie` names one shared
tensor: ``models/ties.py`` lists those of a model, the graph passes keep them, audits check them.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ffmerge.errors import InputError
from ffmerge.files import plain, restored

Window = tuple[int, int]  # first and last layer, inclusive


@dataclass(frozen=True)
class Group:
    """Layers of one stack that share one feed-forward sublayer; the first is the anchor."""

    stack: str
    layers: tuple[int, ...]


@dataclass(frozen=True, repr=False)
class MergeRecord:
    """What a merge did: kept in the checkpoint's ``config.json`` and in the manifest.

    Stacks and layers are numbers and stack names, never parameter names: those differ between
    releases of transformers, these do not. ``own`` are the parts that each layer has for itself:
    ``bias``, ``scale``, and of a low-rank residual ``down`` and ``up``.
    """

    method: str
    groups: tuple[Group, ...]
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    metric: Mapping[str, Any]
    own: tuple[str, ...] = ()

    def __repr__(self) -> str:
        groups = ", ".join(f"{g.stack} {'+'.join(map(str, g.layers))}" for g in self.groups)
        counts = f"{self.parameters_before:,} -> {self.parameters_after:,} parameters"
        return f"<MergeRecord: {self.method}, {groups or 'nothing'} shared, {counts}>"

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values, the inverse of :func:`from_json`."""
        return plain(self)

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


def parse_windows(texts: Sequence[str]) -> Window | dict[str, Window] | None:
    """Return the window written ``A-B``, or by stack those written ``STACK:A-B``; None: no text.

    Raises:
        InputError: a text has neither form, a window has fewer than two layers, or the texts name
            a stack twice, or none although there are several.
    """
    windows: dict[str, Window] = {}
    for text in texts:
        match = re.fullmatch(r"(?:(.+):)?(\d+)-(\d+)", text)
        if not match:
            raise InputError(f"window {text!r} is not of the form FIRST-LAST, for example 3-7.")
        name, first, last = match[1] or "", int(match[2]), int(match[3])
        if last <= first:
            raise InputError(
                f"window {text} has fewer than two layers: merging needs at least two."
            )
        if name in windows or (windows and "" in (name, *windows)):
            raise InputError(f"window {text}: give one window, or STACK:FIRST-LAST once per stack.")
        windows[name] = (first, last)
    return windows.get("", windows or None)


def parse_budget(text: str, whole: int) -> int:
    """Return the bytes of a budget for a model of ``whole`` bytes.

    ``60MB`` is a size (kB, MB, GB are decimal, KiB, MiB, GiB binary), ``-25%`` a quarter less than
    the model has, ``75%`` three quarters of it.

    Raises:
        InputError: the text has no such form.
    """
    number = r"(\d+(?:\.\d+)?)"
    if match := re.fullmatch(rf"(-?){number}%", text):
        percent = float(match[2])
        size = whole * (100 - percent if match[1] else percent) / 100
    elif match := re.fullmatch(rf"{number} ?(?:([kKMGT])(i?))?B", text):
        size = float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(
            (match[2] or " ").upper()
        )
    else:
        raise InputError(f"budget {text!r} is not of the form 60MB, -25% or 75%.")
    return int(size)
