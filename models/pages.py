"""Pages of files that this process has read: weights of a checkpoint, code of libraries.

The exporter gives them back where it has no use for them for a while: what it needs for itself,
libraries and all of the weights together are more than the weights twice. The system holds the
files anyway, and reads them again when they are asked for. What was written to since stays.
"""

import ctypes
import mmap
import os
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt

_MAPPED, _ENTRIES = Path("/proc/self/maps"), Path("/proc/self/pagemap")  # of proc(5)
_IN_MEMORY, _SWAPPED, _OF_FILE = (np.uint64(1 << bit) for bit in (63, 62, 61))
_FORGET = 4  # MADV_DONTNEED of madvise(2)


def give_back_code() -> None:
    """Give back the pages of libraries, and all else that is mapped from files to be read only."""
    if sys.platform != "linux":
        return
    for line in _MAPPED.read_text().splitlines():
        where, allowed, *_, path = line.split(maxsplit=5)
        if "w" not in allowed and path.startswith("/"):
            start, end = where.split("-")
            give_back(int(start, 16), int(end, 16))


def give_back_array(array: npt.NDArray[np.generic]) -> None:
    """Give back the pages of an array, if they are a file's."""
    if array.flags.forc:
        give_back(array.ctypes.data, array.ctypes.data + array.nbytes)


def give_back(start: int, end: int) -> None:
    """Give back the whole pages between two addresses, if all hold what is in their file.

    A page that was written to is this process's own: forgotten, it would be the file's again. So
    no other thread may write to them meanwhile.
    """
    first = -(-start // mmap.PAGESIZE)
    count = end // mmap.PAGESIZE - first
    if sys.platform != "linux" or count <= 0:
        return
    entries = _entries(first, count)
    own = (entries & _IN_MEMORY != 0) & (entries & _OF_FILE == 0)
    if len(entries) == count and not own.any() and not (entries & _SWAPPED).any():
        address, size = ctypes.c_void_p(first * mmap.PAGESIZE), count * mmap.PAGESIZE
        ctypes.CDLL(None).madvise(address, ctypes.c_size_t(size), _FORGET)


def _entries(first: int, count: int) -> npt.NDArray[np.uint64]:
    """Return what the system says of each page, of fewer where it does not tell."""
    try:
        with open(_ENTRIES, "rb", 0) as file:
            return np.frombuffer(os.pread(file.fileno(), 8 * count, 8 * first), np.uint64)
    except OSError:
        return np.empty(0, np.uint64)
