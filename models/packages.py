"""What reads text, pictures and sound: packages of the extra ``torch``, processors of a model."""

from importlib import import_module
from pathlib import Path
from typing import Any

from ffmerge.errors import InputError


def package(name: str, source: str, install: str = "'ffmerge[torch]'") -> Any:
    """Return a package that reads the data in ``source``.

    Raises:
        InputError: it is not installed; the way to get it is said.
    """
    try:
        return import_module(name)
    except (ImportError, OSError) as error:  # OSError: a library of the system that it needs
        raise InputError(
            f"{source} cannot be read without {name}: pip install {install}."
        ) from error


def of_model(kind: str, folder: str | Path | None, what: str, source: str) -> Any:
    """Return the tokenizer, image processor or feature extractor of the model in ``folder``.

    Raises:
        InputError: there is none.
    """
    if not folder:
        raise InputError(
            f"{source} is text, images or sound: give the folder of the model, with {what}."
        )
    transformers = package("transformers", source)
    try:
        return getattr(transformers, kind).from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # each processor raises errors of its own for files it cannot use
        raise InputError(f"{folder} has no {what}.") from error
