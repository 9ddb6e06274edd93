"""What a command's natural mistakes meet, told from small files before torch is loaded.

``__main__`` asks :func:`check` before a command imports what needs torch, which takes seconds: the
output that is there, a model that is none, more layers than there are, a size that is out of
reach, a column that is missing, no tokenizer. Refused is only what is certain from the names and
shapes in the headers of safetensors files and the columns of a table; all else is for the command.
"""

import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ffmerge.config import (
    METHODS,
    ColumnsConfig,
    CompareConfig,
    CompressConfig,
    ExportConfig,
    LoadConfig,
    MergeConfig,
    Window,
    parse_budget,
)
from ffmerge.errors import FfmergeWarning, InputError
from ffmerge.files import read_json, refuse_existing
from ffmerge.models import tasks
from ffmerge.models.adapter import SETTINGS
from ffmerge.models.columns import check_named
from ffmerge.models.hub import fetch, is_id
from ffmerge.models.manifest import NAME
from ffmerge.models.packages import check_reader
from ffmerge.models.record import ALREADY
from ffmerge.models.sizes import beside, check_reach
from ffmerge.models.stored import GGUF, weight_files
from ffmerge.models.table import read_table, reading


@dataclass(frozen=True)
class Stored:
    """A checkpoint without its values: configuration, and the shapes of its weights by name."""

    folder: Path
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]


def check(
    source: str,
    load: LoadConfig,
    config: Any,
    columns: ColumnsConfig = ColumnsConfig(),
    *data: str | None,
) -> None:
    """Raise InputError at what a command cannot do with a checkpoint and data, if it is certain.

    ``config`` are the command's settings: what merges, compresses, exports or compares.
    """
    if find_spec("torch") is None:
        return  # the command says so
    if getattr(config, "task", None):
        tasks.check(config.task)
    if isinstance(config, CompareConfig):
        _check_method(config.method)
    stored = _stored(source, load)
    if stored is None:
        return
    if isinstance(config, CompareConfig):
        _check_layers(stored, config)
    if isinstance(config, CompressConfig) and not load.ignore_unexpected:
        _check_size(stored, config.size)
    task = getattr(config, "task", None) or _task(stored.config)
    if isinstance(config, ExportConfig) and task is not None:
        tasks.check_grows(task, config.profiles)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FfmergeWarning)  # the command says them
        for each in data:
            if each:
                _check_data(each, stored.folder, task, columns)


def check_output(out: Path | None, overwrite: bool = False) -> None:
    """Raise InputError at an output that is there, unless compress may replace an earlier one."""
    if out is None:
        return
    if not overwrite:
        refuse_existing(out)
    elif out.exists() and not (out / "package" / NAME).is_file():
        raise InputError(f"{out} is not what compress wrote: remove it or choose another output.")


def _check_method(name: str) -> None:
    others = {each.name for each in entry_points(group="ffmerge.methods")}
    if name not in METHODS and name not in others:
        known = ", ".join((*METHODS, *sorted(others)))
        raise InputError(f"there is no method {name!r}: choose one of {known}.")


def _stored(source: str, load: LoadConfig) -> Stored | None:
    """Return what is stored; None of what is no plain checkpoint: a GGUF file, an adapter, code.

    Raises:
        InputError: there is no such folder, or no weights that can be read in it.
    """
    folder = folder_of(source, load)
    if folder is None:
        return None
    file = folder / "config.json"
    if not file.is_file() or (folder / SETTINGS).exists() or any(folder.glob(f"*{GGUF}")):
        return None
    config = read_json(file)
    if not isinstance(config, dict):
        return None
    shapes = {}
    here = Path(source).expanduser().is_dir()  # of the hub weights are not fetched yet
    if here and "ffmerge" not in config and "quantization_config" not in config:
        shapes = _shapes(weight_files(folder))
    return Stored(folder, config, shapes)


def folder_of(source: str, load: LoadConfig) -> Path | None:
    """Return the folder of a checkpoint, of one of the hub without its weights; None of a file.

    Raises:
        InputError: there is none.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path / load.subfolder
    if path.exists():
        return None
    if is_id(source):
        return fetch(source, load, weights=False)
    raise InputError(
        f"{source} is not a folder: give a checkpoint folder, a {GGUF} file or a hub id."
    )


def _shapes(files: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors in safetensors files, from their headers."""
    shapes = {}
    for file in files:
        try:
            with safe_open(file, framework="numpy") as header:
                for name in header.keys():
                    part = header.get_slice(name)
                    if part.get_dtype().startswith(("F", "BF")):
                        shapes[name] = tuple(part.get_shape())
        except (SafetensorError, OSError):
            return {}  # the command says what is wrong
    return shapes


def _blocks(names: Iterable[str]) -> dict[str, set[int]]:
    """Return by its path the numbers of every list of modules that tensors stand in."""
    found = defaultdict(set)
    for name in names:
        for match in re.finditer(r"\.(\d+)(?=\.)", name):
            found[name[: match.start()]].add(int(match[1]))
    return found


def _check_layers(stored: Stored, config: CompareConfig) -> None:
    """Raise InputError at more layers, or later ones, than any list of blocks has."""
    merged = stored.config.get("ffmerge")
    if merged:
        takes = isinstance(config, MergeConfig) and config.method == "narrow"
        if not takes or merged.get("narrowed"):
            raise InputError(ALREADY)
    blocks = _blocks(stored.shapes)
    if not blocks:
        return
    longest = max(blocks, key=lambda path: (len(blocks[path]), path))
    size = len(blocks[longest])
    if size < 2:
        return
    if config.k is not None and not 2 <= config.k <= size:
        raise InputError(
            f"k = {config.k} does not fit: {longest} has {size} layers, so k is 2 to {size}."
        )
    latest = max(max(numbers) for numbers in blocks.values())
    for first, last in _windows(config):
        if last > latest:
            raise InputError(
                f"window {first}-{last} is out of range: {longest} has layers 0 to {size - 1}."
            )


def _windows(config: CompareConfig) -> list[Window]:
    window = getattr(config, "window", None)
    if window is None:
        return []
    if isinstance(window, Mapping):
        return list(window.values())
    return [window]


def _check_size(stored: Stored, size: str) -> None:
    """Raise InputError at a size that even the least that the weights can be is above."""
    shapes = _certain(stored.shapes)
    if shapes and not size.endswith("%"):
        check_reach(shapes, parse_budget(size, 0), beside(shapes, stored.folder))


def _certain(shapes: Mapping[str, tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Return the shapes of tensors that are parameters of their own for certain.

    Outside of blocks those of one shape may be one (the tables of what is read and written), and
    what has more than two axes and is no weight may be a constant.
    """
    inside, outside = [], set()
    for name, shape in shapes.items():
        if len(shape) > 2 and not name.endswith("weight"):
            continue
        if re.search(r"\.\d+\.", name):
            inside.append(shape)
        elif prod(shape) > 0:
            outside.add(shape)
    return [*inside, *sorted(outside)]


def _task(config: Mapping[str, Any]) -> str | None:
    """Return the task that the name of the model's class tells, if it does."""
    names = config.get("architectures") or [""]
    return tasks.by_head(str(names[0]))


def _check_data(source: str, folder: Path, task: str | None, columns: ColumnsConfig) -> None:
    """Raise InputError at a table that cannot be read, lacks a column, or has no reader."""
    path = Path(source).expanduser()
    if path.suffix == ".npz":
        return
    table = read_table(source, path)
    if task is None:
        check_named(table, source, columns)
        return
    found = reading(table, source, folder, task, columns)
    if found.reader:
        check_reader(found.reader, folder, source)
