"""Data of any kind as model inputs: what a user gives in, rows that become numpy arrays out.

Every function that takes data calls :func:`as_examples`, or :func:`examples_for` where it has the
model, at its entry, and works with the :class:`Examples` it returns: numbered rows, of which any
can be had as a batch ``{input name: array}``, with ``labels`` where they are known. Text is
tokenized and images are processed when their rows are asked for.

transformers, datasets and torch are imported only where the data needs them.
"""

import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, overload

import numpy as np

from ffmerge.errors import InputError
from ffmerge.models.examples import Examples, from_arrays
from ffmerge.models.metrics import IGNORED
from ffmerge.models.probe import Array
from ffmerge.models.tasks import infer

if TYPE_CHECKING:
    from datasets import Dataset
    from torch.utils.data import DataLoader

    Data: TypeAlias = Examples | Mapping[str, Array] | Dataset | DataLoader[Any] | str | Path
else:
    Data = Any  # at run time neither package need be there

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
_INPUTS = ("input_ids", "pixel_values", "input_features", "input_values")  # a model reads one
_MAX_TOKENS = 512


def as_examples(data: Data, folder: str | Path | None = None, task: str | None = None) -> Examples:
    """Return data of any kind as :class:`Examples`: rows that are model inputs when asked for.

    ``data`` is a mapping of arrays of equal length by input name; a ``datasets.Dataset`` with
    tokenized or processed columns, or with a column of text or images; a ``DataLoader`` that yields
    dictionaries, which is read once and held; or what :func:`read` takes. Text and images need
    ``folder``, where the model's tokenizer or processor is. Labels of a text are kept if ``task``
    classifies texts.

    Raises:
        InputError: the data cannot be read, or holds nothing a model takes, or a package that
            reads it is not installed.
    """
    if isinstance(data, Examples):
        return data
    if isinstance(data, (str, Path)):
        return read(str(data), folder, task)
    if _is_a(data, "datasets", "Dataset"):
        return _of_table(data, "the data set", folder, task)
    if _is_a(data, "torch.utils.data", "DataLoader"):
        return _of_loader(data)
    if isinstance(data, Mapping) and not _is_a(data, "datasets", "DatasetDict"):
        return from_arrays({name: _array(values) for name, values in data.items()})
    raise InputError(
        f"{type(data).__name__} is no data that can be read here: give a mapping of arrays, one "
        "split of a datasets.Dataset, a DataLoader, or a path."
    )


@overload
def examples_for(model: Any, data: Data, task: str | None = None) -> Examples: ...
@overload
def examples_for(model: Any, data: None, task: str | None = None) -> None: ...
def examples_for(model: Any, data: Data | None, task: str | None = None) -> Examples | None:
    """Return the data of a PyTorch model as examples, None where there is none.

    Tokenizer and processor are those of the checkpoint that the model was loaded from.
    """
    if data is None or isinstance(data, Examples):
        return data
    if isinstance(data, Mapping):
        return as_examples(data)
    return as_examples(data, model.name_or_path, task or infer(model))


def read(source: str, folder: str | Path | None, task: str | None) -> Examples:
    """Return the examples in ``source`` as inputs of the model in ``folder``.

    ``source`` is an ``.npz`` of model inputs, a text, jsonl, csv or parquet file, a folder of
    images (one sub-folder per class), or a hub data set written ``ID:SPLIT``.

    Raises:
        InputError: the source cannot be read, or holds nothing the model takes.
    """
    path = Path(source).expanduser()
    if path.suffix == ".npz":
        return _read_npz(path)
    return _of_table(_read_table(source, path), source, folder, task)


def _read_npz(path: Path) -> Examples:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return from_arrays({name: archive[name] for name in archive.files})
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path} cannot be read as an .npz of arrays: {error}.") from error


def _read_table(source: str, path: Path) -> Any:
    """Return a file, a folder of images or a hub data set as a ``datasets.Dataset``."""
    datasets = _package("datasets", source)
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


def _of_table(table: Any, source: str, folder: str | Path | None, task: str | None) -> Examples:
    """Return the rows of a ``datasets.Dataset``: its arrays, else its images, else its texts."""
    arrays = _array_columns(table)
    if any(name in _INPUTS for name in arrays):
        return _of_arrays(table, arrays)
    label = _first_of(_LABEL_COLUMNS, table)
    if image := _first_of(_IMAGE_COLUMNS, table):
        return _of_images(table, image, label, source, folder)
    if text := _first_of(_TEXT_COLUMNS, table):
        if task != "text-classification":
            label = None
        return _of_texts(table, text, label, source, folder)
    raise InputError(
        f"{source} has the columns {', '.join(table.column_names)}: one of them must be called "
        f"{', '.join((*_TEXT_COLUMNS, *_IMAGE_COLUMNS))}."
    )


def _array_columns(table: Any) -> list[str]:
    """Return the columns that hold numbers: no text, no images."""
    found = []
    first = table[0] if len(table) else {}
    for name, value in first.items():
        is_image = hasattr(value, "convert")
        if not is_image and np.asarray(value).dtype.kind in "biuf":
            found.append(name)
    return found


def _first_of(names: Sequence[str], table: Any) -> str | None:
    return next((name for name in names if name in table.column_names), None)


def _of_arrays(table: Any, columns: Sequence[str]) -> Examples:
    def take(rows: Sequence[int]) -> dict[str, Array]:
        part = table[list(rows)]
        batch = {}
        for name in columns:
            as_input = "labels" if name in _LABEL_COLUMNS else name
            batch[as_input] = [_array(value) for value in part[name]]
        return _stacked(batch)

    return Examples(range(len(table)), take)


def _of_images(
    table: Any, image: str, label: str | None, source: str, folder: str | Path | None
) -> Examples:
    processor = _loaded("AutoImageProcessor", folder, "preprocessor_config.json for images", source)
    if not len(table):
        raise InputError(f"the column {image!r} of the data holds no text or image.")

    def take(rows: Sequence[int]) -> dict[str, Array]:
        part = table[list(rows)]
        colours = [picture.convert("RGB") for picture in part[image]]
        inputs = {"pixel_values": processor(colours, return_tensors="np")["pixel_values"]}
        if label:
            inputs["labels"] = np.asarray(part[label])
        return inputs

    return Examples(range(len(table)), take)


def _of_texts(
    table: Any, text: str, label: str | None, source: str, folder: str | Path | None
) -> Examples:
    tokenizer = _loaded("AutoTokenizer", folder, "tokenizer to read text with", source)
    if tokenizer.pad_token is None:  # any token will do: it is masked
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    longest = min(tokenizer.model_max_length, _MAX_TOKENS)
    with_text = [row for row, content in enumerate(table[text]) if content.strip()]
    if not with_text:
        raise InputError(f"the column {text!r} of the data holds no text or image.")

    def take(rows: Sequence[int]) -> dict[str, Array]:
        part = table[list(rows)]
        inputs = dict(
            tokenizer(
                part[text], return_tensors="np", padding=True, truncation=True, max_length=longest
            )
        )
        if label:
            inputs["labels"] = np.asarray(part[label])
        return inputs

    return Examples(with_text, take)


def _of_loader(loader: Any) -> Examples:
    held: list[dict[str, Array]] = []  # by row: batches may differ in length
    for batch in loader:
        if not isinstance(batch, Mapping):
            raise InputError(
                f"the DataLoader yields {type(batch).__name__}, not dictionaries of model inputs."
            )
        arrays = {name: _array(value) for name, value in batch.items()}
        for row in range(len(next(iter(arrays.values())))):
            held.append({name: array[row] for name, array in arrays.items()})
    if not held:
        raise InputError("the DataLoader yields nothing.")

    def take(rows: Sequence[int]) -> dict[str, Array]:
        return _stacked({name: [held[row][name] for row in rows] for name in held[0]})

    return Examples(range(len(held)), take)


def _stacked(columns: Mapping[str, Sequence[Array]]) -> dict[str, Array]:
    """Return rows as one batch: tokens of rows that differ in length are padded at the end.

    Raises:
        InputError: they differ, and no mask says what would be padding.
    """
    batch = {}
    for name, values in columns.items():
        if len({value.shape for value in values}) > 1:
            mask = "decoder_attention_mask" if name.startswith("decoder") else "attention_mask"
            is_marked = name == "labels" or mask in columns
            if values[0].ndim != 1 or not is_marked:
                raise InputError(
                    f"the rows of {name!r} differ in shape, and there is no {mask}: pad them."
                )
            values = _padded(values, IGNORED if name == "labels" else 0)
        batch[name] = np.stack(values)
    return batch


def _padded(rows: Sequence[Array], filler: int) -> list[Array]:
    longest = max(len(row) for row in rows)
    return [np.pad(row, (0, longest - len(row)), constant_values=filler) for row in rows]


def _array(values: Any) -> Array:
    """Return a sequence or a tensor of any device as an array."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
    return np.asarray(values)


def _is_a(value: Any, module: str, name: str) -> bool:
    """Tell whether a value is of a class of a package, which then has been imported."""
    kind = getattr(sys.modules.get(module), name, None)
    return kind is not None and isinstance(value, kind)


def _loaded(kind: str, folder: str | Path | None, what: str, source: str) -> Any:
    """Return the tokenizer or image processor of the model in ``folder``."""
    if not folder:
        raise InputError(f"{source} is text or images: give the folder of the model, with {what}.")
    transformers = _package("transformers", source)
    try:
        return getattr(transformers, kind).from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} has no {what}.") from error


def _package(name: str, source: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise InputError(
            f"{source} cannot be read without {name}: pip install 'ffmerge[torch]'."
        ) from error
