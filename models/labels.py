"""Labels as people write them, as the numbers that a model has for them.

``models/table.py`` asks :func:`label_ids` for the column of labels of any data. Names are matched
with ``label2id`` of the model's ``config.json``; folders of classes come in the order of the
alphabet, which says nothing. Needs no transformers: a device reads labels too.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ffmerge.errors import InputError
from ffmerge.files import read_json
from ffmerge.models.probe import Array

Numbered = Callable[[Sequence[Any]], Array]
_SHOWN = 8  # names in a sentence


def label_ids(column: str, table: Any, source: str, folder: str | Path | None) -> Numbered:
    """Return what makes numbers of the values in a column of a ``datasets.Dataset``.

    Raises:
        InputError: a label is none of the model's.
    """
    names = _names_in(table.features[column])
    distinct = table.unique(column)
    known = _known(folder)
    by_value: dict[Any, int] = {}
    for value in sorted(distinct, key=str):
        name = names[value] if names and isinstance(value, int) and value >= 0 else value
        by_value[value] = _number(name, value, known, names, f"the column {column!r} of {source}")
    return lambda values: np.asarray([by_value[value] for value in values])


def is_class(table: Any, column: str) -> bool:
    """Tell whether a column holds one class for each row: a whole number or a name."""
    kind = str(getattr(table.features[column], "dtype", ""))
    return kind.startswith(("int", "uint", "string", "large_string", "bool"))


def are_classes(values: Sequence[Any], folder: str | Path | None) -> bool:
    """Tell whether all of these, of which there are some, are names of the model's classes."""
    known = _known(folder) or {}
    return bool(values) and all(_by_name(str(value), known) is not None for value in values)


def is_regression(folder: str | Path | None) -> bool:
    """Tell whether a model gives one number, for which there are no classes."""
    known = _known(folder)
    return known is not None and len(known) == 1


def _names_in(feature: Any) -> list[str] | None:
    """Return the names of the classes that a column of numbers has, as folders of images do."""
    names = getattr(feature, "names", None)
    return list(names) if names else None


def _known(folder: str | Path | None) -> dict[str, int] | None:
    """Return ``label2id`` of the model in a folder; None if its configuration names no classes."""
    if not folder:
        return None
    file = Path(folder) / "config.json"
    if not file.is_file():
        return None
    found = _label2id(read_json(file))
    if not found:
        return None
    try:
        return {str(name): int(number) for name, number in found.items()}
    except (TypeError, ValueError) as error:
        raise InputError(f"{file} has a label2id that gives no numbers: {error}.") from error


def _label2id(config: Any) -> dict[Any, Any] | None:
    """Return ``label2id`` of a configuration, else its ``id2label`` the other way round."""
    if not isinstance(config, dict):
        return None
    found = config.get("label2id")
    if not found and isinstance(config.get("id2label"), dict):
        found = {name: number for number, name in config["id2label"].items()}
    if not isinstance(found, dict):
        return None
    return found


def _number(
    name: Any, value: Any, known: dict[str, int] | None, names: list[str] | None, where: str
) -> int:
    """Return the number that a model has for a label, by its name, else by its own number.

    ``value`` is what stands in the data; ``names`` are the data's own, if it numbers its classes.
    """
    if isinstance(name, str):
        matched = _by_name(name, known or {})
        if matched is not None:
            return matched
    number = _read_number(name, known is None)
    if number is not None and (known is None or number in known.values()):
        return number
    if isinstance(name, str) and _numbered_alike(known, names):
        return int(value)
    raise InputError(
        f"{where} holds the label {name!r}, which is none of the model's: {_has(known)}."
    )


def _read_number(name: Any, nameless: bool) -> int | None:
    """Return the number that a label is, also one called as classes are that have no names.

    transformers saves no names of two classes that nobody has named.
    """
    if nameless and isinstance(name, str):
        name = re.sub(r"^\s*LABEL_(?=\d+\s*$)", "", name)
    if isinstance(name, (bool, int)) or re.fullmatch(r"\s*\d+\s*", str(name)):
        return int(name)
    return None


def _numbered_alike(known: Mapping[str, int] | None, names: list[str] | None) -> bool:
    """Tell whether the data's own numbers are all there is: the model has no names for as many."""
    if names is None or known is None:
        return names is not None
    nameless = all(re.fullmatch(r"LABEL_\d+", each) for each in known)
    return nameless and len(names) == len(known)


def _by_name(name: str, known: Mapping[str, int]) -> int | None:
    """Return the number of a class by its exact name, else by the only one that reads the same."""
    if name in known:
        return known[name]
    alike = {number for each, number in known.items() if _read(each) == _read(name)}
    return alike.pop() if len(alike) == 1 else None


def _read(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()


def _has(known: Mapping[str, int] | None) -> str:
    if known is None:
        return "its config.json names no classes"
    shown = ", ".join([*known][:_SHOWN])
    return shown if len(known) <= _SHOWN else f"{shown}, ... ({len(known)} of them)"
