"""Files that a table names: a column of paths becomes a column of pictures or of sounds.

``models/table.py`` calls :func:`with_files` for a csv, tsv, jsonl or parquet file, and
``models/sounds.py`` takes the paths of its metadata from here. Paths are those below the folder
that the table is in: a table that others wrote opens nothing else.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ffmerge.errors import InputError
from ffmerge.models.packages import package

_SEEN = 8  # rows that must all name a picture, or all a sound: a text may end in such a name


def with_files(table: Any, file: Path) -> Any:
    """Return the table of ``file`` with its columns of paths as pictures or sounds, not yet opened.

    Raises:
        InputError: a path leads outside the folder of the table, or to no file.
    """
    datasets = package("datasets", str(file))
    for name, feature in table.features.items():
        if str(getattr(feature, "dtype", "")) not in ("string", "large_string"):
            continue
        kinds = {_kind_of(str(value)) for value in table[:_SEEN][name]}
        if len(kinds) > 1 or None in kinds:
            continue
        kind = kinds.pop()
        paths = paths_below(file.parent, table[name], file)
        table = table.remove_columns(name).add_column(name, paths)
        table = table.cast_column(name, getattr(datasets, str(kind))(decode=False))
    return table


def _kind_of(path: str) -> str | None:
    """Return as what ``datasets`` reads a file of this name; None: no picture and no sound."""
    suffix = Path(path).suffix.lower()
    if suffix in picture_suffixes():
        return "Image"
    if suffix in sound_suffixes():
        return "Audio"
    return None


def picture_suffixes() -> set[str]:
    """Return the endings of names of pictures, as ``datasets`` knows them."""
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

    return set(ImageFolder.EXTENSIONS)


def sound_suffixes() -> set[str]:
    """Return the endings of names of sounds, as ``datasets`` knows them."""
    from datasets.packaged_modules.audiofolder.audiofolder import AudioFolder

    return set(AudioFolder.EXTENSIONS)


def paths_below(folder: Path, names: Sequence[Any], file: Path) -> list[str]:
    """Return the files that a table in ``file`` names, which are below ``folder``.

    Raises:
        InputError: one is outside, or not there.
    """
    real = folder.resolve()
    found = []
    for row, name in enumerate(names):
        where = f"row {row} of {file}, counted from 0,"
        if not isinstance(name, str):
            raise InputError(f"{where} names no file.")
        path = folder / name
        try:
            if not path.resolve().is_relative_to(real):
                raise InputError(f"{where} names {name}, which is outside {folder}: move it there.")
            is_there = path.is_file()
        except (OSError, ValueError):  # a name that no file can have
            is_there = False
        if not is_there:
            raise InputError(f"{where} names {name}, which is not there.")
        found.append(str(path))
    return found
