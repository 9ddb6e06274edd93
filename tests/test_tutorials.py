"""The tutorials' commands, run again: they succeed, and the pages tell what is printed."""

import re
from pathlib import Path
from typing import Any

import pytest
import tutorials

import ffmerge
from ffmerge.models.manifest import Manifest


def words(text: str) -> list[str]:
    """Return the words of a text: no digits, which differ between processors, and no frames."""
    return re.findall(r"[A-Za-z][A-Za-z.,:/_-]*", text)


def is_told(said: str, page: str) -> bool:
    """Tell whether a page holds what was said, word for word."""
    return " ".join(words(said)) in " ".join(words(page))


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("texts", "writer", "translator")]


@pytest.mark.parametrize("name", ["pictures", *SLOW])
def test_a_person_gets_from_a_checkpoint_to_a_package_under_a_size(
    name: str, tmp_path: Path, command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tutorial = tutorials.TUTORIALS[name]
    page = (tutorials.PAGES / f"{name}.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", str(tutorials.WIDTH))
    tutorial.make(tmp_path)
    code, out, err = command(*tutorial.command.split()[1:])
    assert code == 0, err
    assert tutorial.command in page and is_told(out, page)
    package = tmp_path / "small" / "package"
    assert ffmerge.audit(package).ok
    assert Manifest.read(package).files
    assert tutorial.use in page
    for mistake in tutorial.mistakes.values():
        code, _, err = command(*mistake.split()[1:])
        assert code == 2 and mistake in page
        assert is_told(err, page), (mistake, err)
        assert not (tmp_path / "tiny").exists()
