"""Which columns of a table hold what: texts, pairs, labels, pictures, sounds, arrays.

``models/table.py`` asks. Columns are found by the names that public data sets give them, or as
``ColumnsConfig`` says; one that is named and not there is an error.
"""

import warnings
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from ffmerge.config import ColumnsConfig
from ffmerge.errors import FfmergeWarning, InputError
from ffmerge.models import texts
from ffmerge.models.labels import Numbered, are_classes, is_class, is_regression, label_ids
from ffmerge.models.tasks import base

_TEXT_COLUMNS = ("text", "sentence", "content")
_SOURCE_COLUMNS = ("source", "src", "input", "article", "document", "dialogue", "question")
_TARGET_COLUMNS = ("target", "tgt", "output", "highlights", "summary", "answer")
SPOKEN_COLUMNS = ("sentence", "transcription", "transcript", "text")
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "category")
IMAGE_COLUMNS = ("image", "img", "pixel_values")
SOUND_COLUMNS = ("audio",)
# What classifiers of pairs read, in this order; besides, what a last 1 and 2 or a and b tell apart.
_PAIRS = (
    ("premise", "hypothesis"), ("question", "sentence"), ("question", "context"),
    ("question", "passage"), ("query", "passage"), ("query", "document"), ("text", "text_pair"),
)  # fmt: skip
_READ_PAIRS = ("text-classification", "question-answering")


def check_named(table: Any, source: str, columns: ColumnsConfig) -> None:
    """Raise InputError at a column that is named and not there."""
    for field in fields(ColumnsConfig):
        wanted = getattr(columns, field.name)
        if wanted and wanted not in names_of(table):
            raise InputError(
                f"{source} has no column {wanted!r}, it has {', '.join(names_of(table)) or 'none'}."
            )


def names_of(table: Any) -> list[str]:
    """Return the columns of a table, and the languages of a column of translations."""
    return [*table.column_names, *texts.languages(table)]


def texts_of(table: Any, source: str, task: str | None, columns: ColumnsConfig) -> list[str]:
    """Return the column of the texts that a model reads, or both of a classifier of pairs.

    Raises:
        InputError: no column has a name that is known.
    """
    if columns.pair_column and not columns.text_column:
        raise InputError("--pair-column names the second text: name the first by --text-column.")
    if columns.text_column:
        named = (columns.text_column, columns.pair_column)
        return [name for name in named if name]
    strings = _strings(table)
    if base(task or "") in _READ_PAIRS:
        for pair in _PAIRS:
            there = [name for name in called(pair, table) if name in strings]
            if len(there) == len(pair):
                return there
        for first, second in _numbered_pairs(strings):
            if second in strings:
                return [first, second]
    if text := first_of(_TEXT_COLUMNS, table):
        return [text]
    known = (*_TEXT_COLUMNS, *IMAGE_COLUMNS, *SOUND_COLUMNS)
    raise InputError(
        f"{source} has the columns {', '.join(names_of(table))}: one of them must be called "
        f"{', '.join(known)}, or be named by --text-column."
    )


def _numbered_pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """Return the columns that are called alike but for a last 1 and 2, or a and b."""
    pairs = []
    for name in names:
        for one, two in (("1", "2"), ("a", "b"), ("A", "B")):
            if name.endswith(one):
                pairs.append((name, name.removesuffix(one) + two))
    return pairs


def labels_of(
    table: Any, source: str, folder: str | Path | None, columns: ColumnsConfig
) -> tuple[str, Numbered] | None:
    """Return the column of the classes and what numbers them; None if there are none."""
    if is_regression(folder):
        return None
    column = columns.label_column or first_of(LABEL_COLUMNS, table)
    column = column or _column_of_classes(table, folder)
    if column is None:
        if len(table.column_names) > 1:
            warnings.warn(
                f"no column of {source} is known to hold the classes, it has "
                f"{', '.join(table.column_names)}: name it by --label-column.",
                FfmergeWarning,
                stacklevel=2,
            )
        return None
    if not is_class(table, column):
        raise InputError(f"the column {column!r} of {source} holds no classes: name another one.")
    return column, label_ids(column, table, source, folder)


def _column_of_classes(table: Any, folder: str | Path | None) -> str | None:
    """Return the first column that holds nothing but names of the model's classes."""
    for name in _strings(table):
        if are_classes(table[name][:1], folder) and are_classes(table.unique(name), folder):
            return name
    return None


def pair_of(
    table: Any, source: str, folder: str | Path | None, columns: ColumnsConfig
) -> tuple[str, str]:
    """Return the columns, or languages, that are translated from and to.

    Of two languages nobody has named, the model's tokenizer may tell which is which; else they
    are taken in their order, and that is said.
    """
    choices = texts.languages(table) or _strings(table)
    first = columns.text_column or first_of((*_SOURCE_COLUMNS, *_TEXT_COLUMNS), table)
    known = [name for name in called(_TARGET_COLUMNS, table) if texts.is_text(table, name)]
    second = columns.target_column or next(iter(known), None)
    if not first and not second and len(choices) == 2:
        return texts.direction(choices, source, folder)
    first = first or _only_other(choices, second)
    second = second or _only_other(choices, first)
    if not first or not second:
        raise _no_pair(table, source, choices)
    return first, second


def _no_pair(table: Any, source: str, choices: Sequence[str]) -> InputError:
    """Return what is said of a table in which one of two texts is not found."""
    if table.column_names == choices and len(choices) == 1:
        return InputError(
            f"{source} has one column, {choices[0]}, and the model reads one text and writes "
            "another: give a table with both, such as source and target, or named by "
            "--text-column and --target-column."
        )
    return InputError(
        f"{source} has the columns {', '.join(names_of(table))}: name what is read and what is "
        "written by --text-column and --target-column."
    )


def _strings(table: Any) -> list[str]:
    """Return the columns that hold text."""
    return [name for name in table.column_names if texts.is_text(table, name)]


def _only_other(names: Sequence[str], name: str | None) -> str | None:
    """Return the one that is left without a name, if it is one."""
    rest = [other for other in names if other != name]
    if len(rest) == 1:
        return rest[0]
    return None


def array_columns(table: Any) -> list[str]:
    """Return the columns that hold numbers: no text, no images."""
    found = []
    for name, feature in table.features.items():
        while hasattr(feature, "feature") or isinstance(feature, list):
            feature = feature[0] if isinstance(feature, list) else feature.feature
        kind = str(getattr(feature, "dtype", ""))
        if kind.startswith(("int", "uint", "float", "bool", "double", "half")):
            found.append(name)
    return found


def called(names: Sequence[str], table: Any) -> list[str]:
    """Return the columns that are called so, in upper case or lower, in the order of ``names``."""
    there: dict[str, str] = {}
    for column in table.column_names:
        there.setdefault(column.strip().casefold(), column)
    return [there[name] for name in names if name in there]


def first_of(names: Sequence[str], table: Any, kind: str = "") -> str | None:
    """Return the first column with one of the names, else the first that holds a ``kind``."""
    for name in called(names, table):
        if not kind or type(table.features[name]).__name__ == kind:
            return name
    for name, feature in table.features.items():
        if kind and type(feature).__name__ == kind:
            return str(name)
    return None
