"""What every engine must do: open a model and run it, on exactly what was asked for.

Each of ``ort.py``, ``vino.py``, ``evaluator.py`` and ``web.py`` is one engine and lists its
:class:`Runtime`, one for each name that ``--provider`` takes; ``registry.py`` finds them. Opening
a model gives a :class:`Session`, whose ``run`` takes arrays by input and gives arrays by output.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ffmerge.errors import FfmergeError, InputError, RuntimeCheckError
from ffmerge.models.probe import Array
from ffmerge.runtime_tests.memory import Resident, resident

LEVEL = "all"  # the optimization that an engine serves with


@dataclass(frozen=True, eq=False)
class Session:
    """A model that an ``engine`` has loaded.

    ``used`` is the engine's own name of what runs it, ``device`` where that is. ``compute`` takes
    the names of outputs and the inputs, and returns the outputs in that order.
    """

    engine: str
    used: str
    device: str
    compute: Callable[[Sequence[str], Mapping[str, Array]], Sequence[Array]] = field(repr=False)

    def run(self, names: Sequence[str], feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Return the named outputs.

        Raises:
            RuntimeCheckError: the engine refuses the inputs, lacks an output or fails.
        """
        outputs = failing(self.engine, "run", lambda: self.compute(list(names), dict(feeds)))
        return dict(zip(names, outputs, strict=True))


@dataclass(frozen=True)
class Placement:
    """How many nodes ran on each part of an engine: the compute nodes by operator, and all others.

    A compute node writes something else than int64 or bool, which are what shapes, positions and
    masks are made of; a copy between devices computes nothing.
    ``device_bytes`` is the most that the engine held on another device than the processor, None if
    it does not tell.
    """

    compute: Mapping[str, Mapping[str, int]]
    other: Mapping[str, int]
    device_bytes: int | None = None

    def counts(self) -> dict[str, int]:
        """Return the number of compute nodes on each part."""
        return {part: sum(ops.values()) for part, ops in self.compute.items()}

    def fraction(self, part: str) -> float:
        """Return which fraction of the compute nodes ran on ``part``."""
        counts = self.counts()
        return counts.get(part, 0) / max(sum(counts.values()), 1)

    @staticmethod
    def total(placed: Iterable["Placement | None"]) -> "Placement | None":
        """Return the sums over several graphs, None if nothing is known of any."""
        compute, other = defaultdict[str, Counter[str]](Counter), Counter[str]()
        held: list[int] = []
        known = [each for each in placed if each]
        for each in known:
            other.update(each.other)
            for part, ops in each.compute.items():
                compute[part].update(ops)
            if each.device_bytes is not None:
                held.append(each.device_bytes)
        if not known:
            return None
        counts = {part: dict(ops) for part, ops in compute.items()}
        if not held:
            return Placement(counts, dict(other))
        return Placement(counts, dict(other), sum(held))


def _silent(model: Path, names: Sequence[str], feeds: Mapping[str, Array]) -> Placement | None:
    """Return None: the engine does not tell where its nodes ran."""


@dataclass(frozen=True)
class Runtime:
    """An engine, as ``--provider`` calls it (``name``) and as it calls itself (``requested``).

    It is checked at each of its ``levels`` of graph optimization, the last of which it serves
    with. ``arithmetic`` is the precision of its float32 products, a row of the tolerance table.
    ``profile`` runs a model once and returns where its nodes ran, None if the engine does not tell;
    ``resident`` reads the memory of the process that holds the model.
    """

    name: str
    requested: str
    start: Callable[[Path | bytes, str, int], Session] = field(repr=False)
    levels: tuple[str, ...] = (LEVEL,)
    arithmetic: str = "fp32"
    profile: Callable[..., Placement | None] = field(default=_silent, repr=False)
    resident: Callable[[], Resident | None] = field(default=resident, repr=False)

    def open(self, model: Path | bytes, level: str = LEVEL, threads: int = 0) -> Session:
        """Return a session on what was ``requested``; never one that fell back to something else.

        ``threads`` is for one operator, 0 for all cores.

        Raises:
            InputError: the runtime has no such level.
            NotInstalled: the engine, or the device it needs, is not there.
            RuntimeCheckError: the engine fell back, or does not load the model.
        """
        if level not in self.levels:
            raise InputError(f"unknown optimization {level!r}: {self.name} has {self.levels}.")
        session = self.start(model, level, threads)
        if session.used != self.requested:
            raise RuntimeCheckError(
                f"{self.requested} was asked for and not used: the engine fell back to "
                f"{session.used}, because its libraries or its device are missing here."
            )
        return session


def failing(engine: str, doing: str, work: Callable[[], Any]) -> Any:
    """Return what ``work`` returns; whatever it raises is an error of ours that names both."""
    try:
        return work()
    except FfmergeError:
        raise
    except Exception as error:  # the errors of these engines have no common class of their own
        what = " ".join(str(error).split())  # one line, as they are printed
        raise RuntimeCheckError(f"{engine} does not {doing} the model: {what}") from error
