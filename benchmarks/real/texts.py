"""Text that every Python brings: docstrings of its library and the pages of its language reference.

``python benchmarks/real/texts.py FOLDER`` writes each part into a file of its own. Split by file:
nothing of a file that is calibrated on is measured on, whoever runs this. Releases of Python differ
in their docstrings, so that figures of two of them are of different texts.
"""

import argparse
import ast
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

SHORTEST = 200  # characters of a docstring that counts
PARTS = ("calibrate", "calibrate", "validate", "test")  # what becomes of every fourth file


def part(name: str) -> list[str]:
    """Return the documents of a part, the pages of the reference first, each as one text."""
    chosen = []
    for file, text in [*sorted(topics.items()), *_modules()]:
        if PARTS[zlib.crc32(file.encode()) % len(PARTS)] == name:
            chosen.append(text)
    return chosen


def sentences(name: str) -> list[str]:
    """Return the paragraphs of a part that are prose, one line each."""
    found = {}
    for text in part(name):
        for paragraph in text.split("\n\n"):
            line = " ".join(paragraph.split())
            words = line.split()
            if 8 <= len(words) <= 60 and line[-1] in ".:" and ">>>" not in line:
                found[line] = None
    return [*found]


def _modules() -> Iterator[tuple[str, str]]:
    """Yield name and docstrings of every module of the standard library."""
    root = Path(sysconfig.get_path("stdlib"))
    for file in sorted(root.rglob("*.py")):
        name = file.relative_to(root).as_posix()
        if "test" in name or "site-packages" in name or "pydoc_data" in name:
            continue
        try:
            tree = ast.parse(file.read_text("utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        texts = []
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                text = ast.get_docstring(node) or ""
                if len(text) >= SHORTEST:
                    texts.append(text)
        if texts:
            yield name, "\n\n".join(texts)


def main() -> None:
    """Write the text of each part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True)
    for name in dict.fromkeys(PARTS):
        (folder / f"{name}.txt").write_text("\n\n".join(part(name)), "utf-8")


if __name__ == "__main__":
    main()
