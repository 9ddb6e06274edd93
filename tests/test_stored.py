"""What a checkpoint folder holds is used, travels or is named; nothing outside of it is read."""

import json
import os
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import gpt2
from transformers import BertConfig, BertForSequenceClassification
from transformers.quantizers import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ffmerge.errors import FfmergeWarning, InputError
from ffmerge.exporter.package import export
from ffmerge.models import checkpoint, quantized
from ffmerge.models.companions import LARGEST, copy_companions, is_companion


def _refused(folder: Path, *words: str) -> None:
    with pytest.raises(InputError) as caught:
        checkpoint.load(folder)
    said = str(caught.value)
    assert len(said.splitlines()) == 1
    for word in words:
        assert word in said


def _bert(folder: Path) -> Path:
    config = BertConfig(
        vocab_size=60, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=40, num_labels=3,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def _with(folder: Path, **tensors: torch.Tensor) -> Path:
    """Add tensors to the weights of a folder; ``__`` in a name stands for a dot."""
    file = folder / "model.safetensors"
    more = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file(load_file(file) | more, file, {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "name",
    ["bert.encoder.layer.0.gate.weight", "cls.predictions.bias", "bert.encoder.layer.7.a.weight"],
)
def test_a_trained_tensor_that_nothing_reads_is_named(name: str, tmp_path: Path) -> None:
    folder = _with(_bert(tmp_path / "bert"), **{name: torch.ones(3)})
    _refused(folder, name, "--ignore-unexpected", "BertForSequenceClassification")
    right = BertForSequenceClassification.from_pretrained(folder).eval()
    ids = torch.arange(9)[None]
    found = checkpoint.load(folder, ignore_unexpected=True)
    assert torch.equal(found(ids).logits, right(ids).logits)


def test_a_head_of_another_class_is_such_a_tensor(tmp_path: Path) -> None:
    folder = _bert(tmp_path / "bert")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["BertModel"]}))
    _refused(folder, "classifier", "BertModel")


def test_what_is_not_trained_is_left_out_in_silence(tmp_path: Path) -> None:
    """Tables of indices, and buffers that older releases stored."""
    ids = torch.arange(40)[None]
    checkpoint.load(_with(_bert(tmp_path / "a"), bert__embeddings__position_ids=ids))
    checkpoint.load(_with(_bert(tmp_path / "b"), some__counter=torch.tensor(3)))
    gpt2().save_pretrained(tmp_path / "c")
    mask = torch.ones(1, 1, 8, 8)  # GPT2's class names it itself
    checkpoint.load(_with(tmp_path / "c", transformer__h__0__attn__bias=mask))


def _outside(folder: Path, how: str) -> None:
    """Let a checkpoint read its weights from beside itself."""
    weights, outside = folder / "model.safetensors", folder.parent / "outside.safetensors"
    names = list(load_file(weights))
    weights.rename(outside)
    save_file({"nothing": torch.zeros(1)}, folder / "extra.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    path = "../outside.safetensors"
    if how == "absolute":
        path = str(outside)
    if how == "pickle":
        path = "weights.bin"
        torch.save({}, folder / path)
    if how == "number":
        path = 7
    if how == "null byte":
        path = "a\0.safetensors"
    if how in ("link", "linked shard"):
        (folder / "shard.safetensors").symlink_to(outside)
        path = "shard.safetensors"
    if how == "link":
        (folder / path).rename(weights)
    elif how == "config":
        (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": path}))
    else:
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, path)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    "how",
    ["relative", "absolute", "pickle", "number", "null byte", "link", "linked shard", "config"],
)
def test_weights_outside_the_folder_are_not_read(how: str, tmp_path: Path) -> None:
    _bert(tmp_path / "bert")
    _outside(tmp_path / "bert", how)
    _refused(tmp_path / "bert", str(tmp_path / "bert"))


def test_a_hub_cache_of_links_is_read_and_its_companions_travel(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / "1"
    blobs.mkdir(parents=True)
    _bert(snapshot)
    (snapshot / "vocab.txt").write_text("one")
    for number, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(f"../../blobs/{number}")
    (snapshot / "secret.txt").symlink_to("../../../secret.txt")
    (tmp_path / "secret.txt").write_text("SECRET")
    model = checkpoint.load(snapshot)
    with pytest.warns(FfmergeWarning, match="secret.txt"):
        checkpoint.save(model, tmp_path / "out", snapshot)
    assert (tmp_path / "out" / "vocab.txt").read_text() == "one"
    assert not (tmp_path / "out" / "secret.txt").exists()


def test_safetensors_that_transformers_would_not_read_are_no_weights(tmp_path: Path) -> None:
    folder = _bert(tmp_path / "bert")
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    _refused(folder, "model.safetensors", "index")


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"load_in_8bit": True}, "bitsandbytes"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 32}, "gptq"),
        ({"quant_method": "awq", "bits": 4, "group_size": 32}, "awq"),
        ({"quant_method": "unheard-of"}, "unheard-of"),
    ],
)
def test_a_quantized_checkpoint_is_refused_by_name(
    settings: dict, word: str, tmp_path: Path
) -> None:
    folder = _bert(tmp_path / "bert")
    config = json.loads((folder / "config.json").read_text())
    stored = {**config, "quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(stored))
    _refused(folder, word)


class NoWayBack(HfQuantizer):
    """A quantizer of transformers that, like most, has nothing to undo its work with."""

    is_trainable = False

    def __init__(self, config: QuantizationConfigMixin) -> None:
        self.quantization_config = config

    def is_serializable(self, *_: object) -> bool:
        return False


def test_a_quantization_without_a_way_back_is_refused_by_name() -> None:
    model = gpt2(layers=1)
    config = QuantizationConfigMixin("aqlm")
    model.config.quantization_config, model.hf_quantizer = config, NoWayBack(config)
    with pytest.raises(InputError, match="by aqlm, which transformers cannot undo") as told:
        quantized.plain(model, Path("folder"))
    assert isinstance(told.value.__cause__, NotImplementedError)
    del model.hf_quantizer
    assert quantized.plain(model, Path("folder")) is model


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"hidden_size": -4}, "cannot"),
        ({"num_attention_heads": 7}, "cannot"),
        ({"vocab_size": "a"}, ""),
    ],
)
def test_values_that_no_class_takes_are_one_sentence(
    values: dict, word: str, tmp_path: Path
) -> None:
    folder = _bert(tmp_path / "bert")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))
    _refused(folder, word)
    with pytest.raises(InputError):
        checkpoint.skeleton(folder)


TRAVEL = [
    "tokenizer.json", "bpe.codes", "modules.json", "1_Pooling/config.json", "LICENSE",
    "config_sentence_transformers.json", "spiece.model", "a/b/notes.txt", "vocab.tiktoken",
    "2_Dense/config.json", "2_Dense/model.safetensors",
]  # fmt: skip
STAY = [
    "pytorch_model.bin", "model.onnx", "onnx/model.onnx", "flax_model.msgpack", "modeling.py",
    "model.safetensors.index.json", "adapter_config.json", ".env", ".git/config", "a/.secret",
    "CVS/Entries", "optimizer.pt", "other.safetensors", "run.sh", "w.Q4.gguf", "x.PTH",
    "older-package/ffmerge.json", "older-package/tokenizer.json",
]  # fmt: skip


def test_every_small_file_that_is_neither_weights_nor_code_travels(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    target.mkdir()
    for name in (*TRAVEL, *STAY):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("{}")
    modules = [{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}, {"path": "../x"}, 3]
    (source / "modules.json").write_text(json.dumps(modules))
    (target / "LICENSE").write_text("my own")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copy_companions(source, target)
    found = {p.relative_to(target).as_posix() for p in target.rglob("*") if p.is_file()}
    assert found == set(TRAVEL)
    assert (target / "LICENSE").read_text() == "my own"


def test_links_and_large_files_stay_behind_and_are_named(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "vocab.txt").write_text("SECRET")
    (source / "link.txt").symlink_to(secret / "vocab.txt")
    (source / "hard.txt").hardlink_to(secret / "vocab.txt")
    (source / "folder").symlink_to(secret)
    (source / "inside.txt").symlink_to("merges.txt")
    (source / "gone.txt").symlink_to("nowhere")
    (source / "merges.txt").write_text("a b")
    os.mkfifo(source / "pipe.txt")
    with (source / "large.txt").open("wb") as file:
        file.truncate(LARGEST + 1)
    with pytest.warns(FfmergeWarning) as caught:
        copy_companions(source, target)
    assert [path.name for path in target.rglob("*")] == ["merges.txt"]
    said = " ".join(str(each.message) for each in caught)
    for name in ("link.txt", "hard.txt", "inside.txt", "gone.txt", "pipe.txt", "large.txt"):
        assert name in said
    assert is_companion("large.txt", LARGEST) and not is_companion("large.txt", LARGEST + 1)


def test_a_sub_folder_is_opened_and_stays_inside(tmp_path: Path) -> None:
    _bert(tmp_path / "all" / "text")
    wanted = BertForSequenceClassification.from_pretrained(tmp_path / "all" / "text")
    found = checkpoint.load(tmp_path / "all", subfolder="text")
    assert torch.equal(found.classifier.weight, wanted.classifier.weight)
    for wrong in ("image", "../all/text", str(tmp_path / "all" / "text")):
        with pytest.raises(InputError, match="sub-folder"):
            checkpoint.load(tmp_path / "all", subfolder=wrong)
    with pytest.raises(InputError, match="no revision"):
        checkpoint.load(tmp_path / "all" / "text", revision="main")


def test_a_package_is_no_checkpoint(tmp_path: Path) -> None:
    """Its folder has a config.json, and safetensors files of what PyTorch put out."""
    package = export(gpt2(layers=1), tmp_path / "package")
    with pytest.raises(InputError, match="is a package, whose graphs have the weights: give"):
        checkpoint.load(package.path)
