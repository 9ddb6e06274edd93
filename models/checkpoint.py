"""Checkpoints: open any transformers model, save a merged one once per tie, load it back exactly.

A merged checkpoint is ``config.json`` with the merge record under ``ffmerge`` and weights in
``model.ffmerge.safetensors``. transformers calls such an infix a variant: a plain loader finds
no ``model.safetensors`` and stops, instead of filling the left-out members with random values.
One that is told the variant stops at the empty tensors that stand for these members: it reports
sizes that differ, where a name that is missing would only be a warning.
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
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING, AutoConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D

from ffmerge.errors import InputError
from ffmerge.files import read_json, sha256, staged, write_json
from ffmerge.models import modeling_ffmerge, ties
from ffmerge.models.record import Group, MergeRecord

VARIANT = "ffmerge"
_CODE = Path(modeling_ffmerge.__file__)

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

    patterns = [
        "*.json",
        modeling_ffmerge.OWN,
        *(("*.safetensors", *COMPANIONS) if weights else ()),
    ]
    patterns += ["*.py"] if code else []
    try:
        return Path(snapshot_download(str(source), allow_patterns=patterns))
    except Exception as error:  # the hub client's errors have no common head across its releases
        raise InputError(
            f"{source} is not a local folder, and fetching it from the hub failed: {_line(error)}"
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
        raise InputError(f"{path} cannot be used: {_line(error)}") from error


def merge_record(config: Any) -> MergeRecord | None:
    """Return what a merge recorded in a configuration, None where nothing is merged."""
    value = getattr(config, "ffmerge", None)
    return MergeRecord.from_json(value) if value else None


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
        named = [ref for ref in remote if ref.rpartition(".")[2] in names]
        try:
            found = get_class_from_dynamic_module((named or remote)[0], folder)
        except Exception as error:  # whatever the code of others raises
            raise InputError(f"the code in {folder} cannot be used: {_line(error)}") from error
        found.register_for_auto_class()  # so that saving copies the code
        return found
    names += [table[config.model_type] for table in _FALLBACKS if config.model_type in table]
    name = names[0] if names else f"a model of type {config.model_type!r}"
    found = getattr(transformers, name, None)
    if found is None:
        _refuse_code(folder, remote)
        raise InputError(f"transformers {transformers.__version__} has no class {name}.")
    return found


def skeleton(source: str | Path, trust_remote_code: bool = False) -> Any:
    """Return the model on the meta device, ties in place: every shape, no weights allocated."""
    folder = resolve(source, weights=False, code=trust_remote_code)
    model = without_weights(folder, trust_remote_code)
    record = merge_record(model.config)
    if record:
        _retie_(model, record, folder)
    return model


def without_weights(folder: Path, trust_remote_code: bool = False) -> Any:
    """Return the class that ``config.json`` names, on the meta device, nothing tied."""
    config = read_config(folder, trust_remote_code)
    with torch.device("meta"):
        return model_class(config, folder, trust_remote_code)(config).eval()


def load(source: str | Path, trust_remote_code: bool = False) -> Any:
    """Return the model of a checkpoint in evaluation mode; a merged one comes back tied.

    Code that comes with a checkpoint is run only with ``trust_remote_code``; what ffmerge saved
    from a class of transformers needs none.

    Raises:
        InputError: files are missing, truncated, not safetensors, or leave a parameter unset.
        TieError: an expanded checkpoint's copies differ.
    """
    folder = resolve(source, code=trust_remote_code)
    config = read_config(folder, trust_remote_code)
    record = merge_record(config)
    _refuse_pickle(folder)
    once = record is not None and any(folder.glob(f"model.{VARIANT}*.safetensors"))
    try:
        with _quiet():
            model, info = model_class(config, folder, trust_remote_code).from_pretrained(
                folder, config=config, variant=VARIANT if once else None, use_safetensors=True,
                dtype="auto", output_loading_info=True, ignore_mismatched_sizes=once,
            )  # fmt: skip
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{folder} cannot be loaded: {_line(error)}") from error
    empty = {key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]}
    # one release stores tables of indices that another computes
    computed = {name for name, buffer in model.named_buffers() if not buffer.is_floating_point()}
    unset = empty | set(info["missing_keys"]) - computed
    if record:
        unset ^= ties.dropped_names(model, record) if once else set()
        if not once:
            ties.check(model, record, torch.equal)
        _retie_(model, record, folder)
    if unset:
        raise InputError(
            f"{folder} does not hold the parameters its config.json describes: {len(unset)} "
            f"differ, {min(unset)} among them."
        )
    return model.eval()


def save(
    model: Any,
    target: str | Path,
    companions_from: Path | None = None,
    *,
    expanded: bool = False,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write a checkpoint that stores every tie once, with tokenizer and processor files.

    ``expanded`` writes every member of a tie instead: any loader reads that, :func:`load` ties
    it again. Where layers have parts of their own these are multiplied out: the copies differ, so
    it is a plain checkpoint that shares nothing. A file grows to ``max_shard_size`` bytes at most.

    Raises:
        TieError: a recorded group no longer shares its parameters.
        InputError: ``target`` exists or cannot be written, or no plain class holds the layers.
    """
    record = merge_record(model.config)
    settings: dict[str, Any] = {"max_shard_size": max_shard_size}
    own: dict[str, Any] = {}
    if record:
        ties.check(model, record)
        state = model.state_dict()
        if expanded and record.own:
            _fold(model, state)
        own = modeling_ffmerge.pop_own(model, ties.maps_of(model, record), state)
        for name in ties.dropped_names(model, record):
            state[name] = state[name].clone() if expanded else state[name].new_empty(0)
        settings |= {"state_dict": state, "variant": None if expanded else VARIANT}
    with staged(Path(target)) as folder:
        model.save_pretrained(folder, **settings)
        if own and expanded:  # the copies differ: there is nothing to tie again
            config = read_json(folder / "config.json")
            del config["ffmerge"]
            write_json(folder / "config.json", config)
        elif own:
            save_file(own, folder / modeling_ffmerge.OWN)
        if record and isinstance(model, getattr(transformers, type(model).__name__, ())):
            _add_code(model, record, folder, expanded)
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


def _add_code(model: Any, record: MergeRecord, folder: Path, expanded: bool) -> None:
    """Let ``from_pretrained(..., trust_remote_code=True)`` find a class that ties, if need be."""
    config = read_json(folder / "config.json")
    config.pop("auto_map", None)
    (folder / _CODE.name).unlink(missing_ok=True)
    if not expanded:
        name = type(model).__name__
        autos = [
            auto
            for auto, value in vars(modeling_auto).items()
            if auto.startswith("AutoModel")  # the value is one class, or several
            and f".{name}'>" in str(value._model_mapping.get(type(model.config), ""))
        ]
        config["auto_map"] = dict.fromkeys(autos or ["AutoModel"], f"{_CODE.stem}.{name}")
        code = _CODE.read_text(encoding="utf-8").replace("PreTrainedModel", name)
        rules = [_rule(model, group) for group in record.groups]
        (folder / _CODE.name).write_text(code.replace("]] = []", f"]] = {rules!r}"), "utf-8")
    write_json(folder / "config.json", dict(sorted(config.items())))


def _rule(model: Any, group: Group) -> tuple[tuple[str, ...], int, tuple[int, ...]]:
    """Return a group as the generated code reads it, without names that a release may change."""
    first, second, *_ = (m.weights[0].name.split(".") for m in ties.members_of(model, group))
    place = next(i for i, parts in enumerate(zip(first, second, strict=True)) if len({*parts}) > 1)
    words = () if group.stack == "layers" else tuple(group.stack.split("."))
    return words, sum(part.isdigit() for part in first[:place]), group.layers


def _fold(model: Any, state: dict[str, Any]) -> None:
    """Put into each map's own weight what it adds to the shared one."""
    for name, module in model.named_modules():
        own = getattr(module, "own", ())
        if "bias" in own:
            raise InputError(
                f"{type(model).__name__} has no biases to hold what each layer has for itself: "
                "save without --expanded, or merge by permute."
            )
        if own:
            weight = module.weight.detach()
            rows = weight.T if isinstance(module, Conv1D) else weight
            rows = rows * module.scale[:, None] if "scale" in own else rows
            rows = rows + module.up @ module.down if "down" in own else rows
            state[f"{name}.weight"] = (rows.T if isinstance(module, Conv1D) else rows).detach()


def _retie_(model: Any, record: MergeRecord, folder: Path) -> None:
    """Tie a loaded model, and give its layers what is their own."""
    ties.retie_(model, record)
    file, maps = folder / modeling_ffmerge.OWN, ties.maps_of(model, record)
    if modeling_ffmerge.in_file(maps, record.own):
        try:
            modeling_ffmerge.load_own_(maps, record.own, file)
        except (OSError, ValueError, SafetensorError) as error:
            raise InputError(f"{file} cannot be used: {_line(error)}") from error


def _remote_classes(auto_map: Any) -> list[str]:
    """Return the model classes that a configuration finds in code other than ffmerge's."""
    classes = (auto_map or {}).items()
    return [c for auto, c in classes if auto.startswith("AutoModel") and _CODE.stem not in c]


def _refuse_code(folder: Path, code: Any) -> None:
    if code:
        raise InputError(
            f"{folder} brings code of its own: read it, then give --trust-remote-code "
            "(trust_remote_code=True in Python) to run it."
        )


def _refuse_pickle(folder: Path) -> None:
    if not any(folder.glob("*.safetensors")):
        pickles = any(path.suffix in (".bin", ".pt", ".pth", ".ckpt") for path in folder.iterdir())
        raise InputError(
            f"{folder} holds its weights as pickles, which can run code: convert to safetensors."
            if pickles
            else f"{folder} holds no weights, no .safetensors file: they are needed for this."
        )


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
