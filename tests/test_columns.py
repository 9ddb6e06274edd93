"""Tables as people have them: classifiers of pairs, and columns that name pictures or sounds."""

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image
from test_sounds import tone, write
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, ViTImageProcessor, Wav2Vec2FeatureExtractor

from ffmerge.config import ColumnsConfig
from ffmerge.errors import InputError
from ffmerge.models.data import as_examples

WORDS = "<s> <pad> </s> <unk> one two three four".split()
FIRST, SECOND = ["one", "two three"], ["four", "one"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer of pairs and the names of two classes."""
    folder = tmp_path_factory.mktemp("pairs")
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> $B:1 </s>:1",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip
    fast.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"label2id": {"no": 0, "yes": 1}}))
    return folder


def _batch(given: Any, folder: Path, task: str, **columns: str) -> dict[str, Any]:
    (batch,) = as_examples(given, folder, task, ColumnsConfig(**columns)).batches(9)
    return {name: array.tolist() for name, array in batch.items()}


PAIRED = [[0, 4, 2, 7, 2, 1], [0, 5, 6, 2, 4, 2]]


@pytest.mark.parametrize(
    "names",
    [
        ("sentence1", "sentence2"), ("question1", "question2"), ("premise", "hypothesis"),
        ("question", "sentence"), ("text_a", "text_b"), ("sentence_A", "sentence_B"),
        ("question", "passage"), ("text", "text_pair"),
    ],
)  # fmt: skip
def test_a_classifier_of_pairs_reads_both(names: tuple[str, str], folder: Path) -> None:
    rows = {"idx": [3, 4], names[1]: SECOND, names[0]: FIRST, "label": ["no", "yes"]}
    batch = _batch(datasets.Dataset.from_dict(rows), folder, "text-classification")
    assert batch["input_ids"] == PAIRED
    assert batch["token_type_ids"] == [[0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 1, 1]]
    assert batch["labels"] == [0, 1]


def test_a_question_is_read_with_its_context(folder: Path) -> None:
    rows = {"question": FIRST, "context": SECOND, "title": ["one", "one"]}
    assert (
        _batch(datasets.Dataset.from_dict(rows), folder, "question-answering")["input_ids"]
        == PAIRED
    )


def test_texts_of_like_length_are_a_batch(folder: Path) -> None:
    """Each once and with its own label, the same each time; a batch has one length, or nearly."""
    words = np.random.default_rng(0).integers(1, 41, 100)
    rows = {"text": [" ".join(["one"] * count) for count in words], "label": ["no", "yes"] * 50}
    table = datasets.Dataset.from_dict(rows)
    examples = as_examples(table, folder, "text-classification")
    found, padding, first = [], 0, []
    for batch in examples.batches(10):
        lengths = batch["attention_mask"].sum(1) - 2  # <s> and </s>
        first.append(int(lengths[0]))
        padding += int((batch["attention_mask"] == 0).sum())
        found += zip(lengths.tolist(), batch["labels"].tolist(), strict=True)
    assert sorted(found) == sorted(zip(words.tolist(), [0, 1] * 50, strict=True))
    assert padding < 0.1 * words.sum()  # measured 0.081; 0.68 in order
    assert first != sorted(first)  # so the first batches are no selection
    again = [batch["input_ids"] for batch in examples.batches(10)]
    for one, other in zip(again, examples.batches(10), strict=True):
        assert np.array_equal(one, other["input_ids"])
    half = examples.halves()[0]
    assert sum(len(batch["labels"]) for batch in half.batches(10)) == 50
    assert next(examples.longest().batches(1))["input_ids"].shape == (1, 42)
    (whole,) = examples.batches(100)
    assert (whole["attention_mask"].sum(1) - 2).tolist() == words.tolist()


def test_a_pair_may_be_named_or_only_its_first_text(folder: Path) -> None:
    table = datasets.Dataset.from_dict({"x": FIRST, "y": SECOND, "label": [0, 1]})
    both = _batch(table, folder, "text-classification", text_column="x", pair_column="y")
    assert both["input_ids"] == PAIRED
    alone = _batch(
        table.rename_columns({"x": "premise", "y": "hypothesis"}),
        folder,
        "text-classification",
        text_column="premise",
    )
    assert alone["input_ids"] == [[0, 4, 2, 1], [0, 5, 6, 2]]
    with pytest.raises(InputError, match="name the first by --text-column"):
        _batch(table, folder, "text-classification", pair_column="y")
    with pytest.raises(InputError, match="no column 'z'"):
        _batch(table, folder, "text-classification", text_column="x", pair_column="z")


def test_what_reads_single_texts_reads_no_pair(folder: Path) -> None:
    rows = {"text": FIRST, "text_pair": SECOND}
    batch = _batch(datasets.Dataset.from_dict(rows), folder, "text-generation")
    assert batch["input_ids"] == [[0, 4, 2, 1], [0, 5, 6, 2]]


def test_names_of_columns_and_files_may_be_in_capitals(folder: Path, tmp_path: Path) -> None:
    rows = {"Premise": FIRST, "HYPOTHESIS": SECOND}
    file = tmp_path / "DATA.CSV"
    datasets.Dataset.from_dict(rows).to_csv(str(file))
    small = {name.lower(): texts for name, texts in rows.items()}
    known = _batch(datasets.Dataset.from_dict(small), folder, "text-classification")
    assert _batch(file, folder, "text-classification") == known


def test_a_saved_data_set_is_read_and_of_several_one_is_asked_for(
    folder: Path, tmp_path: Path
) -> None:
    rows = datasets.Dataset.from_dict({"text": FIRST})
    datasets.DatasetDict(train=rows, test=rows).save_to_disk(str(tmp_path / "all"))
    known = _batch(rows, folder, "text-generation")
    assert _batch(tmp_path / "all" / "test", folder, "text-generation") == known
    with pytest.raises(InputError, match="give one of its folders test, train"):
        _batch(tmp_path / "all", folder, "text-generation")


def test_a_folder_of_something_else_says_so(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "train.csv").write_text("text\na\n")
    with pytest.raises(InputError, match="holds no pictures, no sounds and no saved data set"):
        _batch(tmp_path / "d", folder, "text-generation")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A table of pictures below its folder, and the model's processor beside them."""
    ViTImageProcessor(size={"height": 4, "width": 4}).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps({"label2id": {"no": 0, "yes": 1}}))
    (tmp_path / "data" / "all of them").mkdir(parents=True)
    for number in range(2):
        colour = (100 * number, 50, 20)
        Image.new("RGB", (4, 4), colour).save(tmp_path / "data" / "all of them" / f"{number}.png")
    return tmp_path


@pytest.mark.parametrize("column", ["image", "file_name", "where"])
def test_a_column_of_paths_is_one_of_pictures(column: str, pictures: Path) -> None:
    file = pictures / "data" / "table.csv"
    file.write_text(f"label,{column}\nyes,all of them/1.png\nno,all of them/0.png\n")
    batch = _batch(file, pictures / "model", "image-classification")
    assert batch["labels"] == [1, 0]
    red = np.array(batch["pixel_values"])[:, 0]
    # ViT's processor: v / 127.5 - 1
    assert np.allclose(red[0], 100 / 127.5 - 1, atol=1e-6) and np.allclose(red[1], -1, atol=1e-6)


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("../secret.png", "outside"),
        ("missing.png", "row 1 of .*table.csv, counted from 0, names missing.png, which is not"),
        ("linked.png", "outside"),
    ],
)
def test_a_path_leads_to_a_file_below_the_table(named: str, message: str, pictures: Path) -> None:
    Image.new("RGB", (4, 4)).save(pictures / "secret.png")
    (pictures / "data" / "linked.png").symlink_to(pictures / "secret.png")
    file = pictures / "data" / "table.csv"
    file.write_text(f"image,label\nall of them/0.png,no\n{named},yes\n")
    with pytest.raises(InputError, match=message):
        _batch(file, pictures / "model", "image-classification")
    with pytest.raises(InputError, match="outside"):
        file.write_text(f"image,label\n{pictures / 'secret.png'},no\n")
        _batch(file, pictures / "model", "image-classification")


def test_a_text_that_ends_in_a_name_is_a_text(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "table.csv"
    file.write_text("text,label\none two.png,no\nthree,yes\n")
    batch = _batch(file, folder, "text-classification")
    assert len(batch["input_ids"]) == 2


def test_a_column_of_paths_is_one_of_sounds(tmp_path: Path) -> None:
    Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps({"label2id": {"no": 0, "yes": 1}}))
    write(tmp_path / "a.wav", tone(40))
    file = tmp_path / "table.tsv"
    file.write_text("clip\tlabel\na.wav\tyes\n")
    batch = _batch(file, tmp_path / "model", "audio-classification")
    assert batch["labels"] == [1]
    assert np.abs(np.array(batch["input_values"][0]) - tone(40) / 32768).max() < 1e-6


NER = {"O": 0, "B-PER": 1, "I-PER": 2}


@pytest.fixture
def tagger(folder: Path, tmp_path: Path) -> Path:
    """The tokenizer, which takes ``two-three`` for three pieces, and three tags."""
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({"label2id": NER}))
    return tmp_path


@pytest.mark.parametrize("column", ["ner_tags", "tags", "labels"])
@pytest.mark.parametrize("named", [True, False])
def test_words_with_tags(named: bool, column: str, tagger: Path) -> None:
    rows: dict[str, Any] = {
        "id": ["a", "b", "c"],
        "tokens": [["one", "two-three", "four"], [], ["four"]],
        column: [["O", "B-PER", "I-PER"], [], ["B-PER"]],
    }
    table = datasets.Dataset.from_dict(rows)
    if named:  # numbers of the data's own, in another order than the model's
        names = datasets.ClassLabel(names=["B-PER", "I-PER", "O"])
        table = table.cast_column(column, datasets.Sequence(names))
    batch = _batch(table, tagger, "token-classification")
    assert batch["input_ids"] == [[0, 4, 5, 3, 6, 7, 2], [0, 7, 2, 1, 1, 1, 1]]
    assert batch["labels"] == [[-100, 0, 1, -100, -100, 2, -100], [-100, 1, *[-100] * 5]]


@pytest.mark.parametrize(
    ("tags", "message"),
    [([["O"], ["O"]], "row 0 .* has 2 words"), ([["O", "B-LOC"], ["O"]], "label 'B-LOC'")],
)
def test_tags_that_do_not_fit_are_refused(tags: Any, message: str, tagger: Path) -> None:
    table = datasets.Dataset.from_dict({"tokens": [["one", "two"], ["four"]], "ner_tags": tags})
    with pytest.raises(InputError, match=message):
        _batch(table, tagger, "token-classification")


def test_a_tokenizer_without_a_token_for_unknown_words_is_one_sentence(tmp_path: Path) -> None:
    """What the tokenizers library raises has no class of its own."""
    words = {word: number for number, word in enumerate(WORDS) if word != "<unk>"}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(tmp_path)
    table = datasets.Dataset.from_dict({"text": ["one more"]})
    with pytest.raises(InputError, match="cannot read this text: WordLevel error"):
        _batch(table, tmp_path, "text-generation")


def test_a_text_without_a_token_is_one_sentence(tmp_path: Path) -> None:
    """A tokenizer that begins and ends nothing, and leaves out what nobody sees."""
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace("\u200b", "")
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(tmp_path)
    table = datasets.Dataset.from_dict({"text": ["\u200b"]})
    with pytest.raises(InputError, match=r"finds no token in a text .* invisible"):
        _batch(table, tmp_path, "text-generation")
