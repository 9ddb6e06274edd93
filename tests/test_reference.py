"""The reference tasks: data that never changes, splits that never meet, models that are good."""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from reference import numerals, tasks, village
from reference.tasks import REFERENCES

from ffmerge.models import checkpoint, data, digits

# the least (or most) that a shipped model reaches on the first 300 test examples, and its metric
REACHED = {
    "digits": ("accuracy", 0.95),
    "village": ("perplexity", 3.4),
    "numerals": ("chrF", 97),
}
EVERY = pytest.mark.parametrize("name", list(REFERENCES))


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
    """Pixels are told apart by a thousandth: their last bits are the processor's."""
    parts = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        whole = np.rint(array * 1000) if array.dtype.kind == "f" else array
        parts.update(name.encode() + whole.astype("<i8").tobytes())
    return parts.hexdigest()[:16]


@pytest.mark.parametrize(
    ("name", "split", "digest"),
    [
        ("digits", "test", "772a0bd8180894e0"),
        ("village", "test", "8581f49deb1616ea"),
        ("numerals", "test", "be6295cbe5cddeec"),
    ],
)
def test_the_data_is_the_same_on_every_run(name: str, split: str, digest: str) -> None:
    load = REFERENCES[name].load
    assert _digest(load(split)) == digest
    again, other = load(split), load(split, seed=1)
    assert _digest(again) == digest != _digest(other)


@EVERY
def test_no_example_is_in_two_splits(name: str) -> None:
    seen: set[bytes] = set()
    for split in tasks.SPLITS:
        arrays = REFERENCES[name].load(split)
        first = arrays["pixel_values" if name == "digits" else "input_ids"]
        if name == "numerals":  # padded to each split's longest
            first = np.pad(first, ((0, 0), (0, 64 - first.shape[1])))
        rows = {row.tobytes() for row in first}
        assert not rows & seen
        seen |= rows


def test_no_handwritten_digit_is_in_two_splits() -> None:
    from sklearn.datasets import load_digits

    sources = [digits.sources(split) for split in digits.SIZES]
    together = np.concatenate(sources)
    assert sorted(together) == list(range(1797))
    images = load_digits(return_X_y=True)[0]
    assert len(np.unique(images, axis=0)) == 1797  # nor the same image under two numbers


def test_a_sum_of_digits_is_what_the_picture_shows() -> None:
    pixels, pairs = digits.draw("test")
    given = digits.load("test")
    assert given["labels"].tolist() == ((pairs[0] + pairs[1]) % 10).tolist()
    assert given["pixel_values"].shape == (4000, 1, 8, 16)
    assert (given["pixel_values"].min(), given["pixel_values"].max()) == (-1, 1)
    assert np.array_equal(pixels, given["pixel_values"])


@pytest.mark.parametrize(
    ("hour", "minute", "english", "german"),
    [
        (21, 45, "quarter to ten in the evening", "einundzwanzig Uhr fünfundvierzig"),
        (0, 0, "twelve sharp in the morning", "null Uhr"),
        (1, 1, "one past one in the morning", "ein Uhr eins"),
        (12, 30, "half past twelve in the evening", "zwölf Uhr dreißig"),
        (23, 31, "twenty-nine to twelve in the evening", "dreiundzwanzig Uhr einunddreißig"),
    ],
)
def test_both_languages_tell_the_same_time(
    hour: int, minute: int, english: str, german: str
) -> None:
    assert numerals.clock(hour, minute) == (english, german)


def test_the_village_keeps_its_facts() -> None:
    random = np.random.RandomState(0)
    text = " ".join(village.page(random, 20_000))
    jobs: dict[str, set[str]] = {}
    for sentence in text.split(" . "):
        words = sentence.split()
        if words[1:3] == ["is", "a"]:
            jobs.setdefault(words[0], set()).add(words[3])
        if len(words) == 5 and words[1] in ("plus", "minus", "times"):
            a, _, b, _, result = words
            sums = {"plus": int(a) + int(b), "minus": int(a) - int(b), "times": int(a) * int(b)}
            assert int(result) == sums[words[1]]
    assert len(jobs) > 50
    assert all(len(each) == 1 for each in jobs.values())


@EVERY
def test_a_shipped_model_is_small_and_good(name: str) -> None:
    reference = REFERENCES[name]
    assert (reference.folder / "model.safetensors").stat().st_size <= 4_000_000
    rows: Any = {key: array[:300] for key, array in reference.load("test").items()}
    measured = reference.metric(checkpoint.load(reference.folder), data.from_arrays(rows))
    metric, bound = REACHED[name]
    better = measured[metric] <= bound if metric == "perplexity" else measured[metric] >= bound
    assert better, measured
