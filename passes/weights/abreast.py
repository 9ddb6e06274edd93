"""Forward passes that wait for each other: all stop at a map before any of them goes on.

What a narrowed sublayer is solved for from all batches, the next one reads. So every batch is on
its way at once, each in a thread of its own, of which only one runs at a time: ``narrow.py`` is
told what each has come to, and answers with what the map shall put out there. Between two stops a
pass holds what the model itself hands on from layer to layer, and what is hidden where it stops.
"""

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Thread, current_thread
from typing import Any

import torch
from torch import Tensor

from ffmerge.errors import InputError
from ffmerge.models import heap
from ffmerge.models.inputs import StopForward, forward, unchunked
from ffmerge.models.probe import Array
from ffmerge.passes.weights.activations import hooked

Batch = Mapping[str, Array]


@dataclass(frozen=True)
class Stop:
    """Where a pass stands: a map by its path, what it was given and what it put out.

    ``stream`` is what that is going to be added to, where it is known (``stream.py``), ``read``
    what the first map of its sublayer was given.
    """

    path: str
    given: Tensor
    out: Tensor
    stream: Tensor | None
    read: Tensor | None


class Pass(Thread):
    """A batch on its way through a model, from stop to stop."""

    def __init__(self, model: Any, batch: Batch) -> None:
        """Run to the first stop."""
        super().__init__(daemon=True)
        self.model, self.batch = model, batch
        self.stream: Tensor | None = None
        self.read: Tensor | None = None
        self._stops: SimpleQueue[Stop | BaseException] = SimpleQueue()
        self._answers: SimpleQueue[Tensor | StopForward | None] = SimpleQueue()
        self.start()
        self.at = self._next()

    def run(self) -> None:
        """Run the model, in this thread."""
        try:
            with torch.no_grad():
                forward(self.model, self.batch)
            raise InputError("the model does not run all its sublayers on this data.")
        except BaseException as error:  # raised again where it is waited for
            self._stops.put(error)

    def stop(self, path: str, given: Tensor, out: Tensor) -> Tensor | None:
        """Stop, in this thread, until it is answered what shall be put out: None, what is."""
        self._stops.put(Stop(path, given, out, self.stream, self.read))
        self.stream = self.read = None
        answer = self._answers.get()
        if isinstance(answer, StopForward):
            raise answer
        return answer

    def go_on(self, answer: Tensor | None = None) -> None:
        """Go on to the next stop, with ``answer`` in the place of what was put out."""
        self._answers.put(answer)
        self.at = self._next()

    def end(self) -> None:
        """Go no further, and hold nothing any more."""
        self._answers.put(StopForward())
        self.join()
        del self.at

    def _next(self) -> Stop:
        found = self._stops.get()
        if isinstance(found, BaseException):
            raise found
        return found


@contextmanager
def abreast(
    model: Any, paths: Iterable[str], streams: Iterable[str], reads: Iterable[str] = ()
) -> Generator[Callable[[Batch], Pass], None, None]:
    """Give what starts a pass that stops behind each of the maps; all end with the block.

    ``streams`` are the modules that are given the stream, each before its map, and ``reads`` the
    first maps of the sublayers.
    """
    passes: list[Pass] = []

    def keep(path: str, _: Any, args: tuple[Tensor, ...], out: Tensor) -> None:
        found = current_thread()
        assert isinstance(found, Pass)
        found.stream = args[0]

    def keep_read(path: str, _: Any, args: tuple[Tensor, ...], out: Tensor) -> None:
        found = current_thread()
        assert isinstance(found, Pass)
        found.read = args[0]

    def stop(path: str, _: Any, args: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
        found = current_thread()
        assert isinstance(found, Pass)  # nothing else runs the model meanwhile
        return found.stop(path, args[0], out)

    def start(batch: Batch) -> Pass:
        passes.append(Pass(model, batch))
        return passes[-1]

    with (
        hooked(model, streams, keep),
        hooked(model, reads, keep_read),
        hooked(model, paths, stop),
        unchunked(model),
        heap.returned(),
    ):
        try:
            yield start
        finally:
            for each in passes:
                each.end()
