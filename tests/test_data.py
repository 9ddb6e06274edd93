"""Every kind of data becomes the inputs the model takes."""

import json
import sys
import warnings
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import gpt2
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast, ViTImageProcessor

from ffmerge.config import MergeConfig
from ffmerge.errors import FfmergeWarning, InputError
from ffmerge.models import checkpoint, data
from ffmerge.models.examples import from_arrays
from ffmerge.passes.weights.merge import merge_


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


def test_one_row_is_fitted_to_and_measured_on_with_a_warning() -> None:
    rows = from_arrays({"x": np.ones((2, 3))})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows.halves()
    with pytest.warns(FfmergeWarning, match="one row: it is fitted to and measured on"):
        fitted, measured = rows.of([0]).halves()
    assert (fitted.rows, measured.rows) == ([0], [0])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.npz", b"not an archive", "cannot be read"),
        ("a.jsonl", b"{]", "cannot be read"),
        ("missing.txt", None, "not a data file"),
        ("a.csv", b"colour\nred\n", "columns"),
        ("a.txt", b"\n\n", "no row with text"),
    ],
)
def test_what_cannot_be_read(name, content, message, model_folder: Path, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        data.read(str(tmp_path / name), model_folder, "text-generation")
    assert len(str(caught.value).splitlines()) == 1


def _batch(given, *folder) -> dict[str, list]:
    (batch,) = data.as_examples(given, *folder).batches(8)
    return {name: array.tolist() for name, array in batch.items()}


def test_every_kind_of_data_gives_the_same_rows(model_folder: Path, tmp_path: Path) -> None:
    rows = {"input_ids": [[2, 3], [4, 2]], "attention_mask": [[1, 1], [1, 0]], "label": [1, 0]}
    wanted = {**rows, "labels": [1, 0]}
    del wanted["label"]
    arrays = {name: np.array(values) for name, values in wanted.items()}
    np.savez(tmp_path / "a.npz", **arrays)
    columns = {**rows, "sentence": ["one two", "three one"]}
    table = datasets.Dataset.from_dict(columns)
    tensors = {name: torch.tensor(values) for name, values in wanted.items()}
    for given in (
        data.from_arrays(arrays), arrays, wanted, tensors, table, table.with_format("torch"),
        DataLoader(table.remove_columns("sentence").rename_column("label", "labels")
                   .with_format("torch"), batch_size=1),
        str(tmp_path / "a.npz"), tmp_path / "a.npz",
    ):  # fmt: skip
        assert _batch(given) == wanted


def test_a_data_set_of_text_or_images_is_read_as_a_file_is(model_folder: Path) -> None:
    texts = datasets.Dataset.from_dict({"text": ["one two three", "", "two"], "label": [1, 0, 2]})
    assert _batch(texts, model_folder)["input_ids"] == [[2, 3, 4], [3, 0, 0]]
    assert "labels" not in _batch(texts, model_folder)
    assert _batch(texts, model_folder, "text-classification")["labels"] == [1, 2]
    pictures = [Image.new("L", (9, 7), value) for value in (0, 255)]
    table = datasets.Dataset.from_dict({"image": pictures, "label": [3, 4]})
    batch = _batch(table, model_folder)
    assert np.array(batch["pixel_values"])[:, 0, 0, 0].tolist() == [-1.0, 1.0]
    assert batch["labels"] == [3, 4]
    with pytest.raises(InputError, match="give the folder of the model"):
        data.as_examples(texts)


def test_rows_of_unequal_length_are_padded_where_a_mask_says_so() -> None:
    rows = [
        {"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "labels": [1, 2, 3]},
        {"input_ids": [8], "attention_mask": [1], "labels": [4]},
    ]
    wanted = {
        "input_ids": [[5, 6, 7], [8, 0, 0]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "labels": [[1, 2, 3], [4, -100, -100]],
    }
    table = datasets.Dataset.from_list(rows)
    loader = DataLoader(rows, collate_fn=lambda some: {k: [v] for k, v in some[0].items()})
    for given in (table, loader):
        assert _batch(given) == wanted
    with pytest.raises(InputError, match="there is no attention_mask"):
        _batch(table.remove_columns("attention_mask"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (datasets.DatasetDict({"train": datasets.Dataset.from_dict({"a": [1]})}), "one split"),
        (datasets.Dataset.from_dict({"a": [1]}), "has the columns a"),
        (datasets.Dataset.from_dict({}), "has the columns"),
        (DataLoader([(1, 2)]), "yields list"),
        (DataLoader([]), "yields nothing"),
        (7, "int is no data"),
    ],
)
def test_what_is_no_data_is_one_sentence(given, message, model_folder: Path) -> None:
    with pytest.raises(InputError, match=message) as caught:
        data.as_examples(given, model_folder)
    assert len(str(caught.value).splitlines()) == 1


def test_a_missing_package_is_named_with_the_way_to_get_it(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = datasets.Dataset.from_dict({"text": ["one"]})
    (tmp_path / "t.txt").write_text("one")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r"without transformers: pip install 'ffmerge\[torch\]'"):
        data.as_examples(table, model_folder)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"without datasets: pip install 'ffmerge\[torch\]'"):
        data.as_examples(tmp_path / "t.txt", model_folder)


def test_arrays_of_different_length_are_refused() -> None:
    with pytest.raises(InputError, match="one common length"):
        data.from_arrays({"input_ids": np.zeros((3, 4)), "labels": np.zeros(2)})


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", labels=np.array([{"x": 1}], dtype=object))
    with pytest.raises(InputError, match="cannot be read"):
        data.read(str(tmp_path / "a.npz"), tmp_path, "image-classification")


def test_merging_gives_the_same_for_every_kind_of_data() -> None:
    ids = np.random.default_rng(0).integers(0, 90, (6, 8))
    arrays = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    table = datasets.Dataset.from_dict({name: list(array) for name, array in arrays.items()})
    loader = DataLoader(table.with_format("torch"), batch_size=4)
    merged = []
    for given in (arrays, table, loader):
        model = gpt2()
        merge_(model, given, MergeConfig(window=(1, 3), method="permute"), given)
        merged.append(model)
    for other in merged[1:]:
        assert other.config.ffmerge == merged[0].config.ffmerge
        for one, two in zip(merged[0].parameters(), other.parameters(), strict=True):
            assert torch.equal(one, two)


def test_text_for_a_model_is_read_with_the_tokenizer_it_came_with() -> None:
    folder = Path(__file__).parents[1] / "examples" / "reference" / "village_lm"
    model = checkpoint.load(folder)
    table = datasets.Dataset.from_dict({"text": ["the cat sat", "the dog"]})
    (batch,) = data.examples_for(model, table).batches(2)
    (wanted,) = data.as_examples(table, folder).batches(2)
    assert batch["input_ids"].tolist() == wanted["input_ids"].tolist()
    assert data.examples_for(model, None) is None
    with pytest.raises(InputError, match="give the folder of the model"):
        data.examples_for(gpt2(), table)  # made in memory: no tokenizer came with it
