"""Every runtime by the name that ``--provider`` takes, installed here or not."""

from ffmerge.errors import InputError
from ffmerge.runtime_tests.runtimes import ort, web
from ffmerge.runtime_tests.runtimes.base import Runtime

RUNTIMES = {runtime.name: runtime for runtime in (*ort.RUNTIMES, *web.RUNTIMES)}


def find_runtime(name: str) -> Runtime:
    """Return the runtime of that name.

    Raises:
        InputError: there is none.
    """
    if name not in RUNTIMES:
        raise InputError(f"unknown provider {name!r}: choose from {', '.join(RUNTIMES)}.")
    return RUNTIMES[name]
