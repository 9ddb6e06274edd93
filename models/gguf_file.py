"""A GGUF file, as llama.cpp stores a model, as a folder that transformers reads.

``source.resolve`` calls :func:`opened`; the folder it makes has configuration and tokenizer as
transformers reads them from the file, and a link to the file. ``checkpoint.load`` gives that folder
to :func:`model_of`, which unpacks the weights to float32.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer

from ffmerge.errors import InputError, first_line
from ffmerge.models.stored import GGUF

_opened: dict[Path, TemporaryDirectory[str]] = {}  # by file; each is removed when the process ends


def of(folder: Path) -> Path | None:
    """Return the GGUF file in a folder of a user that holds no other weights.

    Raises:
        InputError: there are several.
    """
    if is_opened(folder) or any(folder.glob("*.safetensors")):
        return None
    found = sorted(folder.glob(f"*{GGUF}"))
    if len(found) > 1:
        raise InputError(f"{folder} holds {len(found)} {GGUF} files: give the path of one of them.")
    return found[0] if found else None


def is_opened(folder: Path) -> bool:
    """Tell whether a folder is one that :func:`opened` made."""
    return str(folder) in {held.name for held in _opened.values()}


def opened(file: Path) -> Path:
    """Return a folder with the configuration and the tokenizer of a GGUF file, and a link to it.

    Raises:
        InputError: the file cannot be read, or a package that reads it is missing.
    """
    file = file.resolve()
    if file in _opened:
        return Path(_opened[file].name)
    if find_spec("gguf") is None:
        raise InputError(f"{file} cannot be read without gguf: pip install gguf.")
    held = TemporaryDirectory(prefix="ffmerge-gguf-")
    folder = Path(held.name)
    given = {"gguf_file": file.name}
    with _one_sentence(file):
        AutoConfig.from_pretrained(file.parent, **given).save_pretrained(folder)
        AutoTokenizer.from_pretrained(file.parent, **given).save_pretrained(folder)
    (folder / file.name).symlink_to(file)
    _opened[file] = held
    return folder


def model_of(kind: Any, folder: Path, config: Any) -> tuple[Any, dict[str, Any]]:
    """Return a class with the weights of the file that was opened, and what was loaded of it.

    It is a plain model: transformers keeps one that was read from GGUF from being saved.
    """
    file = next(folder.glob(f"*{GGUF}"))
    options: dict[str, Any] = {"gguf_file": file.name, "config": config, "dtype": torch.float32}
    if hasattr(transformers, "GgufConfig"):  # newer releases can leave the weights packed
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with _one_sentence(file):
        model, info = kind.from_pretrained(folder, **options, output_loading_info=True)
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    return model, info


@contextmanager
def _one_sentence(file: Path) -> Iterator[None]:
    """Turn what goes wrong in a block into an InputError that names the file."""
    try:
        with warnings.catch_warnings(), redirect_stderr(StringIO()):  # it draws bars there
            warnings.simplefilter("ignore")
            yield
    except Exception as error:  # a reader of others, for a format of many forms
        raise InputError(f"{file} cannot be read as {GGUF}: {first_line(error)}") from error
