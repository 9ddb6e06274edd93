"""Writing without half-written results: beside the target, then one rename."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ffmerge.errors import InputError


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``target`` that becomes ``target`` when the block ends well.

    On any error the staging folder is removed; after a SIGKILL a hidden ``.NAME.partial-*``
    folder remains, which no command takes for a result. Files get the usual permissions, which
    safetensors and temporary folders do not give.

    Raises:
        InputError: ``target`` exists, or its parent cannot be written.
    """
    target = Path(target)
    if target.exists() or target.is_symlink():
        raise InputError(f"{target} exists already: remove it or choose another output.")
    try:
        target.absolute().parent.mkdir(parents=True, exist_ok=True)
        folder = Path(
            tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.absolute().parent)
        )
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror or error}.") from error
    try:
        yield folder
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        folder.rename(target)
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sha256(path: Path) -> str:
    """Return the hex SHA-256 of a file, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def size_text(count: float) -> str:
    """Return a byte count in decimal units with three figures: 1 MB is 1,000,000 bytes."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} B" if unit == "B" else f"{count:#.3g}".rstrip(".") + f" {unit}"


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON in its own key order, with a newline at the end."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Return the JSON value in a file.

    Raises:
        InputError: the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist.") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}.") from error
