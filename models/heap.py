"""Memory of this process: when it is looked for what can be freed, and freed memory given back.

The command line calls it around imports, the exporter around what makes many objects, and narrowing
around its many threads.
"""

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # of mallopt(3)
_LARGE, _LARGEST = 1 << 20, 1 << 25  # bytes; the second is what glibc comes to by itself
_ANY = 1 << 30
_MADE = 100_000  # objects that are made between two looks; Python's own is 700


def trim() -> None:
    """Give back what this process has freed and its C library keeps, where it can be asked to.

    Of many threads each has a heap of its own, and what one has freed no other takes.
    """
    if sys.platform != "linux":
        return
    give_back = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl has not
    if give_back:
        give_back(0)


@contextmanager
def returned() -> Iterator[None]:
    """Have what is freed inside given back at once, if it is large.

    glibc keeps it, in a heap for each thread, and takes none of another thread's: of many threads
    that take turns much memory lies idle (an encoder narrowed: 3.12 GB at its peak, so 2.67).
    """
    _set(_MMAP_THRESHOLD, _LARGE)
    try:
        yield
    finally:
        _set(_MMAP_THRESHOLD, _LARGEST)


@contextmanager
def kept() -> Iterator[None]:
    """Have what is freed inside kept for what is asked for next, of any size.

    The system clears each page that it gives again: a third of the page faults of an export were
    activations of one layer after another.
    """
    _set(_MMAP_THRESHOLD, _ANY)
    _set(_TRIM_THRESHOLD, _ANY)
    try:
        yield
    finally:
        _set(_MMAP_THRESHOLD, _LARGEST)
        _set(_TRIM_THRESHOLD, 2 * _LARGEST)


def _set(what: int, size: int) -> None:
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's does this, musl has none
        if mallopt:
            mallopt(what, size)


@contextmanager
def importing() -> Iterator[None]:
    """Let modules be imported and no cycles be looked for among their objects, then or later.

    PyTorch and transformers make half a million, which stay as long as the process does. A second
    command of a process imports little, and what the first one left can be freed.
    """
    if gc.get_freeze_count():
        yield
        return
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()


@contextmanager
def rarely_collected() -> Iterator[None]:
    """Let Python look for cycles of objects less often: what is made inside stays, mostly.

    A trace makes a million objects that live as long as it does, and every look goes through them.
    """
    before = gc.get_threshold()
    if gc.isenabled() and 0 < before[0] < _MADE:
        gc.set_threshold(_MADE, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
