"""Files, folders and hub data sets as a table, and which of its columns are model inputs.

``models/data.py`` calls :func:`read_table` for a path and :func:`of_table` for a
``datasets.Dataset``. Columns are found by what they hold and by the names that public data sets
give them, or as ``ColumnsConfig`` says. What cannot be read is one sentence with the file and the
line.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ffmerge.config import ColumnsConfig
from ffmerge.errors import InputError
from ffmerge.models import pictures, sounds, texts
from ffmerge.models.batching import array_of, stacked
from ffmerge.models.examples import Examples, check_finite
from ffmerge.models.labels import Numbered, is_class, is_regression, label_ids
from ffmerge.models.packages import package
from ffmerge.models.probe import Array
from ffmerge.models.tasks import base

# file extension -> builder of the datasets library
_BUILDERS = {
    ".txt": "text",
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
_TEXT_COLUMNS = ("text", "sentence", "content")
_SOURCE_COLUMNS = ("source", "src", "input", "article", "document", "dialogue", "question")
_TARGET_COLUMNS = ("target", "tgt", "output", "highlights", "summary", "answer")
_SPOKEN_COLUMNS = ("sentence", "transcription", "transcript", "text")
_LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "category")
_IMAGE_COLUMNS = ("image", "img", "pixel_values")
_SOUND_COLUMNS = ("audio",)
_INPUTS = ("input_ids", "pixel_values", "input_features", "input_values")  # a model reads one


def read_table(source: str, path: Path) -> Any:
    """Return a file, a folder of images or sounds, or a hub data set as a ``datasets.Dataset``.

    Raises:
        InputError: there is none, it is empty, or it cannot be read.
    """
    datasets = package("datasets", source)
    if path.is_dir() and sounds.holds_sounds(path):
        return sounds.folder_table(path)
    try:
        with _silent(datasets):
            table = _loaded(datasets, source, path)
    except InputError:
        raise
    except Exception as error:  # each builder raises errors of its own
        raise InputError(f"the data in {source} cannot be read: {_reason(path, error)}") from error
    if not len(table):
        raise InputError(f"the data in {source} is empty.")
    if path.is_dir():
        pictures.check_files(table, source)
    return table


def _loaded(datasets: Any, source: str, path: Path) -> Any:
    if path.is_dir():
        return datasets.load_dataset("imagefolder", data_dir=str(path), split="train")
    if path.suffix in _BUILDERS and path.is_file():
        if not path.stat().st_size:
            raise InputError(f"the data in {source} is empty.")
        if path.suffix != ".parquet":
            with path.open("rb") as lines:
                for line in lines:
                    line.decode()  # now, and not when a row is asked for
        options = {"sep": "\t"} if path.suffix == ".tsv" else {}
        builder = _BUILDERS[path.suffix]
        return datasets.load_dataset(builder, data_files=str(path), split="train", **options)
    name, _, split = source.partition(":")
    if path.suffix in _BUILDERS or not split:
        raise InputError(f"{source} is not a data file, a folder, or a hub data set ID:SPLIT.")
    return datasets.load_dataset(name, split=split)


@contextmanager
def _silent(datasets: Any) -> Iterator[None]:
    """Keep datasets from drawing bars, and from logging what is said in a sentence."""
    logger = logging.getLogger("datasets")
    level, bars = logger.level, not datasets.are_progress_bars_disabled()
    logger.setLevel(logging.CRITICAL + 1)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()


def _reason(path: Path, error: BaseException) -> str:
    """Return why a file cannot be read, with the line where that is known."""
    if path.is_file() and path.suffix != ".parquet":
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    text = line.decode()
                    if path.suffix == ".jsonl" and text.strip():
                        json.loads(text)
                except UnicodeDecodeError:
                    return f"line {number} is not UTF-8."
                except ValueError as wrong:
                    return f"line {number} is no JSON: {wrong}."
    while error.__cause__ is not None:  # datasets puts an error without a reason around it
        error = error.__cause__
    said = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if "no data" in said or isinstance(error, StopIteration):
        return "it is empty."
    return said


def of_table(
    table: Any,
    source: str,
    folder: str | Path | None,
    task: str | None,
    columns: ColumnsConfig,
) -> Examples:
    """Return the rows of a table: its arrays, else its images, its sounds, its texts.

    Raises:
        InputError: it has no column that the model takes, or not the one that was named.
    """
    _check_named(table, source, columns)
    arrays = _array_columns(table)
    if any(name in _INPUTS for name in arrays) and not columns.text_column:
        return _of_arrays(table, arrays)
    if image := _first_of(_IMAGE_COLUMNS, table, "Image"):
        numbered = _labels(table, source, folder, columns)
        return pictures.of_images(table, image, numbered, source, folder)
    if sound := _first_of(_SOUND_COLUMNS, table, "Audio"):
        if base(task or "") != "automatic-speech-recognition":
            label = _labels(table, source, folder, columns)
            return sounds.of_sounds(table, sound, label, None, source, folder)
        spoken = columns.target_column or _first_of(_SPOKEN_COLUMNS, table)
        targets = texts.targets_of(spoken, source, folder) if spoken else None
        return sounds.of_sounds(table, sound, None, targets, source, folder)
    if base(task or "") == "text2text-generation":
        pair = _pair(table, source, folder, columns)
        return texts.of_pairs(table, *pair, source, folder)
    text = columns.text_column or _first_of(_TEXT_COLUMNS, table)
    if not text:
        known = (*_TEXT_COLUMNS, *_IMAGE_COLUMNS, *_SOUND_COLUMNS)
        raise InputError(
            f"{source} has the columns {', '.join(_names(table))}: one of them must be called "
            f"{', '.join(known)}, or be named by --text-column."
        )
    numbered = None
    if task == "text-classification":
        numbered = _labels(table, source, folder, columns)
    return texts.of_texts(table, text, numbered, source, folder)


def _check_named(table: Any, source: str, columns: ColumnsConfig) -> None:
    """Raise InputError at a column that is named and not there."""
    for wanted in (columns.text_column, columns.label_column, columns.target_column):
        if wanted and wanted not in _names(table):
            raise InputError(
                f"{source} has no column {wanted!r}, it has {', '.join(_names(table)) or 'none'}."
            )


def _names(table: Any) -> list[str]:
    """Return the columns of a table, and the languages of a column of translations."""
    return [*table.column_names, *texts.languages(table)]


def _labels(
    table: Any, source: str, folder: str | Path | None, columns: ColumnsConfig
) -> tuple[str, Numbered] | None:
    """Return the column of the classes and what numbers them; None if there are none."""
    column = columns.label_column or _first_of(_LABEL_COLUMNS, table)
    if column is None or is_regression(folder):
        return None
    if not is_class(table, column):
        raise InputError(f"the column {column!r} of {source} holds no classes: name another one.")
    return column, label_ids(column, table, source, folder)


def _pair(
    table: Any, source: str, folder: str | Path | None, columns: ColumnsConfig
) -> tuple[str, str]:
    """Return the columns, or languages, that are translated from and to.

    Of two languages nobody has named, the model's tokenizer may tell which is which; else they
    are taken in their order, and that is said.
    """
    languages = texts.languages(table)
    strings = [name for name in table.column_names if texts.is_text(table, name)]
    first = columns.text_column or _first_of((*_SOURCE_COLUMNS, *_TEXT_COLUMNS), table)
    known = [name for name in _TARGET_COLUMNS if texts.is_text(table, name)]
    second = columns.target_column or _first_of(known, table)
    choices = languages or strings
    if first and not second:
        second = _only_other(choices, first)
    if second and not first:
        first = _only_other(choices, second)
    if first and second:
        return first, second
    if first or second or len(choices) != 2:
        raise InputError(
            f"{source} has the columns {', '.join(_names(table))}: name what is read and what is "
            "written by --text-column and --target-column."
        )
    return texts.direction(choices, source, folder)


def _only_other(names: Sequence[str], name: str) -> str | None:
    """Return the one that is left without a name, if it is one."""
    rest = [other for other in names if other != name]
    if len(rest) == 1:
        return rest[0]
    return None


def _array_columns(table: Any) -> list[str]:
    """Return the columns that hold numbers: no text, no images."""
    found = []
    for name, feature in table.features.items():
        while hasattr(feature, "feature") or isinstance(feature, list):
            feature = feature[0] if isinstance(feature, list) else feature.feature
        kind = str(getattr(feature, "dtype", ""))
        if kind.startswith(("int", "uint", "float", "bool", "double", "half")):
            found.append(name)
    return found


def _first_of(names: Sequence[str], table: Any, kind: str = "") -> str | None:
    """Return the first column with one of the names, else the first that holds a ``kind``."""
    for name in names:
        is_kind = not kind or type(table.features.get(name)).__name__ == kind
        if name in table.column_names and is_kind:
            return name
    for name, feature in table.features.items():
        if kind and type(feature).__name__ == kind:
            return str(name)
    return None


def _of_arrays(table: Any, columns: Sequence[str]) -> Examples:
    def take(rows: Sequence[int]) -> dict[str, Array]:
        part = table[list(rows)]
        batch = {}
        for name in columns:
            as_input = "labels" if name in _LABEL_COLUMNS else name
            batch[as_input] = [array_of(value) for value in part[name]]
        found = stacked(batch)
        check_finite(found, rows)
        return found

    return Examples(range(len(table)), take)
