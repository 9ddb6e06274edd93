"""What the pages on the architecture name is there: every path, and every function of a module."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest
import typer
import yaml
from conftest import HEAVY

from ffmerge.__main__ import app

ROOT = Path(__file__).parents[1]
PAGES = ("docs/architecture.md", "docs/decisions.md", "CONTRIBUTING.md")
# Files that ffmerge writes or reads: their names are no paths of this repository.
_KINDS = "json onnx onnx_data ort config safetensors md html svg npz yaml toml txt"
KINDS = "|".join(_KINDS.split())
ROOMS = ("models", "passes", "exporter", "runtime_tests")
FOREIGN = ("ffmerge", "torch", "transformers", "accelerate", "onnx_ir", "optimum")


def quoted(page: str) -> list[str]:
    """Return the words of a page that stand in backquotes, and all those of its drawings."""
    text = (ROOT / page).read_text(encoding="utf-8")
    drawings = re.findall(r"^```.*?^```$", text, re.MULTILINE | re.DOTALL)
    rest = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return [word for part in (*re.findall("`([^`]+)`", rest), *drawings) for word in part.split()]


@cache
def sources() -> dict[str, list[Path]]:
    """Return the product's files by the name of their module."""
    rooms = [ROOT.glob("*.py"), *((ROOT / room).rglob("*.py") for room in ROOMS)]
    found: dict[str, list[Path]] = {}
    for path in (path for room in rooms for path in room):
        found.setdefault(path.stem, []).append(path)
    return found


@cache
def names_in(path: Path) -> set[str]:
    """Return what a module defines at its top level, and the methods of its classes."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{m.name}" for m in node.body if isinstance(m, ast.FunctionDef)}
        targets = node.targets if isinstance(node, ast.Assign) else []
        targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
        found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def missing(word: str) -> str | None:
    """Say what of a word in backquotes is not there; None if nothing is missing or meant."""
    word = word.strip("`(),;:").removesuffix("()")
    if re.fullmatch(r"(?!\.venv)(?:[\w.-]+/)+[\w.-]*", word):
        return None if (ROOT / word).exists() else f"{word} does not exist"
    match = re.fullmatch(r"(\w+)\.(\w+(?:\.\w+)*)", word)
    if not match or match[1] in FOREIGN or re.search(rf"\.({KINDS})$", word):
        return None
    paths = sources().get(match[1], [])
    if match[2] == "py" or not paths:
        return None if paths else f"{word}: no such module"
    found = any(match[2] in names_in(path) for path in paths)
    return None if found else f"{word}: {match[1]}.py has no {match[2]}"


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_is_there(page: str) -> None:
    found = [told for word in quoted(page) if (told := missing(word))]
    assert not found, "\n".join(dict.fromkeys(found))


def test_what_is_called_heavy_is_there() -> None:
    """A module that was renamed would be among the fast ones."""
    assert [name for name in HEAVY if not (ROOT / f"tests/test_{name}.py").exists()] == []


def test_the_skill_names_commands_and_options_that_there_are() -> None:
    text = (ROOT / "skills" / "ffmerge" / "SKILL.md").read_text(encoding="utf-8")
    _, head, _ = text.split("---", 2)
    assert {"name", "description"} <= set(yaml.safe_load(head))
    assert yaml.safe_load(head)["name"] == "ffmerge"
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    named = re.findall(r"`ffmerge (\w+) ([^`]*)`", text)
    assert len(named) > 5
    for name, words in named:
        known = [option for each in commands[name].params for option in each.opts]
        assert set(re.findall(r"--[\w-]+", words)) <= set(known)


def test_a_name_that_is_gone_is_noticed() -> None:
    assert missing("models/find.py") is None and missing("files.open_inside") is None
    assert missing("config.json") is None and missing("manifest.Manifest.read") is None
    assert missing("models/lost.py") == "models/lost.py does not exist"
    assert missing("files.open_outside") == "files.open_outside: files.py has no open_outside"
    assert missing("lost.open()") == "lost.open: no such module"
