"""An adapter of PEFT, merged into the model that it was trained for.

``checkpoint.load`` asks :func:`base_of` before anything is read, and gives the base model to
:func:`merged`. The base is the folder itself where it holds a model, else what the adapter names.
transformers would leave the adapter out in silence where peft is not installed.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ffmerge.errors import InputError, first_line
from ffmerge.files import read_json
from ffmerge.models.stored import is_inside

SETTINGS, ADAPTER = "adapter_config.json", "adapter_model.safetensors"


def base_of(folder: Path) -> str | None:
    """Return the base model that an adapter in ``folder`` is for; None: there is no adapter.

    Raises:
        InputError: there is one that cannot be merged, or a part of it.
    """
    if not (folder / SETTINGS).is_file():
        if (folder / ADAPTER).exists():
            raise InputError(f"{folder} holds an adapter, {ADAPTER}, without its {SETTINGS}.")
        return None
    settings = read_json(folder / SETTINGS)
    if find_spec("peft") is None:
        raise InputError(
            f"{folder} holds an adapter of PEFT ({SETTINGS}): pip install peft to have it merged, "
            "or remove it."
        )
    if not (folder / ADAPTER).is_file() or not is_inside(folder, folder / ADAPTER):
        raise InputError(f"{folder} holds {SETTINGS}, but no {ADAPTER} of its own beside it.")
    if (folder / "config.json").is_file():
        return str(folder)
    base = settings.get("base_model_name_or_path") if isinstance(settings, dict) else None
    if not isinstance(base, str) or not base:
        raise InputError(f"{folder / SETTINGS} does not name a base_model_name_or_path.")
    return base


@contextmanager
def without_adapter(folder: Path) -> Iterator[Path]:
    """Yield a folder that shows the files of ``folder`` but the adapter's, else ``folder``."""
    if not (folder / SETTINGS).is_file():
        yield folder
        return
    with TemporaryDirectory() as bare:
        for path in folder.iterdir():
            if not path.name.startswith("adapter_"):
                (Path(bare) / path.name).symlink_to(path.resolve())
        yield Path(bare)


def merged(model: Any, folder: Path) -> Any:
    """Return the model with the adapter in ``folder`` added to its weights.

    Raises:
        InputError: the adapter does not fit the model, or is of a kind that has no merged form.
    """
    import peft

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of keys: they are accounted for here
            settings = peft.PeftConfig.from_pretrained(folder)
            wrapped = peft.get_peft_model(model, settings)
            result = wrapped.load_adapter(folder, "default")
            if odd := [*result.missing_keys, *result.unexpected_keys]:
                raise InputError(
                    f"the adapter in {folder} does not fit {type(model).__name__}: {len(odd)} "
                    f"tensors differ, {min(odd)} among them."
                )
            return wrapped.merge_and_unload(safe_merge=True).requires_grad_()
    except InputError:
        raise
    except Exception as error:  # each kind of adapter raises errors of its own
        raise InputError(
            f"the adapter in {folder} cannot be merged: {first_line(error)}"
        ) from error
