"""What each command of the command line does that needs torch: from paths to results.

``__main__`` calls these; in Python one calls what they call. A command opens the checkpoint, reads
the data as inputs of its model, does the work with progress on stderr, and writes the result whole
or not at all. What a device needs (share, audit, validate) is in the rooms themselves.
"""

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from ffmerge import heatmap, progress
from ffmerge.config import (
    CheckpointConfig,
    ColumnsConfig,
    CompareConfig,
    DataConfig,
    DeviceConfig,
    ExportConfig,
    LoadConfig,
    MergeConfig,
    RecoverConfig,
    SimilarityConfig,
)
from ffmerge.errors import InputError, first_line
from ffmerge.exporter import package
from ffmerge.exporter.package import Package
from ffmerge.exporter.write import WEIGHTS
from ffmerge.files import FIRST_PROCESS, refuse_existing, scratch, staged, write_json, write_whole
from ffmerge.models import checkpoint, data, tasks
from ffmerge.models.examples import Examples, with_held_out
from ffmerge.models.float32 import float32_
from ffmerge.models.manifest import Manifest
from ffmerge.models.offload import offload_
from ffmerge.models.source import resolve
from ffmerge.passes.weights import compare as comparing
from ffmerge.passes.weights import merge as merging
from ffmerge.passes.weights import methods, processes
from ffmerge.passes.weights import similarity as layers
from ffmerge.passes.weights.compare import Comparison
from ffmerge.passes.weights.evaluate import score_for
from ffmerge.passes.weights.merge import Merge
from ffmerge.passes.weights.recover import clone_sharing_parameters, recover_
from ffmerge.passes.weights.similarity import Similarity
from ffmerge.runtime_tests.footprint import measure_footprint


def merge(
    source: str,
    out: Path,
    config: MergeConfig,
    data_config: DataConfig,
    recovery: RecoverConfig | None,
    load_config: CheckpointConfig,
) -> Merge:
    """Merge the checkpoint ``source`` and save it as the new folder ``out``.

    With ``recovery`` the merged model is then trained towards the original. Its state is kept in
    a hidden folder beside ``out`` until the end: the same call goes on after a kill. Under
    torchrun every process calls this, and the first one writes.
    """
    refuse_existing(out)
    methods.get(config.method)
    if recovery and not data_config.data:
        raise InputError("recovery follows the original on data: give --data.")
    with progress.shown() as show:
        folder, model = open_checkpoint(source, load_config)
        _place(model, load_config)
        task = tasks.task_of(model, config.task)
        config = replace(config, task=task)
        calibration, held_out = examples_of(data_config, folder, task)
        original = None
        if recovery:
            original = clone_sharing_parameters(model)
        result = merging.merge_(model, calibration, config, held_out, show)
        state = out.with_name(f".{out.name}.recovery")
        if recovery and calibration and held_out:
            recovery = replace(recovery, task=task, batch_size=config.batch_size)
            recover_(model, original, calibration, recovery, show, state)
            show("measuring", 0, 0)
            score = score_for(original, task, held_out, config.batch_size, config.criterion)
            metric = {**result.record.metric, "recovered": score.measure(model)}
            result = replace(result, record=replace(result.record, metric=metric))
            model.config.ffmerge = result.record.to_json()
        if FIRST_PROCESS:
            checkpoint.save(model, out, folder, expanded=load_config.expanded)
            shutil.rmtree(state, ignore_errors=True)
    return result


def compare(
    source: str, config: CompareConfig, data_config: DataConfig, load_config: DeviceConfig
) -> Comparison:
    """Compare merging of the checkpoint ``source`` with its rivals; nothing is written."""
    if not data_config.data:
        raise InputError("rivals are compared on data: give --data.")
    methods.get(config.method)
    with progress.shown() as show:
        folder, model = open_checkpoint(source, load_config)
        _place(model, load_config)
        task = tasks.task_of(model, config.task)
        calibration, held_out = examples_of(data_config, folder, task)
        return comparing.compare(model, calibration, held_out, replace(config, task=task), show)


def similarity(
    source: str,
    data_source: str,
    config: SimilarityConfig,
    out: Path | None,
    load_config: DeviceConfig,
    columns: ColumnsConfig = ColumnsConfig(),
) -> tuple[tuple[Similarity, ...], list[Path]]:
    """Return how alike the sublayers of the checkpoint ``source`` are, and the files written.

    ``out`` is a picture of all stacks, or else a folder: a picture for each, and the numbers.

    Raises:
        InputError: ``out`` exists, is a file of another kind, or cannot be written.
    """
    if out:
        refuse_existing(out)
        if out.suffix not in ("", ".svg"):
            raise InputError(f"{out} is no .svg: end in that, or in no suffix for a folder.")
    with progress.shown() as show:
        folder, model = open_checkpoint(source, load_config)
        _place(model, load_config)
        examples = data.read(data_source, folder, tasks.task_of(model), columns)
        found = layers.similarity(model, examples, config, show)
    if out is None:
        return found, []
    stacks = [stack.to_json() for stack in found]
    if out.suffix:
        return found, [write_whole(out, heatmap.picture(stacks).encode())]
    with staged(out) as target:
        for stack in stacks:
            (target / f"{stack['name']}.svg").write_text(heatmap.picture([stack]), "utf-8")
        write_json(target / "similarity.json", {"stacks": stacks})
    return found, sorted(out.iterdir())


def export(
    source: str,
    out: Path,
    config: ExportConfig,
    load_config: LoadConfig,
    data_source: str | None = None,
    columns: ColumnsConfig = ColumnsConfig(),
) -> Package:
    """Export the checkpoint ``source`` as the new package ``out``, with a few rows of the data.

    One of 16 bits is computed with in float32, whose weights are on disk beside ``out`` meanwhile.
    """
    with progress.shown() as show, scratch(out) as wide:
        folder, model = open_checkpoint(source, load_config)
        float32_(model, wide)
        show("tracing and writing", 0, 0)
        rows = None
        if data_source is not None:
            rows = data.read(data_source, folder, tasks.task_of(model, config.task), columns)
        result = package.export(model, out, config, folder, rows)
        if not config.prepack:
            return result
        show("measuring", 0, 0)
        return replace(result, costs=_costs(result.manifest, out))


def open_checkpoint(source: str, load_config: LoadConfig) -> tuple[Path, Any]:
    """Return the model of a checkpoint, and the folder of what travels with it."""
    disable_progress_bar()  # transformers draws one for every file: one display is enough
    folder = resolve(source, load_config)
    model = checkpoint.load(
        folder,
        load_config.trust_remote_code,
        load_config.ignore_unexpected,
        token=load_config.token,
    )
    if not (
        folder / "config.json"
    ).is_file():  # an adapter alone: tokenizer and processor of its base
        folder = Path(model.name_or_path)
    return folder, model


def _place(model: Any, load_config: DeviceConfig) -> None:
    """Let the model compute on the device, in place."""
    processes.rank_and_world_size()  # gives each of several processes a GPU of its own
    device = load_config.device
    try:
        torch.empty(0, device=device)
        if load_config.offload:
            offload_(model, device)
        else:
            model.to(device)
    except (RuntimeError, AssertionError) as error:  # the latter where PyTorch has no CUDA
        raise InputError(
            f"the model cannot be put on --device {device!r}: {first_line(error)}"
        ) from error


def examples_of(
    data_config: DataConfig, folder: Path, task: str
) -> tuple[Examples | None, Examples | None]:
    """Return the calibration data and the data that chooses, half of the former if not given."""
    calibration = held_out = None
    if data_config.data:
        calibration = data.read(data_config.data, folder, task, data_config)
    if data_config.validation:
        held_out = data.read(data_config.validation, folder, task, data_config)
    return with_held_out(calibration, held_out)


def _costs(manifest: Manifest, folder: Path) -> dict[str, Any]:
    """Return bytes and footprint of the graphs and of their variants, by kind."""
    costs = {}
    for kind in dict.fromkeys(("onnx", *(variant.kind for variant in manifest.variants))):
        opened = set(manifest.served(kind))
        opened |= {f"{path}_data" for path in opened}
        if kind == "onnx":
            opened.add(WEIGHTS)
        size = sum(file.bytes for file in manifest.files if file.path in opened)
        costs[kind] = {"bytes": size, **asdict(measure_footprint(folder, kind=kind))}
    return costs
