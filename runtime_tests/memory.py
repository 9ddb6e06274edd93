"""The memory of this process, as the system counts it."""

import ctypes
import gc
from pathlib import Path
from typing import NamedTuple


class Resident(NamedTuple):
    """Bytes in memory: all, and the part that no file backs."""

    rss_bytes: int
    anonymous_bytes: int


def resident(trim: bool = True) -> Resident | None:
    """Return this process's resident and anonymous bytes, freed heap given back first.

    Without the trim the heap that loading the model freed counts as well.
    """
    rollup = Path("/proc/self/smaps_rollup")
    if not rollup.exists():
        return None
    gc.collect()
    give_back = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl has not
    if give_back and trim:
        give_back(0)
    try:
        fields = [line.split() for line in rollup.read_text().splitlines()]
    except OSError:
        return None
    sizes = {field[0]: 1024 * int(field[1]) for field in fields if field[-1] == "kB"}
    return Resident(sizes["Rss:"], sizes["Anonymous:"])


def growth(
    before: tuple[int, int] | None, after: tuple[int, int] | None
) -> tuple[int, int] | tuple[None, None]:
    """Return what two readings of :func:`resident` differ by, None where there is none."""
    return (after[0] - before[0], after[1] - before[1]) if before and after else (None, None)
