"""A short part of ``benchmarks/fuzz.py``: changed inputs end well or in one sentence."""

from collections import Counter
from pathlib import Path

import fuzz
import pytest


@pytest.mark.parametrize("only", ["graph", "manifest", "config", "weights"])
def test_changed_inputs_end_well_or_in_one_sentence(tmp_path: Path, only: str) -> None:
    outcomes = fuzz.run(tmp_path, range(16), only)
    assert [each for each in outcomes if each[2] not in fuzz.RIGHT] == []
    assert Counter(outcome for _, _, outcome in outcomes)["one sentence"] >= 4


def test_what_a_case_opens_outside_its_folder_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what a command does that no case should: the run would not pass over it."""
    import ffmerge.__main__ as command_line

    def reads(words: list[str]) -> None:
        (tmp_path / "secret" / "file").read_text()
        raise SystemExit(0)

    def faults(words: list[str]) -> None:
        raise ValueError("boom")

    rooms = (tmp_path, tmp_path / "other")
    for room, bad, found in zip(rooms, (reads, faults), ("opened", "exception"), strict=True):
        monkeypatch.setattr(command_line, "main", bad)
        with pytest.raises(RuntimeError, match=found):
            fuzz.run(room, range(1), "graph")
