"""Python looks for cycles where some may be; large freed memory is given back."""

import gc
import platform
import subprocess
import sys

import pytest

from ffmerge.models import heap


def test_the_collector_is_as_it_was_after_an_error() -> None:
    before = gc.get_threshold()
    with pytest.raises(ValueError), heap.rarely_collected():
        assert gc.get_threshold()[0] > before[0] > 0
        assert gc.isenabled()
        raise ValueError
    assert gc.get_threshold() == before


@pytest.mark.parametrize("own", [0, 10**7])
def test_who_looks_more_rarely_still_does(own: int) -> None:
    before = gc.get_threshold()
    gc.set_threshold(own, 5, 5)
    try:
        with heap.rarely_collected():
            assert gc.get_threshold() == (own, 5, 5)
    finally:
        gc.set_threshold(*before)


IMPORTED = """
import atexit, gc, sys
count = lambda: sum(each["collections"] for each in gc.get_stats())
atexit.register(lambda: print(gc.get_freeze_count() > frozen))
from ffmerge.models import heap
looks = count()
with heap.importing():
    made = [[] for _ in range(10**5)]
print(count() - looks, gc.isenabled())
frozen = gc.get_freeze_count()
with heap.importing():
    more = [[] for _ in range(10**5)]
print(frozen > 10**5, gc.get_freeze_count() == frozen)
from ffmerge.__main__ import main
main(["--version"])
"""


def test_cycles_are_looked_for_neither_in_modules_nor_at_the_end() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED], check=True, stdout=subprocess.PIPE, text=True
    )
    imported, kept, version, end = done.stdout.splitlines()
    assert imported == "0 True"
    assert kept == "True True"
    assert version.startswith("ffmerge ")
    assert end == "True"


def printed(program: str, kind: str) -> float:
    """Return the number that a program prints in a process of its own."""
    command = [sys.executable, "-c", program, kind]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


HELD = """
import re, sys
from contextlib import nullcontext
import numpy as np
from ffmerge.models import heap

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

np.ones(30 << 20, np.uint8)  # after this glibc takes blocks of less from its heap
before = resident()
with heap.returned() if sys.argv[1] == "returned" else nullcontext():
    large, between = [], []
    for _ in range(32):
        large.append(np.ones(4 << 20, np.uint8))
        between.append(np.ones(64 << 10, np.uint8))
    del large
    print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's heap is asked")
def test_what_is_large_and_freed_is_given_back() -> None:
    """Of 128 MB, between which 2 MB stay, 2 MB are left, without it 130 (measured)."""
    assert printed(HELD, "returned") < 16 < 64 < printed(HELD, "as it is")


FAULTS = """
import resource, sys
from contextlib import nullcontext
import numpy as np
from ffmerge.models import heap

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

with heap.kept() if sys.argv[1] == "kept" else nullcontext():
    np.ones(40 << 20, np.uint8)
    before = faults()
    for _ in range(16):
        np.ones(40 << 20, np.uint8)
    print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's heap is asked")
def test_what_is_kept_is_given_again_without_a_fault() -> None:
    """Of sixteen blocks of 40 MB: 0 faults where they are kept, else 336 of 2 MB (measured)."""
    assert printed(FAULTS, "kept") < 16 <= printed(FAULTS, "as it is")
