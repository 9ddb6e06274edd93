"""How far a long step is: what every ``progress`` argument is called with, and batches that do."""

from collections.abc import Callable, Iterator

from ffmerge.models.examples import Examples
from ffmerge.models.probe import Array

Progress = Callable[[str, int, int], None]  # step, how much is done, of how much (0: not known)


def silent(step: str, done: int, total: int) -> None:
    """Show nothing."""


def shown_batches(
    examples: Examples, size: int, progress: Progress, step: str
) -> Iterator[dict[str, Array]]:
    """Yield the batches of ``examples`` and tell after each how many rows are done."""
    for done, batch in enumerate(examples.batches(size), 1):
        yield batch
        progress(step, min(done * size, len(examples)), len(examples))
