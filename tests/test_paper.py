"""The example of the paper's three set-ups, on rows and checkpoints that are at hand."""

from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import paper
import pytest
from PIL import Image
from reference import tasks
from transformers import AutoTokenizer, ViTImageProcessor

VILLAGE, NUMERALS = (tasks.REFERENCES[name].folder for name in ("village", "numerals"))


def test_text_is_cut_into_blocks_without_a_gap() -> None:
    tokenizer = AutoTokenizer.from_pretrained(VILLAGE)
    pages = tokenizer.batch_decode(tasks.load_text("test", count=40)["input_ids"])
    rows = datasets.Dataset.from_dict({"text": pages})
    (batch,) = paper.text(rows, str(VILLAGE), 3).batches(8)
    length = min(1024, tokenizer.model_max_length)
    whole = tokenizer("\n\n".join(pages))["input_ids"]
    count = min(3, len(whole) // length)
    assert batch["input_ids"].shape == (count, length)
    assert batch["input_ids"].ravel().tolist() == whole[: count * length]


def test_pairs_are_turned_and_padding_is_no_target() -> None:
    english, german = zip(*tasks.numeral_pairs("test", 0, 5), strict=True)
    rows = datasets.Dataset.from_dict({"sourceString": german, "targetString": english})
    (batch,) = paper.pairs(rows, str(NUMERALS), 5).batches(8)
    own = tasks.load_numerals("test", 0, 5)  # made there without text_target
    assert np.array_equal(batch["input_ids"], own["input_ids"])
    assert np.array_equal(batch["labels"], own["labels"])


def test_pictures_are_prepared_in_the_order_of_their_rows(tmp_path: Path) -> None:
    ViTImageProcessor(size={"height": 4, "width": 4}).save_pretrained(tmp_path)
    pictures = [Image.new("L", (5, 6), value) for value in (0, 255, 0)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    table = {"image": pictures, "label": [3, 1, 2]}
    rows = datasets.Dataset.from_dict(table, features=features)
    examples = paper.images(rows, str(tmp_path), 2)
    (batch,) = examples.batches(8)
    assert batch["pixel_values"].shape == (2, 3, 4, 4)
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [-1.0, 1.0]  # mean and std are 0.5
    assert batch["labels"].tolist() == [3, 1]


@pytest.mark.parametrize("method", ["permute", "calibrated"])
def test_a_set_up_is_merged_in_step_and_saved(method: str, tmp_path: Path) -> None:
    english, german = zip(*tasks.numeral_pairs("validation", 0, 30), strict=True)
    rows = datasets.Dataset.from_dict({"sourceString": german, "targetString": english})
    setup = replace(paper.SETUPS["opus"], rows=(20, 10))
    result = paper.merge(setup, str(NUMERALS), rows, 2, method, str(tmp_path / "out"))
    assert {group.stack for group in result.record.groups} == {"encoder", "decoder"}
    assert len({group.layers for group in result.record.groups}) == 1
    assert result.record.metric["examples"] == 10
    assert (tmp_path / f"out-{method}" / "model.ffmerge.safetensors").is_file()


def test_the_hub_ids_are_those_of_the_paper() -> None:
    """Facts of section 2 of the paper and of the authors' code."""
    ids = {name: (setup.model, setup.data[:2], setup.k) for name, setup in paper.SETUPS.items()}
    assert ids == {
        "gpt2": ("openai-community/gpt2-large", ("Salesforce/wikitext", "wikitext-103-raw-v1"), 13),
        "vit": ("google/vit-base-patch16-224", ("ILSVRC/imagenet-1k", None), 5),
        "opus": ("Helsinki-NLP/opus-mt-zh-en", ("Helsinki-NLP/tatoeba_mt", "eng-zho"), 3),
    }
