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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D

from ffmerge.config import LoadConfig
from ffmerge.errors import InputError, first_line
from ffmerge.files import read_json, staged, write_json
from ffmerge.models import adapter, gguf_file, modeling_ffmerge, narrowed, quantized, ties
from ffmerge.models.card import checkpoint_card
from ffmerge.models.companions import copy_companions
from ffmerge.models.dataflow import NeedsWeights
from ffmerge.models.find import find
from ffmerge.models.finite import check_has_weights, check_weights
from ffmerge.models.record import Group, MergeRecord, merge_record
from ffmerge.models.source import (
    CODE,
    model_class,
    read_config,
    resolve,
)
from ffmerge.models.stored import weight_files
from ffmerge.models.sublayer import FeedForward

VARIANT = "ffmerge"
_NAMED = 3  # tensors in a sentence


def skeleton(source: str | Path, trust_remote_code: bool = False) -> Any:
    """Return the model on the meta device, ties in place: every shape, no weights allocated."""
    folder = resolve(source, LoadConfig(trust_remote_code=trust_remote_code), weights=False)
    model = without_weights(folder, trust_remote_code)
    record = merge_record(model.config)
    if record:
        found = find(model)
        modeling_ffmerge.narrow_(model, narrowed.rules(model, found, record))
        _retie_(model, ties.groups_of(found, record), record, folder)
    return model


def without_weights(folder: Path, trust_remote_code: bool = False) -> Any:
    """Return the class that ``config.json`` names, on the meta device, nothing tied."""
    config = read_config(folder, trust_remote_code)
    kind = model_class(config, folder, trust_remote_code)
    try:
        with torch.device("meta"):
            return kind(config).eval()
    except Exception as error:  # whatever a class does with the values of config.json
        raise InputError(f"{folder} cannot be loaded: {first_line(error)}") from error


def load(
    source: str | Path,
    trust_remote_code: bool = False,
    ignore_unexpected: bool = False,
    *,
    revision: str | None = None,
    token: str | None = None,
    subfolder: str = "",
) -> Any:
    """Return the model of a checkpoint in evaluation mode; a merged one comes back tied.

    Code that comes with a checkpoint is run only with ``trust_remote_code``; what ffmerge saved
    from a class of transformers needs none. Trained tensors that the class does not read are left
    out only with ``ignore_unexpected``. An adapter of PEFT is merged, the weights of a GGUF file
    are unpacked. ``revision`` and ``token`` are for the hub.

    Raises:
        InputError: files are missing, truncated, not safetensors, outside the folder, leave a
            parameter unset or not finite, or hold what nothing reads.
        TieError: an expanded checkpoint's copies differ.
    """
    options = LoadConfig(
        trust_remote_code=trust_remote_code,
        ignore_unexpected=ignore_unexpected,
        revision=revision,
        token=token,
        subfolder=subfolder,
    )
    folder = resolve(source, options)
    base = adapter.base_of(folder)
    if base is None:
        return _model_in(folder, options)
    if Path(base) == folder:
        model = _model_in(folder, options)
    else:
        model = load(base, trust_remote_code, ignore_unexpected, token=token)
    return adapter.merged(model, folder).eval()


def _model_in(folder: Path, options: LoadConfig) -> Any:
    """Return the model of a local folder, without an adapter."""
    trust = options.trust_remote_code
    config = read_config(folder, trust)
    record = merge_record(config)
    once = record is not None and any(folder.glob(f"model.{VARIANT}*.safetensors"))
    model, info, files = _filled(folder, config, once, trust)
    if not options.ignore_unexpected:
        _refuse_unread(model, info, files, folder)
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
    check_weights(model, folder)
    return model.eval()


def _filled(
    folder: Path, config: Any, once: bool, trust: bool
) -> tuple[Any, dict[str, Any], list[Path]]:
    """Return the model that transformers makes of a folder, what it loaded and from what files."""
    kind = model_class(config, folder, trust)
    if gguf_file.is_opened(folder):
        return *gguf_file.model_of(kind, folder, config), []
    variant = VARIANT if once else None
    files = weight_files(folder, variant or "")
    quantized.refuse_unreadable(config, folder)
    made = kind
    record = merge_record(config)
    if once and record and record.narrowed:
        made = modeling_ffmerge.narrow_class(kind, _rules(kind, config, record))
    try:
        with quiet(), adapter.without_adapter(folder) as shown:
            model, info = made.from_pretrained(
                shown, config=config, variant=variant, use_safetensors=True,
                dtype="auto", output_loading_info=True, ignore_mismatched_sizes=once,
            )  # fmt: skip
    except Exception as error:  # whatever a class does with the values of config.json
        raise InputError(f"{folder} cannot be loaded: {first_line(error)}") from error
    model.__class__ = kind
    model.name_or_path = model.config._name_or_path = str(folder)
    return quantized.plain(model, folder), info, files


def _rules(kind: Any, config: Any, record: MergeRecord) -> modeling_ffmerge.Rules:
    """Return what is narrower than ``config`` says; a model that has to compute gets weights."""
    try:
        with torch.device("meta"):
            full = kind(config).eval()
        return narrowed.rules(full, find(full), record)
    except NeedsWeights:
        full = kind(config).eval()
        return narrowed.rules(full, find(full), record)


def _refuse_unread(model: Any, info: dict[str, Any], files: list[Path], folder: Path) -> None:
    """Raise InputError if the files hold trained tensors that no parameter was made of.

    What the class itself leaves out is not among ``info``. Integers, and what the model computes
    for itself (a buffer of the same name), are not trained.
    """
    unread = sorted(info["unexpected_keys"])
    if not unread:
        return
    untrained = {name for name, _ in model.named_buffers()}
    for file in files:
        with safe_open(file, "pt") as stored:
            for name in stored.keys():
                if not stored.get_slice(name).get_dtype().startswith(("F", "BF")):
                    untrained.add(name)
    trained = []
    for name in unread:
        if not any(_same_place(name, each) for each in untrained):
            trained.append(name)
    if trained:
        named = ", ".join(trained[:_NAMED])
        raise InputError(
            f"{folder} holds {len(trained)} trained tensors that {type(model).__name__} does not "
            f"read, {named} among them: name the class that does in config.json, or give "
            "--ignore-unexpected (ignore_unexpected=True in Python) to go on without them."
        )


def _same_place(one: str, other: str) -> bool:
    """Tell whether two names differ at most by what stands before the model's own prefix."""
    return one == other or one.endswith(f".{other}") or other.endswith(f".{one}")


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
        InputError: ``target`` exists or cannot be written, no plain class holds the layers, or
            the model is a package.
    """
    check_has_weights(model)
    record = merge_record(model.config)
    with staged(Path(target)) as folder:
        if record is None or (not record.groups and narrowed.is_plain(model)):
            model.save_pretrained(folder, max_shard_size=max_shard_size)
        else:
            found = find(model)
            ties.check(model, ties.groups_of(found, record), record.own)
            write = _write_expanded if expanded else _write_once
            write(model, found, record, folder, max_shard_size)
        if companions_from:
            copy_companions(companions_from, folder)
        if companions_from and record is not None:
            _write_card(model, companions_from, folder / "README.md")


def _write_card(model: Any, source: Path, path: Path) -> None:
    """Put the card of a merged model before the original's, which was copied if there is one."""
    original = ""
    if path.is_file():
        original = path.read_text(encoding="utf-8", errors="replace")
    path.write_text(checkpoint_card(model, source, original), encoding="utf-8")


def _write_once(
    model: Any, found: Sequence[FeedForward], record: MergeRecord, folder: Path, shard: int | str
) -> None:
    """Write a merged model with empty tensors in place of all members but the anchors."""
    groups, state = ties.groups_of(found, record), model.state_dict()
    own = modeling_ffmerge.pop_own(model, ties.maps_of(model, groups), state)
    for name in ties.dropped_names(groups, record.own):
        state[name] = state[name].new_empty(0)
    model.save_pretrained(folder, state_dict=state, variant=VARIANT, max_shard_size=shard)
    if own:
        save_file(own, folder / modeling_ffmerge.OWN_FILE)
    if _is_of_transformers(model):
        _add_code(model, found, record, folder)


def _write_expanded(
    model: Any, found: Sequence[FeedForward], record: MergeRecord, folder: Path, shard: int | str
) -> None:
    """Write a merged model as if every member had the weights for itself, all neurons of them."""
    groups, state = ties.groups_of(found, record), model.state_dict()
    if record.own:
        _multiply_out(model, state)
    narrowed.fill(state, found, record)
    own = modeling_ffmerge.pop_own(model, ties.maps_of(model, groups), state)
    for name in ties.dropped_names(groups, record.own):
        state[name] = state[name].clone()
    # the class that ffmerge writes beside a checkpoint has a variant unless told otherwise
    model.save_pretrained(folder, state_dict=state, variant=None, max_shard_size=shard)
    config = read_json(folder / "config.json")
    if own or record.narrowed:  # the copies differ, or are whole: there is nothing to tie again
        del config["ffmerge"]
    if _is_of_transformers(model):  # no code of ours is needed, should it have been loaded by it
        config.pop("auto_map", None)
        (folder / CODE.name).unlink(missing_ok=True)
    write_json(folder / "config.json", dict(sorted(config.items())))


def _is_of_transformers(model: Any) -> bool:
    return isinstance(model, getattr(transformers, type(model).__name__, ()))


def _add_code(model: Any, found: Sequence[FeedForward], record: MergeRecord, folder: Path) -> None:
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
    groups = ties.groups_of(found, record)
    rules = [_rule(members, group) for members, group in zip(groups, record.groups, strict=True)]
    narrow = narrowed.rules(model, found, record)
    code = CODE.read_text(encoding="utf-8").replace("PreTrainedModel", name)
    code = code.replace("]] = []", f"]] = {rules!r}")
    code = code.replace("NARROW: Rules = []", f"NARROW: Rules = {narrow!r}")
    (folder / CODE.name).unlink(missing_ok=True)
    (folder / CODE.name).write_text(code, "utf-8")


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
def quiet() -> Iterator[None]:
    """Keep transformers from warning of what is known: ``load`` accounts for unset parameters."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
