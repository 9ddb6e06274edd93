"""Examples as model inputs: from an ``.npz``, text, images, tables or a hub data set."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ffmerge.errors import InputError
from ffmerge.models.examples import Examples, from_arrays
from ffmerge.models.probe import Array

# file extension -> builder of the datasets library
_BUILDERS = {
    ".txt": "text",
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
}
_TEXT_COLUMNS = ("text", "sentence", "content")
_IMAGE_COLUMNS = ("image", "img", "pixel_values")
_LABEL_COLUMNS = ("label", "labels", "fine_label")
_MAX_TOKENS = 512


def read(source: str, folder: Path, task: str) -> Examples:
    """Return the examples in ``source`` as inputs of the model in ``folder``.

    ``source`` is an ``.npz`` of model inputs, a text, jsonl, csv or parquet file, a folder of
    images (one sub-folder per class), or a hub data set written ``ID:SPLIT``.

    Raises:
        InputError: the source cannot be read, or holds nothing the model takes.
    """
    path = Path(source).expanduser()
    if path.suffix == ".npz":
        return _read_npz(path)
    table = _read_table(source, path)
    image, text, label = (
        next((name for name in names if name in table.column_names), None)
        for names in (_IMAGE_COLUMNS, _TEXT_COLUMNS, _LABEL_COLUMNS)
    )
    if image:
        processor = _loaded("AutoImageProcessor", folder, "preprocessor_config.json for images")
        rows = list(range(len(table)))
    elif text:
        processor = _loaded("AutoTokenizer", folder, "tokenizer to read text with")
        processor.pad_token = processor.pad_token or processor.eos_token
        longest = min(processor.model_max_length, _MAX_TOKENS)
        rows = [i for i, content in enumerate(table[text]) if content.strip()]
        label = label if task == "text-classification" else None
    else:
        raise InputError(
            f"{source} has the columns {', '.join(table.column_names)}: one of them must be called "
            f"{', '.join((*_TEXT_COLUMNS, *_IMAGE_COLUMNS))}."
        )
    if not rows:
        raise InputError(f"the column {image or text!r} of the data holds no text or image.")

    def take(rows: Sequence[int]) -> dict[str, Array]:
        part = table[list(rows)]
        if image:
            colours = [picture.convert("RGB") for picture in part[image]]
            inputs = {"pixel_values": processor(colours, return_tensors="np")["pixel_values"]}
        else:
            cut = {"padding": True, "truncation": True, "max_length": longest}
            inputs = dict(processor(part[text], return_tensors="np", **cut))
        return {**inputs, "labels": np.asarray(part[label])} if label else inputs

    return Examples(rows, take)


def _read_npz(path: Path) -> Examples:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return from_arrays({name: archive[name] for name in archive.files})
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path} cannot be read as an .npz of arrays: {error}.") from error


def _read_table(source: str, path: Path) -> Any:
    import datasets

    try:
        if path.is_dir():
            return datasets.load_dataset("imagefolder", data_dir=str(path), split="train")
        if path.suffix in _BUILDERS and path.is_file():
            builder = _BUILDERS[path.suffix]
            return datasets.load_dataset(builder, data_files=str(path), split="train")
        name, _, split = source.partition(":")
        if path.suffix in _BUILDERS or not split:
            raise InputError(f"{source} is not a data file, a folder, or a hub data set ID:SPLIT.")
        return datasets.load_dataset(name, split=split)
    except InputError:
        raise
    except Exception as error:  # each builder raises errors of its own
        raise InputError(
            f"the data in {source} cannot be read: {str(error).splitlines()[0]}"
        ) from error


def _loaded(kind: str, folder: Path, what: str) -> Any:
    import transformers

    try:
        return getattr(transformers, kind).from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} has no {what}.") from error
