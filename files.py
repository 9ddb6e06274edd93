"""Writing beside the target, then one rename; reading only what is really in the folder."""

import errno
import glob
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path, PureWindowsPath
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from safetensors import SafetensorError

from ffmerge.errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]
CAN_LOCK = fcntl is not None  # folders

# Of the processes that torchrun or accelerate launch starts, the one that writes and prints. Others
# set RANK as well, Kubernetes for one: only with a world size above 1 is it a rank.
FIRST_PROCESS = os.environ.get("RANK", "0") == "0" or os.environ.get("WORLD_SIZE", "1") == "1"
_BLOCK = 1 << 20
_OPENS_RELATIVE = os.open in os.supports_dir_fd  # not on Windows


def refuse_existing(*paths: Path) -> None:
    """Raise InputError if something is there already: before long work, not after it."""
    for path in paths:
        if path.exists() or path.is_symlink():
            raise InputError(f"{path} exists already: remove it or choose another output.")


@contextmanager
def scratch(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``target``, on its disk, that is gone when the block ends.

    After a SIGKILL a hidden ``.NAME.partial-*`` folder remains, which no command takes for a
    result; the next one that writes ``target`` removes it.

    Raises:
        InputError: ``target`` exists, or its parent cannot be written.
    """
    target = Path(target)
    clean_up(target)
    refuse_existing(target)
    with _beside(target) as folder:
        yield folder


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """Yield a hidden folder beside ``target``, locked so that no other process takes it for dead.

    Raises:
        InputError: the parent of ``target`` cannot be written.
    """
    try:
        parent = target.absolute().parent
        parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=parent))
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror or error}.") from error
    held = lock(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if held is not None:
            os.close(held)


def clean_up(target: Path) -> None:
    """Remove what processes left that were killed while they wrote ``target``.

    These are their hidden folders, and data that one had put beside a graph still in its folder.
    """
    for folder in target.absolute().parent.glob(f".{glob.escape(target.name)}.partial-*"):
        held = lock(folder)
        if held is None:
            continue
        data = target.with_name(f"{target.name}_data")
        graph_waits = (folder / target.name).is_file() and not target.exists()
        if graph_waits and not (folder / data.name).exists():
            data.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        os.close(held)


def lock(folder: Path) -> int | None:
    """Return a descriptor that locks ``folder`` until it is closed or the process ends.

    None where another process holds it, or the system locks no folders (Windows).
    """
    if fcntl is None:
        return None
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # gone meanwhile
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """Yield a folder of :func:`scratch` that becomes ``target`` when the block ends well.

    Files get the usual permissions, which safetensors and temporary folders do not give.

    Raises:
        InputError: as of :func:`scratch`, or the block could not write.
    """
    with scratch(target) as folder:
        try:
            yield folder
            for path in (folder, *folder.rglob("*")):
                path.chmod(0o755 if path.is_dir() else 0o644)
            folder.rename(target)
        except OSError as error:
            raise InputError(f"cannot write {target}: {error.strerror or error}.") from error
        except SafetensorError as error:  # its writer has no errors of the system's kind
            raise InputError(f"cannot write {target}: {error}.") from error


def write_whole(path: Path, content: bytes) -> Path:
    """Write a file beside ``path`` and rename it over ``path``; return ``path``.

    Raises:
        InputError: it cannot be written.
    """
    clean_up(path)
    try:
        with _beside(path) as folder:
            partial = folder / path.name
            partial.write_bytes(content)
            os.replace(partial, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}.") from error
    return path


def open_inside(folder: Path, location: str) -> int:
    """Return a descriptor of a regular file below ``folder``, opened once for reading.

    No part of ``location`` is ``..`` or a link, nothing is absolute, and the file has one name.
    What is checked is what is open: each part is opened relative to the one before without
    following links, so that a swap in between is refused or has no effect. Where the system
    cannot do that (Windows), the parts are looked at before and the file after it is open.

    Raises:
        InputError: it is not so; the message is the reason, to be put after a name.
    """
    parts = _plain_parts(location)
    try:
        if _OPENS_RELATIVE:
            descriptor = _open_part_by_part(Path(folder), parts)
        else:
            descriptor = _open_looked_at(Path(folder), parts)
    except OSError as error:
        raise InputError(_why_not(error)) from error
    state = os.fstat(descriptor)
    if stat.S_ISREG(state.st_mode) and state.st_nlink == 1:
        return descriptor
    os.close(descriptor)
    if stat.S_ISREG(state.st_mode):
        raise InputError("is a hard link, so what it holds is not the folder's own: copy it.")
    raise InputError("is not a file.")


def _plain_parts(location: str) -> list[str]:
    """Return the names a location is made of, none of which leads out of the folder."""
    parts = [part for part in location.split("/") if part not in ("", ".")]
    windows = PureWindowsPath(location)
    if not parts or "\0" in location or "\\" in location:
        raise InputError("is not a path with forward slashes.")
    if ".." in parts or windows.drive or windows.root:
        raise InputError("is outside the folder.")
    return parts


def _open_part_by_part(folder: Path, parts: list[str]) -> int:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK  # a pipe must not block: it is refused
    below = os.open(folder, os.O_RDONLY)
    for part in parts:
        try:
            inner = os.open(part, flags, dir_fd=below)
        finally:
            os.close(below)
        below = inner
    return below


def _open_looked_at(folder: Path, parts: list[str]) -> int:
    path = folder
    for part in parts:
        path /= part
        if path.is_symlink():
            raise OSError(errno.ELOOP, "link")
    return os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))


def _why_not(error: OSError) -> str:
    if error.errno in (errno.ELOOP, errno.ENOTDIR):
        return "is or is below a link, as in a hub cache: copy the folder, links resolved."
    if error.errno == errno.ENOENT:
        return "is missing."
    return f"cannot be opened: {error.strerror}."


def sha256(file: Path | int, offset: int = 0, length: int | None = None) -> str:
    """Return the hex SHA-256 of a file, or of a part of it, read in blocks.

    An open descriptor is left open.
    """
    found = hashlib.sha256()
    with open(file, "rb", closefd=not isinstance(file, int)) as stream:
        stream.seek(offset)
        left = os.fstat(stream.fileno()).st_size - offset if length is None else length
        while block := stream.read(min(left, _BLOCK)):
            found.update(block)
            left -= len(block)
    return found.hexdigest()


def size_text(count: float) -> str:
    """Return a byte count in decimal units with three figures: 1 MB is 1,000,000 bytes."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} B" if unit == "B" else f"{count:#.3g}".rstrip(".") + f" {unit}"


def plain(value: Any) -> dict[str, Any]:
    """Return a dataclass, or a dictionary of them, as plain JSON values.

    A number that is NaN or infinite becomes null.
    """
    text = json.dumps(value, default=asdict)
    values: dict[str, Any] = json.loads(text, parse_constant=lambda _: None)
    return values


def restored(kind: Any, value: Any) -> Any:
    """Return a value of the type ``kind`` from what :func:`plain` made of it.

    ``kind`` is a dataclass, a plain type, or a tuple, a mapping or a choice of such.

    Raises:
        TypeError, KeyError: a key is unknown or missing, or a value is of another kind.
    """
    members, origin = get_args(kind), get_origin(kind)
    if origin is UnionType:
        return _restored_as_one_of(members, value)
    if origin is tuple:
        return _restored_tuple(members, value)
    if origin is Mapping:
        _check_kind(value, dict)
        return {name: restored(members[1], item) for name, item in value.items()}
    if isinstance(kind, type) and is_dataclass(kind):
        _check_kind(value, dict)
        kinds = get_type_hints(kind)
        return kind(**{name: restored(kinds[name], item) for name, item in value.items()})
    if kind is float and type(value) is int:  # JavaScript writes 1.0 so
        return value
    _check_kind(value, kind)
    return value


def _check_kind(value: Any, kind: Any) -> None:
    if kind is not Any and type(value) is not kind:
        raise TypeError(f"{str(value)[:40]!r} is of another kind")


def _restored_tuple(kinds: tuple[Any, ...], values: Any) -> tuple[Any, ...]:
    _check_kind(values, list)
    if kinds[-1] is ...:
        kinds = kinds[:1] * len(values)
    return tuple(restored(kind, value) for kind, value in zip(kinds, values, strict=True))


def _restored_as_one_of(kinds: Sequence[Any], value: Any) -> Any:
    for kind in kinds:
        try:
            return restored(kind, value)
        except (TypeError, KeyError):
            continue
    raise TypeError(f"{str(value)[:40]!r} is of another kind")


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
