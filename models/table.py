"""Files, folders and hub data sets as a table, and which of its columns are model inputs.

``models/data.py`` calls :func:`read_table` for a path and :func:`of_table` for a
``datasets.Dataset``. Columns are found by what they hold and by the names that public data sets
give them, or as ``ColumnsConfig`` says. What cannot be read is one sentence with the file and the
line.
"""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ffmerge.config import ColumnsConfig
from ffmerge.errors import InputError, first_line
from ffmerge.models import pictures, sounds, texts
from ffmerge.models.batching import array_of, stacked
from ffmerge.models.columns import (
    IMAGE_COLUMNS,
    LABEL_COLUMNS,
    SOUND_COLUMNS,
    SPOKEN_COLUMNS,
    array_columns,
    check_named,
    first_of,
    labels_of,
    pair_of,
    texts_of,
)
from ffmerge.models.examples import Examples, check_finite
from ffmerge.models.listed import picture_suffixes, with_files
from ffmerge.models.packages import package
from ffmerge.models.probe import Array
from ffmerge.models.tasks import base
from ffmerge.models.words import of_words, word_columns

# file extension -> builder of the datasets library
_BUILDERS = {
    ".txt": "text",
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
_INPUTS = ("input_ids", "pixel_values", "input_features", "input_values")  # a model reads one


def read_table(source: str, path: Path) -> Any:
    """Return a file, a folder of images or sounds, or a hub data set as a ``datasets.Dataset``.

    Raises:
        InputError: there is none, it is empty, or it cannot be read.
    """
    datasets = package("datasets", source)
    if path.is_dir() and sounds.holds_sounds(path):
        with _silent(datasets):
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
    if path.is_file():
        table = with_files(table, path)
    return table


def _loaded(datasets: Any, source: str, path: Path) -> Any:
    if path.is_dir():
        return _folder(datasets, source, path)
    suffix = path.suffix.lower()
    if suffix in _BUILDERS and path.is_file():
        if not path.stat().st_size:
            raise InputError(f"the data in {source} is empty.")
        if suffix != ".parquet":
            with path.open("rb") as lines:
                for line in lines:
                    line.decode()  # now, and not when a row is asked for
        options = {"sep": "\t"} if suffix == ".tsv" else {}
        builder = _BUILDERS[suffix]
        return datasets.load_dataset(builder, data_files=str(path), split="train", **options)
    name, _, split = source.partition(":")
    if suffix in _BUILDERS or not split:
        raise InputError(f"{source} is not a data file, a folder, or a hub data set ID:SPLIT.")
    return datasets.load_dataset(name, split=split)


def _folder(datasets: Any, source: str, path: Path) -> Any:
    """Return a folder of pictures, or what ``Dataset.save_to_disk`` left."""
    if (path / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(each.name for each in path.iterdir() if each.is_dir()))
        raise InputError(f"{source} holds several data sets: give one of its folders {splits}.")
    if (path / "state.json").is_file():
        return datasets.load_from_disk(str(path))
    pictures_there = picture_suffixes()
    if not any(each.suffix.lower() in pictures_there for each in path.rglob("*")):
        raise InputError(f"{source} holds no pictures, no sounds and no saved data set.")
    return datasets.load_dataset("imagefolder", data_dir=str(path), split="train")


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
    if path.is_file() and path.suffix != ".parquet" and (wrong := _wrong_line(path)):
        return wrong
    while error.__cause__ is not None:  # datasets puts an error without a reason around it
        error = error.__cause__
    said = first_line(error)
    if "no data" in said or isinstance(error, StopIteration):
        return "it is empty."
    return said


def _wrong_line(path: Path) -> str | None:
    """Return what is wrong with the first line that is no text, or no JSON where it has to be."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                text = line.decode()
                if path.suffix == ".jsonl" and text.strip():
                    json.loads(text)
            except UnicodeDecodeError:
                return f"line {number} is not UTF-8."
            except ValueError as error:
                return f"line {number} is no JSON: {error}."
    return None


@dataclass(frozen=True)
class Reading:
    """What makes examples of a table, and the class of transformers that it needs for that."""

    reader: str | None
    make: Callable[[], Examples]


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
    return reading(table, source, folder, task, columns).make()


def reading(
    table: Any,
    source: str,
    folder: str | Path | None,
    task: str | None,
    columns: ColumnsConfig,
) -> Reading:
    """Return how the rows of a table are read; its columns are checked, nothing is loaded.

    Raises:
        InputError: it has no column that the model takes, or not the one that was named.
    """
    check_named(table, source, columns)
    kind = base(task or "")
    if kind == "token-classification":
        if found := word_columns(table, columns.label_column):
            return Reading("AutoTokenizer", partial(of_words, table, *found, source, folder))
    arrays = array_columns(table)
    if not columns.text_column and not set(arrays).isdisjoint(_INPUTS):
        return Reading(None, partial(_of_arrays, table, arrays))
    if image := first_of(IMAGE_COLUMNS, table, "Image"):
        numbered = labels_of(table, source, folder, columns)
        make = partial(pictures.of_images, table, image, numbered, source, folder)
        return Reading("AutoImageProcessor", make)
    if sound := first_of(SOUND_COLUMNS, table, "Audio"):
        spoken = numbered = None
        if kind == "automatic-speech-recognition":
            spoken = columns.target_column or first_of(SPOKEN_COLUMNS, table)
        else:
            numbered = labels_of(table, source, folder, columns)
        make = partial(_of_sounds, table, sound, numbered, spoken, source, folder)
        return Reading("AutoFeatureExtractor", make)
    return _reading_text(table, source, folder, task, columns)


def _reading_text(
    table: Any,
    source: str,
    folder: str | Path | None,
    task: str | None,
    columns: ColumnsConfig,
) -> Reading:
    """Return how texts are read: pairs of what is read and written, or texts with a class."""
    if base(task or "") == "text2text-generation":
        pair = pair_of(table, source, folder, columns)
        texts.check_text(table, pair, source)
        return Reading("AutoTokenizer", partial(texts.of_pairs, table, *pair, source, folder))
    read = texts_of(table, source, task, columns)
    texts.check_text(table, read, source)
    numbered = None
    if task == "text-classification":
        numbered = labels_of(table, source, folder, columns)
    return Reading("AutoTokenizer", partial(texts.of_texts, table, read, numbered, source, folder))


def _of_sounds(
    table: Any,
    sound: str,
    labels: Any,
    spoken: str | None,
    source: str,
    folder: str | Path | None,
) -> Examples:
    """Return sounds with their classes, or what is said in them, where a column tells.

    A sound of which nothing is written is left out then, as a text that is not translated is.
    """
    if not spoken:
        return sounds.of_sounds(table, sound, labels, None, source, folder)
    rows = texts.lengths_of_texts(table, [spoken], source)
    targets = texts.targets_of(spoken, source, folder)
    return sounds.of_sounds(table, sound, labels, targets, source, folder).of([*rows])


def _of_arrays(table: Any, columns: Sequence[str]) -> Examples:
    def take(rows: Sequence[int]) -> dict[str, Array]:
        part = table[list(rows)]
        batch = {}
        for name in columns:
            as_input = "labels" if name in LABEL_COLUMNS else name
            batch[as_input] = [array_of(value) for value in part[name]]
        found = stacked(batch)
        check_finite(found, rows)
        return found

    return Examples(range(len(table)), take)
