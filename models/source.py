"""A transformers model as it is stored: its folder, its configuration, its class, its companions.

Every command begins with :func:`resolve`, which makes a local folder of what the user gave. The
functions of ``models/checkpoint.py`` then read the configuration and ask for the class; no weights
are read here. Code that a folder brings is run only with consent, which is asked for before
transformers can ask: its own question reads stdin, and a piped ``y`` would be consent.
"""

import re
import shutil
from pathlib import Path
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, AutoConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto import modeling_auto

from ffmerge.errors import InputError
from ffmerge.files import read_json, sha256
from ffmerge.models import modeling_ffmerge

CODE = Path(modeling_ffmerge.__file__)

# Files that travel with a model: tokenizer, image processor, generation settings.
COMPANIONS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model",
    "*.spm", "preprocessor_config.json", "processor_config.json", "chat_template*",
    "generation_config.json",
)  # fmt: skip

# Where config.json names no class, the first of these that knows the model type decides.
_FALLBACKS = (
    modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_MAPPING_NAMES,
)


def resolve(source: str | Path, weights: bool = True, code: bool = False) -> Path:
    """Return the local folder of a model: the folder itself, or a hub id fetched to the cache.

    Raises:
        InputError: no such folder, and not a hub id that can be fetched.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", str(source)) or folder.exists():
        raise InputError(f"{source} is not a folder: give a checkpoint folder or a hub id.")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", modeling_ffmerge.OWN_FILE]
    if weights:
        patterns += ["*.safetensors", *COMPANIONS]
    if code:
        patterns += ["*.py"]
    try:
        return Path(snapshot_download(str(source), allow_patterns=patterns))
    except Exception as error:  # the hub client's errors have no common head across its releases
        raise InputError(
            f"{source} is not a local folder, and fetching it from the hub failed: "
            f"{first_line(error)}"
        ) from error


def read_config(folder: Path, trust_remote_code: bool = False) -> Any:
    """Return the transformers configuration in ``folder``.

    Raises:
        InputError: there is none, transformers does not know its model type, or the type is
            defined by code in the folder that there is no consent to run.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder} holds no config.json: give the folder of a transformers model.")
    stored = read_json(path)
    try:
        if stored.get("model_type") not in CONFIG_MAPPING and not trust_remote_code:
            _refuse_code(folder, stored.get("auto_map"))
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise InputError(f"{path} cannot be used: {first_line(error)}") from error


def model_class(config: Any, folder: Path, trust_remote_code: bool = False) -> Any:
    """Return the class that ``config.json`` names, or a usual one for its model type.

    With ``trust_remote_code``, a class that ``auto_map`` finds in the folder's own code comes
    first. The code that ffmerge writes is not needed here and never run.

    Raises:
        InputError: transformers has no such class, or it is in code that must not be run.
    """
    names = list(config.architectures or [])
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


def refuse_pickle(folder: Path) -> None:
    """Raise InputError unless the folder has weights, and has them as safetensors."""
    if any(folder.glob("*.safetensors")):
        return
    if any(path.suffix in (".bin", ".pt", ".pth", ".ckpt") for path in folder.iterdir()):
        raise InputError(
            f"{folder} holds its weights as pickles, which can run code: convert to safetensors."
        )
    raise InputError(f"{folder} holds no weights, no .safetensors file: they are needed for this.")


def copy_companions(source: Path, target: Path) -> None:
    """Copy tokenizer, processor and generation files that ``target`` does not have yet."""
    for pattern in COMPANIONS:
        for path in sorted(source.glob(pattern)):
            if path.is_file() and not (target / path.name).exists():
                shutil.copyfile(path, target / path.name)


def fingerprint(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of the weight files of a checkpoint, by file name."""
    return {path.name: sha256(path) for path in sorted(folder.glob("*.safetensors"))}


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
