"""Every kind of data becomes the inputs the model takes."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast, ViTImageProcessor

from ffmerge.errors import InputError
from ffmerge.models import data


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "one", "two", "three"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(tmp_path / "model")
    ViTImageProcessor(size={"height": 4, "width": 4}).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_text_is_padded_and_masked(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("one two three\n\ntwo\n")
    examples = data.read(str(tmp_path / "t.txt"), model_folder, "text-generation")
    (batch,) = examples.batches(8)
    assert batch["input_ids"].tolist() == [[2, 3, 4], [3, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_labels_of_a_table(model_folder: Path, tmp_path: Path) -> None:
    rows = [{"text": "one", "label": 1}, {"text": "two", "label": 0}]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (batch,) = data.read(str(tmp_path / "t.jsonl"), model_folder, "text-classification").batches(8)
    assert batch["labels"].tolist() == [1, 0]
    (batch,) = data.read(str(tmp_path / "t.jsonl"), model_folder, "text-generation").batches(8)
    assert "labels" not in batch


def test_a_folder_of_images(model_folder: Path, tmp_path: Path) -> None:
    for name, value in (("cat", 0), ("dog", 255)):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        Image.new("L", (9, 7), value).save(tmp_path / "pictures" / name / "1.png")
    (batch,) = data.read(str(tmp_path / "pictures"), model_folder, "image-classification").batches(
        8
    )
    assert batch["pixel_values"].shape == (2, 3, 4, 4)
    # 0 and 255 through mean 0.5, std 0.5; labels are the sorted folder names
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [-1.0, 1.0]
    assert batch["labels"].tolist() == [0, 1]


def test_arrays(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", pixel_values=np.arange(5.0), labels=np.arange(5))
    examples = data.read(str(tmp_path / "a.npz"), tmp_path, "image-classification")
    assert [b["labels"].tolist() for b in examples.batches(2)] == [[0, 1], [2, 3], [4]]
    even, odd = examples.halves()
    assert [b["labels"].tolist() for b in (*even.batches(9), *odd.batches(9))] == [
        [0, 2, 4],
        [1, 3],
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.npz", b"not an archive", "cannot be read"),
        ("a.jsonl", b"{]", "cannot be read"),
        ("missing.txt", None, "not a data file"),
        ("a.csv", b"colour\nred\n", "columns"),
        ("a.txt", b"\n\n", "no text"),
    ],
)
def test_what_cannot_be_read(name, content, message, model_folder: Path, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        data.read(str(tmp_path / name), model_folder, "text-generation")
    assert len(str(caught.value).splitlines()) == 1


def test_arrays_of_different_length_are_refused() -> None:
    with pytest.raises(InputError, match="one common length"):
        data.from_arrays({"input_ids": np.zeros((3, 4)), "labels": np.zeros(2)})


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", labels=np.array([{"x": 1}], dtype=object))
    with pytest.raises(InputError, match="cannot be read"):
        data.read(str(tmp_path / "a.npz"), tmp_path, "image-classification")
