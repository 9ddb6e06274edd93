"""What reads text, pictures and sound: packages of the extra ``torch``, processors of a model."""

from importlib import import_module
from pathlib import Path
from typing import Any

from ffmerge.errors import InputError
from ffmerge.files import read_json
from ffmerge.models.companions import is_companion

# what reads data, by its class in transformers, and what of it a folder lacks
READERS = {
    "AutoTokenizer": "tokenizer to read text with",
    "AutoImageProcessor": "preprocessor_config.json for images",
    "AutoFeatureExtractor": "preprocessor_config.json for sound",
}
_PROCESSORS = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
_IN_CONFIG = ("image_processor_type", "feature_extractor_type", "pretrained_cfg")
_NO_TOKENIZER = (*_PROCESSORS, "generation_config.json", "README.md", "LICENSE")


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


def check_reader(kind: str, folder: str | Path | None, source: str) -> None:
    """Raise InputError where no file of the model's folder can be what reads the data.

    Whether one that is there can be used is known when it is loaded (:func:`of_model`).
    """
    if not folder:
        raise InputError(
            f"{source} is text, images or sound: give the folder of the model, with "
            f"{READERS[kind]}."
        )
    folder = Path(folder)
    if not folder.is_dir():
        return
    names = {path.name for path in folder.iterdir()}
    if kind == "AutoTokenizer":
        there = any(is_companion(name, 0) and name not in _NO_TOKENIZER for name in names)
    else:
        there = not names.isdisjoint(_PROCESSORS) or _processed_as_configured(folder)
    if not there:
        raise InputError(f"{folder} has no {READERS[kind]}.")


def _processed_as_configured(folder: Path) -> bool:
    """Tell whether the configuration itself may say how pictures or sound are processed."""
    file = folder / "config.json"
    if not file.is_file():
        return True
    found = read_json(file)
    return "model_type" not in found or any(name in found for name in _IN_CONFIG)


def of_model(kind: str, folder: str | Path | None, source: str) -> Any:
    """Return the tokenizer, image processor or feature extractor of the model in ``folder``.

    Raises:
        InputError: there is none.
    """
    check_reader(kind, folder, source)
    transformers = package("transformers", source)
    try:
        return getattr(transformers, kind).from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # each processor raises errors of its own for files it cannot use
        raise InputError(f"{folder} has no {READERS[kind]}.") from error
