"""Sound as model inputs: files of a folder, or a column of a table, read when rows are asked for.

soundfile decodes them, at the rate of the model's feature extractor. A folder has a sub-folder for
every class, or a ``metadata.csv`` or ``.jsonl`` in which ``file_name`` tells the file of a row.
"""

from collections.abc import Mapping, Sequence
from io import BytesIO
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np

from ffmerge.errors import InputError
from ffmerge.models.examples import Examples
from ffmerge.models.listed import paths_below, picture_suffixes, sound_suffixes
from ffmerge.models.packages import of_model, package
from ffmerge.models.pictures import Labels
from ffmerge.models.probe import Array
from ffmerge.models.texts import Targets

_METADATA = {"metadata.csv": "csv", "metadata.jsonl": "json"}


def holds_sounds(folder: Path) -> bool:
    """Tell whether there is sound in a folder, and no pictures."""
    kinds = {path.suffix.lower() for path in folder.rglob("*")}
    return not kinds.isdisjoint(sound_suffixes()) and kinds.isdisjoint(picture_suffixes())


def folder_table(folder: Path) -> Any:
    """Return the sounds of a folder as a ``datasets.Dataset``, a row for each.

    Raises:
        InputError: metadata cannot be read, or names a file that is not there.
    """
    datasets = package("datasets", str(folder))
    for name, builder in _METADATA.items():
        if (folder / name).is_file():
            return _with_metadata(datasets, folder, name, builder)
    suffixes = sound_suffixes()
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes)
    rows: dict[str, list[str]] = {"audio": [str(file) for file in files]}
    if all(file.parent != folder for file in files):
        rows["label"] = [file.parent.name for file in files]
    table = datasets.Dataset.from_dict(rows)
    if "label" in rows:
        names = sorted(set(rows["label"]))
        table = table.cast_column("label", datasets.ClassLabel(names=names))
    return table.cast_column("audio", datasets.Audio(decode=False))


def _with_metadata(datasets: Any, folder: Path, name: str, builder: str) -> Any:
    file = folder / name
    try:
        table = datasets.load_dataset(builder, data_files=str(file), split="train")
    except Exception as error:  # each builder raises errors of its own
        raise InputError(f"{file} cannot be read as a table.") from error
    if "file_name" not in table.column_names:
        raise InputError(f"{file} has no column file_name: it tells the file of a row.")
    paths = paths_below(folder, table["file_name"], file)
    table = table.remove_columns("file_name").add_column("audio", paths)
    return table.cast_column("audio", datasets.Audio(decode=False))


def of_sounds(
    table: Any,
    sound: str,
    labels: Labels,
    targets: Targets | None,
    source: str,
    folder: str | Path | None,
) -> Examples:
    """Return the rows of a table as what the model's feature extractor makes of sound.

    With ``labels``, classes, or ``targets``, what is said, where they are known.
    """
    extractor = of_model("AutoFeatureExtractor", folder, source)
    package("soundfile", source, "soundfile")
    datasets = package("datasets", source)
    stored = table.cast_column(sound, datasets.Audio(decode=False)).with_format(None)
    rate = int(extractor.sampling_rate)
    fixed = getattr(extractor, "chunk_length", None) or getattr(extractor, "max_length", None)
    padding = "max_length" if fixed else True  # as the model was trained, where it has a length

    def take(rows: Sequence[int]) -> dict[str, Array]:
        part = stored[list(rows)]
        waves = []
        for row, content in zip(rows, part[sound], strict=True):
            waves.append(_wave(content, row, source, rate))
        inputs = dict(extractor(waves, sampling_rate=rate, return_tensors="np", padding=padding))
        if labels:
            inputs["labels"] = labels[1](part[labels[0]])
        if targets:
            inputs |= targets.ids(part[targets.column])
        return {name: np.asarray(array) for name, array in inputs.items()}

    return Examples(range(len(table)), take)


def _wave(content: Mapping[str, Any] | None, row: int, source: str, rate: int) -> Array:
    """Return one sound as float32 samples at ``rate``, channels averaged.

    Raises:
        InputError: the file cannot be decoded.
    """
    import soundfile

    content = content or {}
    name = content.get("path") or f"row {row} of {source}, counted from 0,"
    try:
        file = BytesIO(content["bytes"]) if content.get("bytes") else content["path"]
        samples, found = soundfile.read(file, dtype="float32", always_2d=True)
    except Exception as error:  # soundfile's errors and those of the library below it
        raise InputError(f"{name} is no sound that can be read: {type(error).__name__}.") from error
    samples = samples.mean(1)
    if not samples.size:
        raise InputError(f"{name} holds no sound.")
    if found != rate:
        from scipy.signal import resample_poly

        shared = gcd(found, rate)
        samples = resample_poly(samples, rate // shared, found // shared).astype(np.float32)
    return np.asarray(samples)
