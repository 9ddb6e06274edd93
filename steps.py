"""Steps of a long command whose outputs are kept until its end: the same call goes on after a kill.

``compress.py`` does its work in these. A step writes into a folder of its own, which appears whole,
in a hidden folder beside the output; with it stands what the call was (:func:`call_of`). Where that
is another one, everything is done again.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ffmerge.errors import InputError
from ffmerge.files import CAN_LOCK, lock, read_json, staged, write_json
from ffmerge.progress import announce

_CALL, RESULT = "call.json", "step.json"


class Steps:
    """The steps of one call that makes ``out``; ``folder`` holds what is done, if any is."""

    def __init__(self, out: Path, call: str, again: bool = False) -> None:
        """Take up what the same ``call`` has left, or with ``again`` nothing."""
        self.folder = out.with_name(f".{out.name}.steps")
        self._call = call
        file = self.folder / _CALL
        self._same = not again and file.is_file() and read_json(file) == call

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes from these steps; a folder with nothing done is gone after it.

        Raises:
            InputError: another one is at work on the same output, or it cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot write {self.folder}: {error.strerror or error}.") from error
        held = lock(self.folder)
        if held is None and CAN_LOCK:
            raise InputError(
                f"another command is at work in {self.folder}: wait for it, or choose another "
                "output."
            )
        try:
            yield
        finally:
            if self.folder.is_dir() and not any(self.folder.iterdir()):
                self.folder.rmdir()
            if held is not None:
                os.close(held)

    def has(self, name: str) -> bool:
        """Say whether a step is done."""
        return self._same and (self.folder / name / RESULT).is_file()

    def do(self, name: str, make: Callable[[Path], Mapping[str, Any]]) -> dict[str, Any]:
        """Return what ``make`` told, which wrote into the folder of the step: now or before."""
        if not self._same:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left in self.folder.iterdir():
                if left.is_dir():
                    shutil.rmtree(left)
                else:
                    left.unlink()
            write_json(self.folder / _CALL, self._call)
            self._same = True
        target = self.folder / name
        if self.has(name):
            announce(f"{name} is done already")
        else:
            with staged(target) as folder:
                write_json(folder / RESULT, dict(make(folder)))
        found: dict[str, Any] = read_json(target / RESULT)
        return found

    def remove(self) -> None:
        """Remove all of it: the call has come to its end."""
        shutil.rmtree(self.folder, ignore_errors=True)


def call_of(options: Mapping[str, Any], *inputs: str | None) -> str:
    """Return what tells one call from another: its options, and the files that it reads.

    Of a file count its path, size and time, of a folder those of all files in it.
    """
    files = []
    for given in inputs:
        path = Path(given or "").expanduser()
        below = [path]
        if given and path.is_dir():
            below = sorted(path.rglob("*"))
        for file in below:
            if given and file.is_file():
                state = file.stat()
                files.append([str(file), state.st_size, state.st_mtime_ns])
    text = json.dumps([dict(options), inputs, files], default=str, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
