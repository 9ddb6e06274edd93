"""Checkpoints: open any transformers model, save a merged one once per tie, load it back exactly.

A merged checkpoint is ``config.json`` with the merge record under ``ffmerge`` and weights in
``model.ffmerge.safetensors``. transformers calls such an infix a variant: a plain loader finds
no ``model.safetensors`` and stops, instead of filling the left-out members with random values.
"""

import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig
from transformers.models.auto import modeling_auto

from ffmerge.errors import InputError
from ffmerge.files import sha256, staged
from ffmerge.models import ties
from ffmerge.models.plan import MergeRecord

VARIANT = "ffmerge"

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


def resolve(source: str | Path, weights: bool = True) -> Path:
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

    patterns = ["*.json", *(("*.safetensors", *COMPANIONS) if weights else ())]
    try:
        return Path(snapshot_download(str(source), allow_patterns=patterns))
    except Exception as error:  # the hub client's errors have no common head across its releases
        raise InputError(
            f"{source} is not a local folder, and fetching it from the hub failed: {_line(error)}"
        ) from error


def read_config(folder: Path) -> Any:
    """Return the transformers configuration in ``folder``.

    Raises:
        InputError: there is none, or transformers does not know its model type.
    """
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} holds no config.json: give the folder of a transformers model.")
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder}/config.json cannot be used: {_line(error)}") from error


def merge_record(config: Any) -> MergeRecord | None:
    """Return what a merge recorded in a configuration, None where nothing is merged."""
    value = getattr(config, "ffmerge", None)
    return MergeRecord.from_json(value) if value else None


def model_class(config: Any) -> Any:
    """Return the class that ``config.json`` names, or a usual one for its model type.

    Raises:
        InputError: transformers has no such class.
    """
    names = list(config.architectures or [])
    names += [table[config.model_type] for table in _FALLBACKS if config.model_type in table]
    name = names[0] if names else f"a model of type {config.model_type!r}"
    found = getattr(transformers, name, None)
    if found is None:
        raise InputError(f"transformers {transformers.__version__} has no class {name}.")
    return found


def skeleton(source: str | Path) -> Any:
    """Return the model on the meta device, ties in place: every shape, no weights allocated."""
    config = read_config(resolve(source, weights=False))
    return _skeleton(config)


def load(source: str | Path) -> Any:
    """Return the model of a checkpoint in evaluation mode; a merged one comes back tied.

    Raises:
        InputError: files are missing, truncated, not safetensors, or leave a parameter unset.
    """
    folder = resolve(source)
    config = read_config(folder)
    record = merge_record(config)
    try:
        with _quiet():
            model, info = model_class(config).from_pretrained(
                folder, config=config, variant=VARIANT if record else None,
                use_safetensors=True, dtype="auto", output_loading_info=True,
            )  # fmt: skip
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{folder} cannot be loaded: {_line(error)}") from error
    unset = set(info["missing_keys"])
    if record:
        ties.retie_(model, record)
        unset -= ties.dropped_names(model, record)
    if unset:
        raise InputError(
            f"{folder} holds no value for {len(unset)} parameters, {min(unset)} among them."
        )
    return model.eval()


def save(model: Any, target: str | Path, companions_from: Path | None = None) -> None:
    """Write a checkpoint that stores every tie once, with tokenizer and processor files.

    Raises:
        TieError: a recorded group no longer shares its parameters.
        InputError: ``target`` exists or cannot be written.
    """
    record = merge_record(model.config)
    with staged(Path(target)) as folder:
        if record:
            ties.check(model, record)
            left_out = ties.dropped_names(model, record)
            state = {k: v for k, v in model.state_dict().items() if k not in left_out}
            model.save_pretrained(folder, state_dict=state, variant=VARIANT)
        else:
            model.save_pretrained(folder)
        if companions_from:
            copy_companions(companions_from, folder)


def copy_companions(source: Path, target: Path) -> None:
    """Copy tokenizer, processor and generation files that ``target`` does not have yet."""
    for pattern in COMPANIONS:
        for path in sorted(source.glob(pattern)):
            if path.is_file() and not (target / path.name).exists():
                shutil.copyfile(path, target / path.name)


def fingerprint(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of the weight files of a checkpoint, by file name."""
    return {path.name: sha256(path) for path in sorted(folder.glob("*.safetensors"))}


def _skeleton(config: Any) -> Any:
    with torch.device("meta"):
        model = model_class(config)(config).eval()
    record = merge_record(config)
    if record:
        ties.retie_(model, record)
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from warning of unset parameters: ``load`` accounts for each of them."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _line(error: BaseException) -> str:
    """Return the first line of an error's message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
