"""Texts in words with a tag for each, as token classifiers learn them.

``models/table.py`` calls :func:`of_words` for a table with lists of words and lists of tags. The
first piece of a word has the word's tag and the others none, as in transformers' own example.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ffmerge.errors import InputError
from ffmerge.models.examples import Examples
from ffmerge.models.labels import label_ids
from ffmerge.models.metrics import IGNORED
from ffmerge.models.packages import package
from ffmerge.models.probe import Array
from ffmerge.models.texts import called, tokenizer_of

_WORD_COLUMNS = ("tokens", "words")
_TAG_COLUMNS = ("ner_tags", "tags", "labels", "pos_tags", "chunk_tags")


def word_columns(table: Any, label_column: str | None) -> tuple[str, str] | None:
    """Return the columns of words and of tags; None: the table has no lists of words."""
    words = [name for name in _WORD_COLUMNS if _inner(table, name) is not None]
    named = (label_column,) if label_column else _TAG_COLUMNS
    tags = [name for name in named if _inner(table, name) is not None]
    if not words or not tags:
        return None
    return words[0], tags[0]


def _inner(table: Any, column: str) -> Any:
    """Return what a column holds lists of; None: it is not there, or holds no lists."""
    feature = table.features.get(column)
    if isinstance(feature, list):
        return feature[0]
    return getattr(feature, "feature", None)


def of_words(table: Any, words: str, tags: str, source: str, folder: str | Path | None) -> Examples:
    """Return the rows of a table that are not empty as tokens, with a label for each.

    Raises:
        InputError: a row has more or fewer tags than words, a tag is none of the model's, or the
            tokenizer cannot tell which word a piece is of.
    """
    tokenizer, longest = tokenizer_of(source, folder)
    if not tokenizer.is_fast:
        raise InputError(f"the tokenizer in {folder} cannot tell which word a piece is of.")
    lengths = {}
    all_tags: list[Any] = []
    for row, (some, theirs) in enumerate(zip(table[words], table[tags], strict=True)):
        if len(some) != len(theirs):
            raise InputError(
                f"row {row} of {source}, counted from 0, has {len(some)} words in {words!r} and "
                f"{len(theirs)} tags in {tags!r}."
            )
        all_tags += theirs
        if some:
            lengths[row] = len(some)
    if not lengths:
        raise InputError(f"the column {words!r} of {source} holds no words.")
    datasets = package("datasets", source)
    features = datasets.Features({tags: _inner(table, tags)})
    flat = datasets.Dataset.from_dict({tags: all_tags}, features=features)
    numbered = label_ids(tags, flat, source, folder)

    def take(chosen: Sequence[int]) -> dict[str, Array]:
        part = table[list(chosen)]
        encoded = called(tokenizer, longest, part[words], is_split_into_words=True)
        labels = np.full(encoded["input_ids"].shape, IGNORED)
        for row, theirs in enumerate(part[tags]):
            for position, word in _first_pieces(encoded.word_ids(row)):
                labels[row, position] = numbered([theirs[word]])[0]
        return {**encoded, "labels": labels}

    return Examples([*lengths], take, lengths)


def _first_pieces(word_of: Sequence[int | None]) -> Iterator[tuple[int, int]]:
    """Yield position and word of the first piece of each word; ``word_of`` is by position."""
    before = None
    for position, word in enumerate(word_of):
        if word is not None and word != before:
            yield position, word
        before = word
