"""Freed memory that goes back to the system."""

import ctypes
import sys


def trim() -> None:
    """Give back what this process has freed and its C library keeps, where it can be asked to.

    Of many threads each has a heap of its own, and what one has freed no other takes.
    """
    if sys.platform != "linux":
        return
    give_back = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl has not
    if give_back:
        give_back(0)
