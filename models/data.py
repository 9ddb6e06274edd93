"""Data of any kind as model inputs: what a user gives in, rows that become numpy arrays out.

Every function that takes data calls :func:`as_examples`, or :func:`examples_for` where it has the
model, at its entry, and works with the :class:`Examples` it returns: numbered rows, of which any
can be had as a batch ``{input name: array}``, with ``labels`` where they are known. Text is
tokenized and images are processed when their rows are asked for.

transformers, datasets and torch are imported only where the data needs them.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, overload

from ffmerge.config import ColumnsConfig
from ffmerge.errors import InputError
from ffmerge.models.batching import array_of, stacked
from ffmerge.models.examples import Examples, check_finite, from_arrays
from ffmerge.models.npz import read_npz
from ffmerge.models.probe import Array
from ffmerge.models.table import of_table, read_table
from ffmerge.models.tasks import task_of

if TYPE_CHECKING:
    from datasets import Dataset
    from torch.utils.data import DataLoader

    Data: TypeAlias = Examples | Mapping[str, Array] | Dataset | DataLoader[Any] | str | Path
else:
    Data = Any  # at run time neither package need be there


def as_examples(
    data: Data,
    folder: str | Path | None = None,
    task: str | None = None,
    columns: ColumnsConfig = ColumnsConfig(),
) -> Examples:
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
        return read(str(data), folder, task, columns)
    if _is_a(data, "datasets", "Dataset"):
        return of_table(data, "the data set", folder, task, columns)
    if _is_a(data, "torch.utils.data", "DataLoader"):
        return _of_loader(data)
    if isinstance(data, Mapping) and not _is_a(data, "datasets", "DatasetDict"):
        return from_arrays({name: array_of(values) for name, values in data.items()})
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
    return as_examples(data, model.name_or_path, task_of(model, task))


def read(
    source: str,
    folder: str | Path | None,
    task: str | None,
    columns: ColumnsConfig = ColumnsConfig(),
) -> Examples:
    """Return the examples in ``source`` as inputs of the model in ``folder``.

    ``source`` is an ``.npz`` of model inputs, a text, jsonl, csv, tsv or parquet file, a folder of
    images or sounds (one sub-folder per class), or a hub data set written ``ID:SPLIT``.

    Raises:
        InputError: the source cannot be read, or holds nothing the model takes.
    """
    path = Path(source).expanduser()
    if path.suffix == ".npz":
        try:
            return from_arrays(read_npz(path))
        except InputError as error:
            raise InputError(_with_name(str(error), path)) from error
    return of_table(read_table(source, path), source, folder, task, columns)


def _with_name(said: str, path: Path) -> str:
    return said if str(path) in said else f"{path}: {said}"


def _of_loader(loader: Any) -> Examples:
    held: list[dict[str, Array]] = []  # by row: batches may differ in length
    for batch in loader:
        if not isinstance(batch, Mapping):
            raise InputError(
                f"the DataLoader yields {type(batch).__name__}, not dictionaries of model inputs."
            )
        arrays = {name: array_of(value) for name, value in batch.items()}
        for row in range(len(next(iter(arrays.values())))):
            held.append({name: array[row] for name, array in arrays.items()})
            check_finite({name: array[None] for name, array in held[-1].items()}, [len(held) - 1])
    if not held:
        raise InputError("the DataLoader yields nothing.")

    def take(rows: Sequence[int]) -> dict[str, Array]:
        return stacked({name: [held[row][name] for row in rows] for name in held[0]})

    return Examples(range(len(held)), take)


def _is_a(value: Any, module: str, name: str) -> bool:
    """Tell whether a value is of a class of a package, which then has been imported."""
    kind = getattr(sys.modules.get(module), name, None)
    return kind is not None and isinstance(value, kind)
