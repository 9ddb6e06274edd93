"""Columns of text as model inputs: what is read, and for an encoder-decoder what is written."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ffmerge.errors import FfmergeWarning, InputError, first_line
from ffmerge.files import read_json
from ffmerge.models.examples import Examples
from ffmerge.models.metrics import IGNORED
from ffmerge.models.packages import of_model
from ffmerge.models.pictures import Labels
from ffmerge.models.probe import Array

_MAX_TOKENS = 512
# What configurations call the places of a text, and of what speech and long documents become.
_PLACES = ("max_position_embeddings", "n_positions")
_PLACES_OF_TARGETS = ("max_target_positions", "max_decoder_position_embeddings")


def is_text(table: Any, column: str) -> bool:
    """Tell whether a column, or a language of a column of translations, holds text."""
    kind = str(getattr(table.features.get(column), "dtype", ""))
    return kind in ("string", "large_string") or column in languages(table)


def languages(table: Any) -> list[str]:
    """Return the languages of the first column of translations: it holds a text in each."""
    for feature in table.features.values():
        if isinstance(feature, dict):
            kinds = {str(getattr(each, "dtype", "")) for each in feature.values()}
            if kinds and kinds <= {"string", "large_string"}:
                return list(feature)
    return []


def check_text(table: Any, columns: Sequence[str], source: str) -> None:
    """Raise InputError at a column that holds no text."""
    for column in columns:
        if not is_text(table, column):
            raise InputError(f"the column {column!r} of {source} holds no text: name another one.")


def column_of(rows: Any, column: str) -> list[str]:
    """Return the texts of a column, or of a language of a column of translations."""
    if column in rows:
        values = rows[column]
    else:
        values = next(
            [each.get(column) if each else None for each in cells]
            for cells in rows.values()
            if any(isinstance(each, dict) and column in each for each in cells)
        )
    return [value or "" for value in values]


def direction(choices: Sequence[str], source: str, folder: str | Path | None) -> tuple[str, str]:
    """Return which of two languages is read and which is written, as the tokenizer says.

    Where it does not, the first is read, and a warning says so.
    """
    file = Path(folder or "") / "tokenizer_config.json"
    settings = read_json(file) if file.is_file() else {}
    first, second = str(settings.get("source_lang")), str(settings.get("target_lang"))
    if {first, second} == {*choices}:
        return first, second
    first, second = choices
    warnings.warn(
        f"{source} is read as {first} to {second}: give --text-column and --target-column for "
        "another direction.",
        FfmergeWarning,
        stacklevel=2,
    )
    return first, second


def of_texts(
    table: Any, read: Sequence[str], labels: Labels, source: str, folder: str | Path | None
) -> Examples:
    """Return the rows of a table that are not empty as tokens, with ``labels`` if there are any.

    ``read`` are one column of texts, or two that are read as a pair.
    """
    lengths = lengths_of_texts(table, read, source)
    tokenizer, longest = tokenizer_of(source, folder)

    def take(rows: Sequence[int]) -> dict[str, Array]:
        part = table[list(rows)]
        inputs = _tokens(tokenizer, longest, *(column_of(part, column) for column in read))
        if labels:
            inputs["labels"] = labels[1](part[labels[0]])
        return inputs

    return Examples([*lengths], take, lengths)


def lengths_of_texts(table: Any, columns: Sequence[str], source: str) -> dict[int, int]:
    """Return how many characters the rows have that have a text in each of the columns.

    Raises:
        InputError: there is no such row.
    """
    whole = table[:]
    found = {}
    for row, cells in enumerate(zip(*(column_of(whole, each) for each in columns), strict=True)):
        if all(cell.strip() for cell in cells):
            found[row] = sum(map(len, cells))
    if not found:
        named = " and ".join(map(repr, columns))
        raise InputError(f"{source} has no row with text in {named}.")
    return found


def of_pairs(
    table: Any, first: str, second: str, source: str, folder: str | Path | None
) -> Examples:
    """Return the rows of a table that are not empty as what is read and, as labels, written."""
    lengths = lengths_of_texts(table, (first, second), source)
    tokenizer, longest = tokenizer_of(source, folder)
    targets = targets_of(second, source, folder)

    def take(rows: Sequence[int]) -> dict[str, Array]:
        part = table[list(rows)]
        read = _tokens(tokenizer, longest, column_of(part, first))
        return read | targets.ids(column_of(part, second))

    return Examples([*lengths], take, lengths)


@dataclass(frozen=True)
class Targets:
    """What a decoder writes: the column of its text, and how that becomes labels."""

    column: str
    tokenizer: Any
    longest: int
    start: int | None
    pad: int

    def ids(self, texts: Sequence[str]) -> dict[str, Array]:
        """Return labels, and where it is known what a decoder begins with also its inputs."""
        written = called(self.tokenizer, self.longest, text_target=list(texts))
        ids, mask = written["input_ids"], written["attention_mask"]
        if self.start is not None and (ids[:, 0] == self.start).all():
            ids, mask = ids[:, 1:], mask[:, 1:]
        found = {"labels": np.where(mask != 0, ids, IGNORED)}
        if self.start is not None:
            begun = np.full_like(ids, self.start)
            begun[:, 1:] = np.where(mask != 0, ids, self.pad)[:, :-1]
            found["decoder_input_ids"] = begun
        return found


def targets_of(column: str, source: str, folder: str | Path | None) -> Targets:
    """Return how the texts of a column become labels of the model in ``folder``."""
    tokenizer, longest = tokenizer_of(source, folder)
    config = _config(folder)
    for name in _PLACES_OF_TARGETS:
        longest = _within(longest, config.get(name))
    pad = config.get("pad_token_id")
    if pad is None:
        pad = tokenizer.pad_token_id
    return Targets(column, tokenizer, longest, config.get("decoder_start_token_id"), int(pad))


def tokenizer_of(source: str, folder: str | Path | None) -> tuple[Any, int]:
    """Return the tokenizer of a model, and how many tokens of a row are read.

    It pads on the right, whatever it does for generating: positions are counted from the left.
    """
    tokenizer = of_model("AutoTokenizer", folder, source)
    if tokenizer.pad_token is None:  # any token will do: it is masked
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    tokenizer.padding_side = "right"
    longest = min(tokenizer.model_max_length, _MAX_TOKENS)
    for name in _PLACES:
        longest = _within(longest, _config(folder).get(name))
    return tokenizer, longest


def _within(longest: int, places: Any) -> int:
    """Return how many tokens are read where a configuration may say how many places there are."""
    if isinstance(places, int) and places > 0:
        return min(longest, places)
    return longest


def _config(folder: str | Path | None) -> dict[str, Any]:
    file = Path(folder or "") / "config.json"
    found = read_json(file) if folder and file.is_file() else {}
    return found if isinstance(found, dict) else {}


def _tokens(tokenizer: Any, longest: int, *texts: Sequence[str]) -> dict[str, Array]:
    """Return texts, or pairs of them, as model inputs."""
    return dict(called(tokenizer, longest, *(list(column) for column in texts)))


def called(tokenizer: Any, longest: int, *texts: Any, **more: Any) -> Any:
    """Return what a tokenizer returns for a batch, called as a person calls it.

    Raises:
        InputError: it cannot read the texts, for example for want of a token for unknown words, or
            finds no tokens in them.
    """
    try:
        found = tokenizer(
            *texts, **more, return_tensors="np", padding=True, truncation=True, max_length=longest
        )
    except Exception as error:  # those of the tokenizers library have no class of their own
        raise InputError(
            f"the tokenizer in {tokenizer.name_or_path} cannot read this text: {first_line(error)}."
        ) from error
    if not found["input_ids"].size:
        raise InputError(
            f"the tokenizer in {tokenizer.name_or_path} finds no token in a text of the data: is "
            "it the model's, and does the text hold more than invisible characters?"
        )
    return found
