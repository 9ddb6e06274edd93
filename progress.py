"""Progress on stderr, so that stdout is the result's alone; every command shows its steps here.

On a terminal these are bars; in a log, a line every few seconds. With ``-v`` every step is a line,
with ``-q`` nothing is told.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import Progress as Bars

from ffmerge.files import FIRST_PROCESS

EVERY = 5.0  # seconds between two lines of a log
Progress = Callable[[str, int, int], None]  # a step, how much of it is done, of how much


_told = {"verbose": False, "quiet": False}


def tell(verbose: bool = False, quiet: bool = False) -> None:
    """Let every step be a line from now on, or none."""
    _told.update(verbose=verbose and not quiet, quiet=quiet)


def announce(what: str) -> None:
    """Tell on stderr what begins."""
    if FIRST_PROCESS and not _told["quiet"]:
        print(f"ffmerge: {what}", file=sys.stderr, flush=True)


def silent(step: str, done: int, total: int) -> None:
    """Show nothing."""


@contextmanager
def shown() -> Iterator[Progress]:
    """Yield ``show(step, done, total)``, a bar on stderr; total 0 means: no end is known."""
    console = Console(stderr=True)
    if not FIRST_PROCESS or _told["quiet"]:
        yield silent
        return
    if _told["verbose"] or not console.is_terminal:
        yield _lines()
        return
    with Bars(console=console, transient=True) as bars:
        by_step: dict[str, Any] = {}

        def show(step: str, done: int, total: int) -> None:
            name = step.partition(":")[0]  # behind it stands what changes, like a loss
            if name not in by_step:
                by_step[name] = bars.add_task(step, total=total or None)
            bars.update(by_step[name], description=step, completed=done)

        yield show


def _lines() -> Progress:
    """Return a display that writes a line on stderr where the last one is some seconds old.

    Told to be verbose, it writes every step, with the seconds since the first.
    """
    began = last = time.monotonic()

    def show(step: str, done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < EVERY and not _told["verbose"]:
            return
        last = now
        line = step
        if total:
            line += f" {done}/{total}"
        if _told["verbose"]:
            line += f" ({now - began:.1f} s)"
        announce(line)

    return show
