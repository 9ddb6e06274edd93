"""What a command's natural mistakes meet is told before torch is imported."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from ffmerge import config, early
from ffmerge.config import CompressConfig, LoadConfig, MergeConfig
from ffmerge.errors import InputError
from ffmerge.models import modeling_ffmerge, stored
from ffmerge.passes.weights import methods

RUN = """
import atexit, sys
atexit.register(lambda: print(sorted({"torch", "transformers"} & {*sys.modules}), file=sys.stderr))
from ffmerge.__main__ import main
main(sys.argv[1:])
"""
WIDTH, LAYERS = 64, 3


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints whose headers and configurations are all that is looked at, and tables."""
    folder = tmp_path_factory.mktemp("early")
    heads = {"texts": "SequenceClassification", "pictures": "ImageClassification"}
    for name, head in {**heads, "writer": "CausalLM"}.items():
        _checkpoint(folder / name, f"BertFor{head}")
        (folder / name / "tokenizer.json").write_text("{}")
    _checkpoint(folder / "bare", "BertForSequenceClassification")
    (folder / "a.csv").write_text("sentence,tongue,length\nsheep,English,5\nSchaf,German,5\n")
    (folder / "photos" / "yes").mkdir(parents=True)
    from PIL import Image

    Image.new("RGB", (8, 8)).save(folder / "photos" / "yes" / "1.png")
    (folder / "there").mkdir()
    return folder


def _checkpoint(folder: Path, name: str) -> None:
    folder.mkdir()
    weights = {"embed.weight": np.zeros((500, WIDTH), np.float32)}
    for layer in range(LAYERS):
        weights[f"bert.layer.{layer}.up.weight"] = np.zeros((4 * WIDTH, WIDTH), np.float32)
        weights[f"bert.layer.{layer}.down.weight"] = np.zeros((WIDTH, 4 * WIDTH), np.float32)
    save_file(weights, folder / "model.safetensors")
    labels = {"English": 0, "German": 1}
    stored = {"model_type": "bert", "architectures": [name], "label2id": labels}
    (folder / "config.json").write_text(json.dumps(stored))


MISTAKES = {
    "growing": ("export writer out --for npu --data a.csv", "--for npu fixes every size"),
    "ranges": ("export texts out --for npu", "int8-static takes its ranges from data"),
    "bits": ("export texts out --dtype int4 --budget 1MB", "for a budget bits are chosen by data"),
    "model": ("compress ./text out --data a.csv", "./text is not a folder"),
    "config": ("inspect ./text", "./text is not a folder"),
    "data": ("compress texts out --data b.csv", "b.csv is not a data file"),
    "column": ("compress texts out --data a.csv --label-column lang", "no column 'lang', it has"),
    "validation": (
        "merge texts out --k 2 --data a.csv --validation a.csv --text-column phrase",
        "no column 'phrase'",
    ),
    "classes": ("compress texts out --data a.csv --label-column length", "the label 5"),
    "no text": ("similarity texts --data a.csv --text-column length", "'length' of a.csv holds no"),
    "tokenizer": ("export bare out --data a.csv", "bare has no tokenizer to read text with"),
    "processor": ("merge pictures out --k 2 --data photos", "has no preprocessor_config.json"),
    "k": ("merge texts out --k 4", "k = 4 does not fit: bert.layer has 3 layers, so k is 2 to 3"),
    "k of one": ("compare texts --k 1 --data a.csv", "so k is 2 to 3"),
    "window": ("merge texts out --window 1-3", "window 1-3 is out of range: bert.layer has"),
    "size": ("compress texts out --size 20kB --data a.csv", "20.0 kB is out of reach"),
    "unit": ("compress texts out --size 20 --data a.csv", "not of the form"),
    "method": ("merge texts out --k 2 --method calibratd", "no method 'calibratd'"),
    "dtype": ("export texts out --dtype in8", "no dtype 'in8'"),
    "task": ("export texts out --task fil-mask", "'fil-mask' is not served"),
    "option": ("export texts out --dtyp int8", "No such option"),
    "command": ("exprot texts out", "No such command"),
    "output": ("export texts there", "there exists already"),
    "recovery": ("merge texts out --k 2 --recover 10", "recovery follows the original"),
    "rivals": ("compare texts --k 2", "rivals are compared on data"),
}


@pytest.mark.parametrize("mistake", list(MISTAKES))
def test_a_mistake_is_told_without_torch(here: Path, mistake: str) -> None:
    command, sentence = MISTAKES[mistake]
    done = subprocess.run(
        [sys.executable, "-c", RUN, *command.split()], cwd=here, capture_output=True, text=True
    )
    *said, imported = done.stderr.strip().splitlines()
    assert done.returncode == 2 and sentence in " ".join(said), done.stderr
    assert "torch" not in imported
    assert not (here / "out").exists()


def test_what_is_right_is_not_refused(here: Path) -> None:
    load = LoadConfig()
    for k in (2, LAYERS):
        early.check(str(here / "texts"), load, MergeConfig(k=k), early.ColumnsConfig())
    early.check(str(here / "texts"), load, MergeConfig(window=(0, 2)))
    data = str(here / "a.csv")
    early.check(
        str(here / "texts"), load, CompressConfig(size="250kB"), early.ColumnsConfig(), data
    )


def test_a_size_is_refused_only_if_the_least_that_is_certain_is_above(tmp_path: Path) -> None:
    """Two tables of one shape may be one table; only the blocks are surely there."""
    _checkpoint(tmp_path / "tied", "BertForMaskedLM")
    weights = {"embed.weight": np.zeros((9_000, WIDTH), np.float32)}
    weights["head.weight"] = weights["embed.weight"].copy()
    weights["model.layers.0.up.weight"] = np.zeros((4 * WIDTH, WIDTH), np.float32)
    save_file(weights, tmp_path / "tied" / "model.safetensors")
    early.check(str(tmp_path / "tied"), LoadConfig(), CompressConfig(size="400kB"))
    with pytest.raises(InputError, match="out of reach"):
        early.check(str(tmp_path / "tied"), LoadConfig(), CompressConfig(size="200kB"))


def test_experts_of_a_block_are_more_than_its_layers(tmp_path: Path) -> None:
    """Which numbers count layers is not certain then: the command says what does not fit."""
    _checkpoint(tmp_path / "moe", "MixtralForCausalLM")
    weights = {}
    for layer in range(2):
        for expert in range(8):
            name = f"model.layers.{layer}.experts.{expert}.up.weight"
            weights[name] = np.zeros((WIDTH, WIDTH), np.float32)
    save_file(weights, tmp_path / "moe" / "model.safetensors")
    early.check(str(tmp_path / "moe"), LoadConfig(), MergeConfig(k=4))
    with pytest.raises(InputError, match="k is 2 to 8"):
        early.check(str(tmp_path / "moe"), LoadConfig(), MergeConfig(k=9))


def test_names_are_those_of_the_registry() -> None:
    saved = {method.name for method in methods.METHODS.values() if method.saved}
    assert set(config.METHODS) <= saved  # a test may have registered more
    assert stored.OWN_FILE == modeling_ffmerge.OWN_FILE
