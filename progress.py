"""Progress on stderr, so that stdout is the result's alone; every command shows its steps here."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import Progress as Bars

from ffmerge.files import FIRST_PROCESS

Progress = Callable[[str, int, int], None]  # a step, how much of it is done, of how much


def silent(step: str, done: int, total: int) -> None:
    """Show nothing."""


@contextmanager
def shown() -> Iterator[Progress]:
    """Yield ``show(step, done, total)``, a bar on stderr; total 0 means: no end is known."""
    console = Console(stderr=True)
    visible = console.is_terminal and FIRST_PROCESS
    with Bars(console=console, transient=True, disable=not visible) as bars:
        by_step: dict[str, Any] = {}

        def show(step: str, done: int, total: int) -> None:
            name = step.partition(":")[0]  # behind it stands what changes, like a loss
            if name not in by_step:
                by_step[name] = bars.add_task(step, total=total or None)
            bars.update(by_step[name], description=step, completed=done)

        yield show
