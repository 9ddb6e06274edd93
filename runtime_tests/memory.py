"""The memory of this process, as the system counts it."""

import gc
from pathlib import Path

from ffmerge.models import heap

Resident = tuple[int, int]  # bytes in memory: all, and the part that no file backs


def resident(trim: bool = True) -> Resident | None:
    """Return this process's resident and anonymous bytes, freed heap given back first.

    Without the trim the heap that loading the model freed counts as well.
    """
    rollup = Path("/proc/self/smaps_rollup")
    if not rollup.exists():
        return None
    gc.collect()
    if trim:
        heap.trim()
    sizes = {}
    try:
        for line in rollup.read_text().splitlines():
            name, *_, size, unit = line.split()
            if unit == "kB":
                sizes[name] = 1024 * int(size)
    except OSError:
        return None
    return sizes["Rss:"], sizes["Anonymous:"]


def growth(before: Resident | None, after: Resident | None) -> Resident | tuple[None, None]:
    """Return what two readings of :func:`resident` differ by, None where there is none."""
    if before is None or after is None:
        return None, None
    return after[0] - before[0], after[1] - before[1]
