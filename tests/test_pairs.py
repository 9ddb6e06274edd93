"""Pairs of texts, in the layouts of public data sets, become what an encoder-decoder learns."""

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BartConfig, BartForConditionalGeneration, PreTrainedTokenizerFast

from ffmerge.config import ColumnsConfig
from ffmerge.errors import FfmergeWarning, InputError
from ffmerge.models.data import as_examples
from ffmerge.models.inputs import forward

TASK = "text2text-generation"
READ, WRITTEN = ["one two", "three"], ["eins zwei", "drei"]
_SIZES = {
    "vocab_size": 60, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64, "max_position_embeddings": 64, "pad_token_id": 1,
    "decoder_start_token_id": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = "<s> <pad> </s> <unk> one two three eins zwei drei".split()
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("</s>", 2)]
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=ends)
    folder = tmp_path_factory.mktemp("bart")
    BartForConditionalGeneration(BartConfig(**_SIZES)).save_pretrained(folder)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)
    return folder


def _read(given: Any, folder: Path, **columns: str) -> dict[str, list[Any]]:
    (batch,) = as_examples(given, folder, TASK, ColumnsConfig(**columns)).batches(9)
    return {name: array.tolist() for name, array in batch.items()}


RIGHT = {
    "input_ids": [[4, 5, 2], [6, 2, 1]],
    "attention_mask": [[1, 1, 1], [1, 1, 0]],
    "labels": [[7, 8, 2], [9, 2, -100]],
    "decoder_input_ids": [[2, 7, 8], [2, 9, 2]],
}


@pytest.mark.parametrize(
    "columns",
    [("source", "target"), ("src", "tgt"), ("article", "highlights"), ("document", "summary"),
     ("text", "summary"), ("question", "answer"), ("input", "output"), ("dialogue", "summary")],
)  # fmt: skip
def test_layouts_that_say_which_side_is_which(columns: tuple[str, str], folder: Path) -> None:
    table = datasets.Dataset.from_dict({columns[1]: WRITTEN, columns[0]: READ})
    found = _read(table, folder)
    assert {name: found[name] for name in RIGHT} == RIGHT


def _translations(first: str = "en", second: str = "de") -> list[dict[str, Any]]:
    pairs = zip(READ, WRITTEN, strict=True)
    return [{"translation": {first: one, second: two}} for one, two in pairs]


def test_two_languages_are_read_in_their_order_and_that_is_said(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in _translations()))
    with pytest.warns(FfmergeWarning, match="read as en to de: give --text-column"):
        assert _read(tmp_path / "d.jsonl", folder)["labels"] == RIGHT["labels"]
    table = datasets.Dataset.from_list([row["translation"] for row in _translations()])
    with pytest.warns(FfmergeWarning, match="en to de"):
        assert _read(table, folder)["input_ids"] == RIGHT["input_ids"]
    (tmp_path / "d.tsv").write_text("en\tde\none two\teins zwei\n")
    with pytest.warns(FfmergeWarning, match="en to de"):
        assert _read(tmp_path / "d.tsv", folder)["labels"] == [[7, 8, 2]]


def test_the_direction_can_be_named_or_the_tokenizer_tells(folder: Path, tmp_path: Path) -> None:
    table = datasets.Dataset.from_list(_translations("de", "en"))  # values are the other way round
    found = _read(table, folder, text_column="en", target_column="de")
    assert (found["input_ids"], found["labels"][0]) == ([[7, 8, 2], [9, 2, 1]], [4, 5, 2])
    one_is_enough = _read(table, folder, text_column="en")
    assert one_is_enough == found
    other = tmp_path / "marian"
    other.mkdir()
    for file in folder.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    settings = json.loads((other / "tokenizer_config.json").read_text())
    named = {"source_lang": "en", "target_lang": "de"}
    (other / "tokenizer_config.json").write_text(json.dumps(settings | named))
    assert _read(table, other) == found


def test_what_pytorch_makes_of_the_labels_is_the_decoders_input(folder: Path) -> None:
    """With and without decoder_input_ids the class computes the same."""
    table = datasets.Dataset.from_dict({"source": READ, "target": WRITTEN})
    (batch,) = as_examples(table, folder, TASK).batches(9)
    model = BartForConditionalGeneration.from_pretrained(folder).eval()
    ours = forward(model, batch).logits
    given = {name: torch.as_tensor(batch[name]) for name in RIGHT if name[0] != "d"}
    assert torch.allclose(model(**given).logits, ours, atol=1e-6)
    assert np.array_equal(
        batch["decoder_input_ids"],
        np.where(
            (shifted := model.prepare_decoder_input_ids_from_labels(given["labels"])) == 1,
            batch["decoder_input_ids"], shifted,
        ),
    )  # fmt: skip


def test_a_decoders_padding_is_the_models_own(folder: Path, tmp_path: Path) -> None:
    """Where the tokenizer has another: as transformers shifts the labels."""
    other = tmp_path / "model"
    shutil.copytree(folder, other)
    config = BartConfig(**{**_SIZES, "pad_token_id": 5})
    config.save_pretrained(other)
    table = datasets.Dataset.from_dict({"source": READ, "target": ["eins zwei drei", "drei"]})
    found = _read(table, other)
    model = BartForConditionalGeneration(config)
    shifted = model.prepare_decoder_input_ids_from_labels(torch.as_tensor(found["labels"]))
    assert found["decoder_input_ids"] == shifted.tolist()
    assert found["decoder_input_ids"][1] == [2, 9, 2, 5]


def test_rows_without_one_side_are_left_out(folder: Path) -> None:
    table = datasets.Dataset.from_dict(
        {"source": [*READ, "", "one", None], "target": [*WRITTEN, "eins", " ", "drei"]}
    )
    assert _read(table, folder)["labels"] == RIGHT["labels"]
    empty = datasets.Dataset.from_dict({"source": ["", " "], "target": ["eins", "zwei"]})
    with pytest.raises(InputError, match="no row with text"):
        _read(empty, folder)


@pytest.mark.parametrize(
    ("columns", "named", "said"),
    [
        ({"a": READ, "b": READ, "c": READ}, {}, "name what is read and what is written"),
        ({"text": READ}, {}, "has one column, text, and the model reads one text and writes"),
        ({"source": READ}, {}, "--target-column"),
        ({"source": READ, "target": [1, 2]}, {}, "--target-column"),
        ({"a": READ, "b": WRITTEN}, {"target_column": "c"}, "no column 'c', it has a, b"),
        ({"a": READ, "b": [1, 2]}, {"text_column": "a", "target_column": "b"}, "holds no text"),
    ],
)
def test_what_is_no_pair_is_one_sentence(
    columns: dict[str, Any], named: dict[str, str], said: str, folder: Path
) -> None:
    with pytest.raises(InputError, match=said) as caught:
        _read(datasets.Dataset.from_dict(columns), folder, **named)
    assert len(str(caught.value).splitlines()) == 1
