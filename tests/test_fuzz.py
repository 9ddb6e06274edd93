"""A short part of ``benchmarks/fuzz.py``: changed inputs end well or in one sentence."""

import signal
import time
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


def test_a_hang_that_no_alarm_ends_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of native code that waits for ever."""
    import ffmerge.__main__ as command_line

    def hangs(words: list[str]) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
        time.sleep(600)

    monkeypatch.setattr(command_line, "main", hangs)
    monkeypatch.setattr(fuzz, "SECONDS", 1)
    monkeypatch.setattr(fuzz, "GRACE", 1)
    with pytest.raises(RuntimeError, match="took too long"):
        fuzz.run(tmp_path, range(1), "graph")
