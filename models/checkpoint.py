"""Checkpoints: open any transformers model, save a merged one once per tie, load it back exactly.

A merged checkpoint is ``config.json`` with the merge record under ``ffmerge`` and weights in
``model.ffmerge.safetensors``. transformers calls such an infix a variant: a plain loader finds
no ``model.safetensors`` and stops, instead of filling the left-out members with random values.
One that is told the variant stops at the empty tensors that stand for these members: it reports
sizes that differ, where a name that is missing would only be a warning.

Loading a merged checkpoint: transformers fills the model, its sublayers are found, the members of
the recorded groups get their anchor's parameters. Saving goes the other way round: find, check that
every group still shares, empty the members. Either finds the sublayers once.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D

from ffmerge.errors import InputError
from ffmerge.files import read_json, staged, write_json
from ffmerge.models import modeling_ffmerge, ties
from ffmerge.models.find import find
from ffmerge.models.record import Group, MergeRecord, merge_record
from ffmerge.models.source import (
    CODE,
    copy_companions,
    first_line,
    model_class,
    read_config,
    refuse_pickle,
    resolve,
)

VARIANT = "ffmerge"


def skeleton(source: str | Path, trust_remote_code: bool = False) -> Any:
    """Return the model on the meta device, ties in place: every shape, no weights allocated."""
    folder = resolve(source, weights=False, code=trust_remote_code)
    model = without_weights(folder, trust_remote_code)
    record = merge_record(model.config)
    if record:
        _retie_(model, ties.groups_of(find(model), record), record, folder)
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
    refuse_pickle(folder)
    once = record is not None and any(folder.glob(f"model.{VARIANT}*.safetensors"))
    try:
        with _quiet():
            model, info = model_class(config, folder, trust_remote_code).from_pretrained(
                folder, config=config, variant=VARIANT if once else None, use_safetensors=True,
                dtype="auto", output_loading_info=True, ignore_mismatched_sizes=once,
            )  # fmt: skip
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{folder} cannot be loaded: {first_line(error)}") from error
    unset = _unset(model, info)
    if record:
        groups = ties.groups_of(find(model), record)
        if once:
            unset ^= ties.dropped_names(groups, record.own)
        else:
            ties.check(model, groups, record.own, torch.equal)
        _retie_(model, groups, record, folder)
    if unset:
        raise InputError(
            f"{folder} does not hold the parameters its config.json describes: {len(unset)} "
            f"differ, {min(unset)} among them."
        )
    return model.eval()


def _unset(model: Any, info: dict[str, Any]) -> set[str]:
    """Return the parameters for which the files held nothing, or something of another size."""
    unset = set(info["missing_keys"])
    for name, buffer in model.named_buffers():
        if not buffer.is_floating_point():  # a table of indices: one release stores it, one not
            unset.discard(name)
    for key in info["mismatched_keys"]:  # a name, or a name and two sizes
        unset.add(key if isinstance(key, str) else key[0])
    return unset


def _retie_(model: Any, groups: ties.Groups, record: MergeRecord, folder: Path) -> None:
    """Tie a loaded model, and give its layers what is their own."""
    ties.retie_(model, groups, record.own)
    maps = ties.maps_of(model, groups)
    if modeling_ffmerge.parts_in_file(maps, record.own):
        file = folder / modeling_ffmerge.OWN_FILE
        try:
            modeling_ffmerge.load_own_(maps, record.own, file)
        except (OSError, ValueError, SafetensorError) as error:
            raise InputError(f"{file} cannot be used: {first_line(error)}") from error


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
    with staged(Path(target)) as folder:
        if record is None:
            model.save_pretrained(folder, max_shard_size=max_shard_size)
        else:
            groups = ties.groups_of(find(model), record)
            ties.check(model, groups, record.own)
            write = _write_expanded if expanded else _write_once
            write(model, groups, record, folder, max_shard_size)
        if companions_from:
            copy_companions(companions_from, folder)


def _write_once(
    model: Any, groups: ties.Groups, record: MergeRecord, folder: Path, shard: int | str
) -> None:
    """Write a merged model with empty tensors in place of all members but the anchors."""
    state = model.state_dict()
    own = modeling_ffmerge.pop_own(model, ties.maps_of(model, groups), state)
    for name in ties.dropped_names(groups, record.own):
        state[name] = state[name].new_empty(0)
    model.save_pretrained(folder, state_dict=state, variant=VARIANT, max_shard_size=shard)
    if own:
        save_file(own, folder / modeling_ffmerge.OWN_FILE)
    if _is_of_transformers(model):
        _add_code(model, groups, record, folder)


def _write_expanded(
    model: Any, groups: ties.Groups, record: MergeRecord, folder: Path, shard: int | str
) -> None:
    """Write a merged model as if every member had the weights for itself."""
    state = model.state_dict()
    if record.own:
        _multiply_out(model, state)
    own = modeling_ffmerge.pop_own(model, ties.maps_of(model, groups), state)
    for name in ties.dropped_names(groups, record.own):
        state[name] = state[name].clone()
    # the class that ffmerge writes beside a checkpoint has a variant unless told otherwise
    model.save_pretrained(folder, state_dict=state, variant=None, max_shard_size=shard)
    config = read_json(folder / "config.json")
    if own:  # the copies differ: there is nothing to tie again
        del config["ffmerge"]
    if _is_of_transformers(model):  # no code of ours is needed, should it have been loaded by it
        config.pop("auto_map", None)
        (folder / CODE.name).unlink(missing_ok=True)
    write_json(folder / "config.json", dict(sorted(config.items())))


def _is_of_transformers(model: Any) -> bool:
    return isinstance(model, getattr(transformers, type(model).__name__, ()))


def _add_code(model: Any, groups: ties.Groups, record: MergeRecord, folder: Path) -> None:
    """Let ``from_pretrained(..., trust_remote_code=True)`` find a class that ties."""
    name = type(model).__name__
    autos = []
    for auto, value in vars(modeling_auto).items():
        if not auto.startswith("AutoModel"):
            continue
        classes = value._model_mapping.get(type(model.config), "")  # one, or several
        if f".{name}'>" in str(classes):
            autos.append(auto)
    config = read_json(folder / "config.json")
    config["auto_map"] = dict.fromkeys(autos or ["AutoModel"], f"{CODE.stem}.{name}")
    write_json(folder / "config.json", dict(sorted(config.items())))
    rules = [_rule(members, group) for members, group in zip(groups, record.groups, strict=True)]
    code = CODE.read_text(encoding="utf-8").replace("PreTrainedModel", name)
    (folder / CODE.name).unlink(missing_ok=True)
    (folder / CODE.name).write_text(code.replace("]] = []", f"]] = {rules!r}"), "utf-8")


def _rule(members: Any, group: Group) -> tuple[tuple[str, ...], int, tuple[int, ...]]:
    """Return a group as the generated code reads it, without names that a release may change.

    These are the words of its stack, which number in a name counts layers, and the layers.
    """
    first = members[0].weights[0].name.split(".")
    second = members[1].weights[0].name.split(".")
    at = 0
    while first[at] == second[at]:
        at += 1
    numbers_before = sum(part.isdigit() for part in first[:at])
    words = () if group.stack == "layers" else tuple(group.stack.split("."))
    return words, numbers_before, group.layers


def _multiply_out(model: Any, state: dict[str, Any]) -> None:
    """Put into each map's own weight what it adds to the shared one."""
    for name, module in model.named_modules():
        own = getattr(module, "own", ())
        if "bias" in own:
            raise InputError(
                f"{type(model).__name__} has no biases to hold what each layer has for itself: "
                "save without --expanded, or merge by permute."
            )
        if own:
            transposed = isinstance(module, Conv1D)
            weight = module.weight.detach()
            rows = weight.T if transposed else weight
            if "scale" in own:
                rows = rows * module.scale[:, None]
            if "down" in own:
                rows = rows + module.up @ module.down
            state[f"{name}.weight"] = (rows.T if transposed else rows).detach()


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
