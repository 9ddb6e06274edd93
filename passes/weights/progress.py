"""Batches that show how far they are."""

from collections.abc import Iterator

from ffmerge.models.examples import Examples
from ffmerge.models.probe import Array
from ffmerge.progress import Progress


def shown_batches(
    examples: Examples, size: int, progress: Progress, step: str
) -> Iterator[dict[str, Array]]:
    """Yield the batches of ``examples`` and tell after each how many rows are done."""
    for done, batch in enumerate(examples.batches(size), 1):
        yield batch
        progress(step, min(done * size, len(examples)), len(examples))
