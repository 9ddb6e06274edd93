"""Every runtime by the name that ``--provider`` takes, installed here or not."""

from ffmerge.errors import InputError
from ffmerge.runtime_tests.runtimes import evaluator, ort, vino, web
from ffmerge.runtime_tests.runtimes.base import Runtime

ENGINES = (ort, vino, evaluator, web)
RUNTIMES = {runtime.name: runtime for engine in ENGINES for runtime in engine.RUNTIMES}


def find_runtime(name: str) -> Runtime:
    """Return the runtime of that name.

    Raises:
        InputError: there is none.
    """
    if name not in RUNTIMES:
        raise InputError(f"unknown provider {name!r}: choose from {', '.join(RUNTIMES)}.")
    return RUNTIMES[name]
