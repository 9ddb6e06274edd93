"""Labels are matched with the model's classes by name; what is none of them is refused."""

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, PreTrainedTokenizerFast, ViTImageProcessor

from ffmerge.config import ColumnsConfig
from ffmerge.errors import FfmergeWarning, InputError
from ffmerge.models.data import as_examples, read
from ffmerge.models.metrics import ACCURACY, TARGET_PERPLEXITY


def _model(folder: Path, **label2id: int) -> Path:
    """Write what reading needs of a model whose classes are called so."""
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "one", "two", "three"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(folder)
    ViTImageProcessor(size={"height": 4, "width": 4}).save_pretrained(folder)
    if label2id:
        (folder / "config.json").write_text(json.dumps({"label2id": label2id}))
    return folder


def _labels(data: Any, folder: Path, task: str = "text-classification", **columns: str) -> Any:
    (batch,) = as_examples(data, folder, task, ColumnsConfig(**columns)).batches(99)
    return batch["labels"].tolist()


def _pictures(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).mkdir(parents=True)
        Image.new("L", (9, 7), 9).save(folder / name / "1.png")
    return folder


def test_folders_go_by_their_names(tmp_path: Path) -> None:
    model = _model(tmp_path / "m", zebra=0, ant=1, Brown_Bear=2)
    data = _pictures(tmp_path / "d", "ANT", "brown bear", "zebra")
    assert _labels(data, model, "image-classification") == [1, 2, 0]
    with pytest.raises(InputError, match="'grey', which is none of the model's: zebra, ant"):
        _labels(_pictures(tmp_path / "e", "ant", "grey"), model, "image-classification")


def test_a_column_of_the_models_classes_needs_no_known_name(tmp_path: Path) -> None:
    model = _model(tmp_path / "m", good=0, bad=1)
    rows = {
        "text": ["one", "two", "three"],
        "topic": ["a", "b", "c"],
        "mood": ["Bad", "good", "BAD"],
    }
    assert _labels(datasets.Dataset.from_dict(rows), model) == [1, 0, 1]
    del rows["mood"]
    with pytest.warns(FfmergeWarning, match="it has text, topic: name it by --label-column"):
        (batch,) = as_examples(
            datasets.Dataset.from_dict(rows), model, "text-classification"
        ).batches(9)
    assert "labels" not in batch


def test_a_photograph_is_turned_as_its_camera_says(tmp_path: Path) -> None:
    model = _model(tmp_path / "m", a=0, b=1)
    data = _pictures(tmp_path / "d", "a", "b")
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be seen, it is turned by 90 degrees clockwise
    upright.rotate(90, expand=True).save(data / "a" / "1.png", exif=exif)
    upright.save(data / "b" / "1.png")
    (batch,) = as_examples(data, model, "image-classification").batches(9)
    assert np.array_equal(*batch["pixel_values"])


def test_grey_pictures_go_to_a_processor_of_one_channel(tmp_path: Path) -> None:
    model = _model(tmp_path / "m", a=0, b=1)
    size = {"height": 7, "width": 9}
    ViTImageProcessor(size=size, image_mean=[0.5], image_std=[0.5]).save_pretrained(model)
    (batch,) = as_examples(
        _pictures(tmp_path / "d", "a", "b"), model, "image-classification"
    ).batches(9)
    assert batch["pixel_values"].shape == (2, 1, 7, 9)
    assert np.allclose(batch["pixel_values"], 9 / 127.5 - 1, atol=1e-6)  # (v / 255 - 0.5) / 0.5


def test_a_processor_that_does_not_take_the_pictures_is_named(tmp_path: Path) -> None:
    model = _model(tmp_path / "m", a=0, b=1)
    ViTImageProcessor(image_mean=[0.5, 0.5], image_std=[0.5, 0.5]).save_pretrained(model)
    data = as_examples(_pictures(tmp_path / "d", "a", "b"), model, "image-classification")
    with pytest.raises(InputError, match="does not take the pictures"):
        next(data.batches(9))


def test_a_model_without_names_takes_the_order_of_as_many_folders(tmp_path: Path) -> None:
    data = _pictures(tmp_path / "d", "b", "a", "c")
    model = _model(tmp_path / "m", LABEL_0=0, LABEL_1=1, LABEL_2=2)
    assert _labels(data, model, "image-classification") == [0, 1, 2]
    more = _model(tmp_path / "n", LABEL_0=0, LABEL_1=1)
    with pytest.raises(InputError, match="'a', which is none"):
        _labels(data, more, "image-classification")
    numbered = _pictures(tmp_path / "e", "10", "2")
    names = {f"LABEL_{i}": i for i in range(11)}
    assert _labels(numbered, _model(tmp_path / "o", **names), "image-classification") == [10, 2]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_a_column_of_names(suffix: str, tmp_path: Path) -> None:
    model = _model(tmp_path / "m", negative=0, positive=1)
    table = datasets.Dataset.from_dict(
        {"text": ["one", "two", "three"], "label": ["Positive", "negative", "positive"]}
    )
    file = tmp_path / f"d{suffix}"
    if suffix == ".parquet":
        table.to_parquet(file)
    elif suffix == ".jsonl":
        table.to_json(file)
    else:
        table.to_csv(file, sep="\t" if suffix == ".tsv" else ",", index=False)
    assert _labels(file, model) == [1, 0, 1]
    assert _labels(table, model) == [1, 0, 1]


def test_a_configuration_without_names_has_those_of_transformers(tmp_path: Path) -> None:
    """Which leaves them out of the configuration of a model with two classes."""
    model = _model(tmp_path / "m")
    BertConfig(num_labels=2).save_pretrained(model)
    assert "label2id" not in json.loads((model / "config.json").read_text())
    rows = {"text": ["one", "two", "three"], "label": ["LABEL_1", "LABEL_0", "LABEL_1"]}
    assert _labels(datasets.Dataset.from_dict(rows), model) == [1, 0, 1]
    rows["label"] = ["good", "bad", "good"]
    with pytest.raises(InputError, match="'bad', which is none of the model's"):
        _labels(datasets.Dataset.from_dict(rows), model)


def test_numbers_of_the_data_mean_its_own_names(tmp_path: Path) -> None:
    """A hub data set numbers its classes as it likes, and says how they are called."""
    model = _model(tmp_path / "m", cat=0, dog=1)
    kind = datasets.ClassLabel(names=["dog", "cat"])
    features = datasets.Features({"text": datasets.Value("string"), "label": kind})
    table = datasets.Dataset.from_dict({"text": ["one", "two"], "label": [0, 1]}, features)
    assert _labels(table, model) == [1, 0]
    plain = datasets.Dataset.from_dict({"text": ["one", "two"], "label": [0, 1]})
    assert _labels(plain, model) == [0, 1]


@pytest.mark.parametrize("wrong", [[0, 2], [-1, 1], ["cat", "cow"], [None, 1], ["cat", ""]])
def test_a_label_that_is_none_of_the_models_is_refused(wrong: list[Any], tmp_path: Path) -> None:
    model = _model(tmp_path / "m", cat=0, dog=1)
    table = datasets.Dataset.from_dict({"text": ["one", "two"], "label": wrong})
    bad = next(each for each in wrong if each not in (0, 1, "cat"))
    with pytest.raises(InputError, match=f"the label {bad!r}, which is none"):
        _labels(table, model)


def test_names_that_read_alike_are_told_apart_exactly(tmp_path: Path) -> None:
    model = _model(tmp_path / "m", Crane=0, crane=1)
    table = datasets.Dataset.from_dict({"text": ["one", "two"], "label": ["crane", "Crane"]})
    assert _labels(table, model) == [1, 0]
    other = datasets.Dataset.from_dict({"text": ["one"], "label": ["CRANE"]})
    with pytest.raises(InputError, match="'CRANE'"):
        _labels(other, model)


def test_columns_may_be_named(tmp_path: Path) -> None:
    model = _model(tmp_path / "m", no=0, yes=1)
    table = datasets.Dataset.from_dict(
        {"review": ["one", "two"], "text": ["two", ""], "answer": ["yes", "no"], "label": [0, 0]}
    )
    named = {"text_column": "review", "label_column": "answer"}
    assert _labels(table, model, **named) == [1, 0]
    with pytest.raises(InputError, match="no column 'stars', it has review, text, answer, label"):
        _labels(table, model, label_column="stars")
    with pytest.raises(InputError, match="'label' of the data set holds no text"):
        _labels(table, model, text_column="label")
    floats = datasets.Dataset.from_dict({"text": ["one"], "label": [0.5]})
    with pytest.raises(InputError, match="holds no classes"):
        _labels(floats, model)
    with pytest.raises(InputError, match="--text-column"):
        _labels(table.select_columns(["review"]), model)


def test_labels_of_arrays_are_held_against_the_outputs() -> None:
    logits = np.zeros((3, 4))
    for wrong in (4, -1, -7):
        with pytest.raises(InputError, match=f"label {wrong} is none of the model's.*0 to 3"):
            ACCURACY.add(logits, np.array([0, wrong, -100]))
        with pytest.raises(InputError, match=f"label {wrong} is none"):
            TARGET_PERPLEXITY.add(logits[None], np.array([[0, wrong, -100]]))
    assert ACCURACY.add(logits, np.array([0, 3, -100])) == (1.0, 2)


def test_one_number_is_no_class(tmp_path: Path) -> None:
    model = _model(tmp_path / "m", LABEL_0=0)
    table = datasets.Dataset.from_dict({"text": ["one"], "label": [3.5]})
    (batch,) = as_examples(table, model, "text-classification").batches(1)
    assert "labels" not in batch


def test_read_takes_the_columns_too(tmp_path: Path) -> None:
    model = _model(tmp_path / "m", no=0, yes=1)
    (tmp_path / "d.tsv").write_text("review\tanswer\none\tyes\n")
    columns = ColumnsConfig(text_column="review", label_column="answer")
    (batch,) = read(str(tmp_path / "d.tsv"), model, "text-classification", columns).batches(1)
    assert (batch["input_ids"].tolist(), batch["labels"].tolist()) == ([[2]], [1])
