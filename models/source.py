"""A transformers model as it is stored: its folder, its configuration, its class.

Every command begins with :func:`resolve`, which makes a local folder of what the user gave. The
functions of ``models/checkpoint.py`` then read the configuration and ask for the class; no weights
are read here. Code that a folder brings is run only with consent, which is asked for before
transformers can ask: its own question reads stdin, and a piped ``y`` would be consent.
"""

from pathlib import Path
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, AutoConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto import modeling_auto

from ffmerge.config import LoadConfig
from ffmerge.errors import InputError, first_line
from ffmerge.files import read_json, sha256
from ffmerge.models import gguf_file, modeling_ffmerge
from ffmerge.models.adapter import SETTINGS
from ffmerge.models.hub import fetch, is_id
from ffmerge.models.stored import GGUF

_LAYERS = 10_000  # more are a mistake
CODE = Path(modeling_ffmerge.__file__)

# Where config.json names no class, the first of these that knows the model type decides.
_FALLBACKS = (
    modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_MAPPING_NAMES,
)


def resolve(source: str | Path, options: LoadConfig = LoadConfig(), weights: bool = True) -> Path:
    """Return the local folder of a model: itself, of a GGUF file, or of a hub id, fetched.

    Without ``weights`` only what tells the structure is fetched.

    Raises:
        InputError: no such folder, and not a hub id that can be fetched.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        path = path / options.subfolder
        if not path.is_dir():
            raise InputError(f"{path} is not a folder: give another sub-folder.")
        if options.revision:
            raise InputError(f"{source} is a local folder, which has no revision: leave it out.")
    elif not path.exists() and is_id(str(source)):
        path = fetch(str(source), options, weights)
    if path.is_file() and path.suffix == GGUF:
        return gguf_file.opened(path)
    if not path.is_dir():
        raise InputError(
            f"{source} is not a folder: give a checkpoint folder, a {GGUF} file or a hub id."
        )
    packed = gguf_file.of(path)
    return gguf_file.opened(packed) if packed else path


def read_config(folder: Path, trust_remote_code: bool = False) -> Any:
    """Return the transformers configuration in ``folder``.

    Raises:
        InputError: there is none, transformers does not know its model type, or the type is
            defined by code in the folder that there is no consent to run.
    """
    path = folder / "config.json"
    if not path.is_file() and (folder / SETTINGS).is_file():
        raise InputError(f"{folder} holds only an adapter: give the model that {SETTINGS} names.")
    if not path.is_file():
        raise InputError(f"{folder} holds no config.json: give the folder of a transformers model.")
    stored = read_json(path)
    _check_depth(path, stored)
    try:
        if stored.get("model_type") not in CONFIG_MAPPING and not trust_remote_code:
            _refuse_code(folder, stored.get("auto_map"))
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except InputError:
        raise
    except Exception as error:  # each class checks its values in a way of its own
        raise InputError(f"{path} cannot be used: {first_line(error)}") from error


def _check_depth(path: Path, stored: Any) -> None:
    """Raise InputError at a number of layers that no model has: it would be made layer by layer."""
    if not isinstance(stored, dict):
        return
    for name, value in stored.items():
        _check_depth(path, value)
        if "layer" in name and isinstance(value, int) and value > _LAYERS:
            raise InputError(f"{path} cannot be used: {name} is {value}.")


def model_class(config: Any, folder: Path, trust_remote_code: bool = False) -> Any:
    """Return the class that ``config.json`` names, or a usual one for its model type.

    With ``trust_remote_code``, a class that ``auto_map`` finds in the folder's own code comes
    first. The code that ffmerge writes is not needed here and never run.

    Raises:
        InputError: transformers has no such class, or it is in code that must not be run.
    """
    names = _class_names(config, folder)
    remote = _remote_classes(getattr(config, "auto_map", None))
    if remote and trust_remote_code:
        return _class_from_code(remote, names, folder)
    for table in _FALLBACKS:
        if config.model_type in table:
            names.append(table[config.model_type])
    name = names[0] if names else f"a model of type {config.model_type!r}"
    found = getattr(transformers, name, None)
    if found is None:
        _refuse_code(folder, remote)
        raise InputError(f"transformers {transformers.__version__} has no class {name}.")
    return found


def _class_names(config: Any, folder: Path) -> list[str]:
    """Return the classes that ``config.json`` names, none if it does not."""
    names = config.architectures or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{folder / 'config.json'}: architectures must be a list of class names.")
    return [*names]


def _class_from_code(remote: list[str], names: list[str], folder: Path) -> Any:
    """Return the first of the ``remote`` classes that the configuration names, else the first."""
    named = [reference for reference in remote if reference.rpartition(".")[2] in names]
    try:
        found = get_class_from_dynamic_module((named or remote)[0], folder)
    except Exception as error:  # whatever the code of others raises
        raise InputError(f"the code in {folder} cannot be used: {first_line(error)}") from error
    found.register_for_auto_class()  # so that saving copies the code
    return found


def _remote_classes(auto_map: Any) -> list[str]:
    """Return the model classes that a configuration finds in code other than ffmerge's."""
    classes = (auto_map or {}).items()
    return [c for auto, c in classes if auto.startswith("AutoModel") and CODE.stem not in c]


def _refuse_code(folder: Path, code: Any) -> None:
    if code:
        raise InputError(
            f"{folder} brings code of its own: read it, then give --trust-remote-code "
            "(trust_remote_code=True in Python) to run it."
        )


def fingerprint(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of the weight files of a checkpoint, by file name."""
    files = [*folder.glob("*.safetensors"), *folder.glob(f"*{GGUF}")]
    return {path.name: sha256(path) for path in sorted(files)}
