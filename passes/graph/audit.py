"""What a model stores more than once, whether its ties hold, and what loading it un-shares.

The first two are read from the files. What a load does is seen by loading:
``runtime_tests/loaded.py`` does that, and is handed in as ``look``, since graph passes know no
runtime.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ffmerge.errors import InputError, RuntimeCheckError
from ffmerge.models import manifest
from ffmerge.models.record import Tie
from ffmerge.passes.graph.contract import VIEWS, TieCheck, check_ties, read_ties
from ffmerge.passes.graph.read import read_model
from ffmerge.passes.graph.tensors import (
    NOTABLE,
    Stored,
    find_copies,
    is_op,
    location_of,
    stored,
)


@dataclass(frozen=True)
class Duplicate:
    """Tensors of one file with equal bytes; ``bytes`` is what storing one would save."""

    names: tuple[str, ...]
    bytes: int
    kind: str


@dataclass(frozen=True)
class Unshared:
    """A tensor that ONNX Runtime copies on loading.

    ``copies`` tensors stand in its place, ``bytes`` more than the one, by way of ``nodes``.
    """

    name: str
    bytes: int
    copies: int
    nodes: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class Loaded:
    """What a load did: copied weights, and the growth of the process in bytes.

    ``freed_bytes`` came on top of ``rss_bytes`` and were free again but not given back. None
    where the system does not tell.
    """

    unshared: tuple[Unshared, ...]
    rss_bytes: int | None
    anonymous_bytes: int | None
    freed_bytes: int | None


@dataclass(frozen=True)
class Hidden:
    """A tensor read ``uses`` times through one node: loaded once, but quantizers skip it."""

    name: str
    node: str
    uses: int


@dataclass(frozen=True)
class Audit:
    """The findings; bytes are the contents of tensors, and names carry the file if several.

    Bytes that several files read at one place count once.

    ``basis`` is "loaded" if every file was, else "graph": then ``basis_reason`` says why, and
    ``unshared_at_load`` has only what the files that were loaded show. ``memory`` is what each
    load took, by file.
    """

    files: tuple[str, ...]
    bytes_total: int
    bytes_unique: int
    bytes_duplicate: int
    duplicates: tuple[Duplicate, ...]
    unshared_at_load: tuple[Unshared, ...]
    hidden: tuple[Hidden, ...]
    ties: tuple[TieCheck, ...]
    basis: str
    basis_reason: str
    memory: Mapping[str, Mapping[str, int | None]]

    @property
    def ok(self) -> bool:
        """Nothing stored twice, nothing un-shared at load, every tie as recorded."""
        return not self.duplicates and not self.unshared_at_load and all(t.ok for t in self.ties)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**asdict(self), "ok": self.ok}


def audit(path: str | Path, look: Callable[[Path], Loaded] | None = None) -> Audit:
    """Audit an ONNX file, or each ``*.onnx`` of a package folder and of its ``onnx/``.

    Copies are looked for within each file, and across the files beside each other in a folder,
    which are used together, such as encoder and decoder, or read one data file. Not across those of
    ``onnx/``, nor a file named as another with a suffix: they are alternatives.

    Ties are those of the ``ffmerge.json`` in the folder (for a file: its folder), else those each
    file records itself. A tie must hold in every file that has one of its names, and in at least
    one. ``look`` loads a file on a runtime; where it is not given, or raises RuntimeCheckError,
    nothing is said of what a load copies.

    Raises:
        InputError: there is no ONNX file, one cannot be read, or a file of a package is not the
            one that its manifest describes.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    files = _onnx_files(path)
    promised = _promised_ties(path, folder)
    sizes: dict[object, int] = {}  # by location: bytes that several files read count once
    duplicates: list[Duplicate] = []
    hidden: list[Hidden] = []
    checks: list[TieCheck] = []
    held: dict[Path, list[Stored]] = {}
    for file, prefix in files.items():
        model = read_model(file)
        items = stored(model)
        for item in items:
            sizes[location_of(item.tensor)] = item.tensor.nbytes
        duplicates += _duplicates(items, prefix)
        hidden += _hidden(items, prefix)
        held[file] = items
        checks += check_ties(model, _ties_for(model, promised), file.name)
    together = _sharing_data(held)
    together |= {file for file in files if _used_with_others(file, folder, files)}
    duplicates += _across({files[file]: held[file] for file in files if file in together})
    unshared, memory, reasons = _load(files, look)
    total = sum(sizes.values())
    twice = sum(duplicate.bytes for duplicate in duplicates)
    labels = {file: file.relative_to(folder).as_posix() for file in files}
    return Audit(
        files=tuple(labels.values()),
        bytes_total=total,
        bytes_unique=total - twice,
        bytes_duplicate=twice,
        duplicates=tuple(duplicates),
        unshared_at_load=tuple(unshared),
        hidden=tuple(hidden),
        ties=_verdicts(checks, promised or ()),
        basis="graph" if reasons else "loaded",
        basis_reason="; ".join(reasons),
        memory={labels[file]: grown for file, grown in memory.items()},
    )


def _onnx_files(path: Path) -> dict[Path, str]:
    """Return each file with what its names begin with in a finding: its path, if several."""
    if not path.is_dir():
        return {path: ""}
    files = sorted([*path.glob("*.onnx"), *path.glob("onnx/**/*.onnx")])
    if not files:
        raise InputError(f"{path} holds no .onnx file.")
    if len(files) == 1:
        return {files[0]: ""}
    return {file: f"{file.relative_to(path).as_posix()}:" for file in files}


def _promised_ties(path: Path, folder: Path) -> Sequence[Tie] | None:
    """Return the ties of the manifest in a folder, None without one; of a package check files."""
    if not (folder / manifest.NAME).exists():
        return None
    described = manifest.Manifest.read(folder)
    if path.is_dir():
        described.check_files(folder)
    return described.ties


def _used_with_others(file: Path, folder: Path, files: Iterable[Path]) -> bool:
    """Say whether a file is used together with those beside it, and no alternative to one."""
    if file.parent != folder:
        return False
    for other in files:
        if other.parent == folder and file.stem.startswith(f"{other.stem}_"):
            return False
    return True


def _sharing_data(held: Mapping[Path, Sequence[Stored]]) -> set[Path]:
    """Return the files of whose data file another one reads, too."""
    readers: dict[Path, set[Path]] = {}
    for file, items in held.items():
        for item in items:
            if isinstance(item.tensor, ir.ExternalTensor):
                readers.setdefault(Path(item.tensor.path).resolve(), set()).add(file)
    return {file for some in readers.values() if len(some) > 1 for file in some}


def _load(
    files: Mapping[Path, str], look: Callable[[Path], Loaded] | None
) -> tuple[list[Unshared], dict[Path, dict[str, int | None]], list[str]]:
    """Return what loads copied and took of memory, and why files were not loaded."""
    if look is None:
        return [], {}, ["not loaded"]
    unshared, memory, reasons = [], {}, []
    for file, prefix in files.items():
        try:
            loaded = look(file)
        except RuntimeCheckError as error:
            reasons.append(str(error))
            continue
        unshared += [replace(each, name=prefix + each.name) for each in loaded.unshared]
        memory[file] = dict(vars(loaded))
        del memory[file]["unshared"]
    return unshared, memory, reasons


def _ties_for(model: ir.Model, promised: Sequence[Tie] | None) -> Sequence[Tie]:
    if promised is None:
        return read_ties(model)
    return [tie for tie in promised if not model.graph.initializers.keys().isdisjoint(tie.members)]


def _verdicts(checks: Iterable[TieCheck], promised: Iterable[Tie]) -> tuple[TieCheck, ...]:
    """Return one verdict on each tie, from the checks of it in every file."""
    by_tie: dict[str, list[TieCheck]] = {tie.name: [] for tie in promised}
    for check in checks:
        by_tie.setdefault(check.group, []).append(check)
    return tuple(_verdict(name, found) for name, found in by_tie.items())


def _verdict(name: str, found: Sequence[TieCheck]) -> TieCheck:
    if not found:
        return TieCheck(name, False, "none of its names is an initializer")
    for check in found:
        if not check.ok:
            return check
    return found[0]


def _duplicates(items: Sequence[Stored], prefix: str) -> Iterator[Duplicate]:
    for copies in find_copies([item.tensor for item in items]):
        size = items[copies.first].tensor.nbytes
        for kind, others in (("identical", copies.identical), ("transposed", copies.transposed)):
            if others:
                names = tuple(prefix + items[index].name for index in (copies.first, *others))
                yield Duplicate(names, len(others) * size, kind)


def _across(files: Mapping[str, Sequence[Stored]]) -> Iterator[Duplicate]:
    """Yield what several files hold and none of them could take from another's data file."""
    items: list[tuple[str, Stored]] = []
    for prefix, stored_in_file in files.items():
        for item in stored_in_file:
            if item.tensor.nbytes >= NOTABLE:
                items.append((prefix, item))
    for copies in find_copies([item.tensor for _, item in items]):
        first_of: dict[str, tuple[str, object]] = {}
        for index in sorted([copies.first, *copies.identical, *copies.transposed]):
            prefix, item = items[index]
            first_of.setdefault(prefix, (prefix + item.name, location_of(item.tensor)))
        extra = len({location for _, location in first_of.values()}) - 1
        if extra:
            names = tuple(name for name, _ in first_of.values())
            yield Duplicate(names, extra * items[copies.first][1].tensor.nbytes, "across files")


def _hidden(items: Iterable[Stored], prefix: str) -> Iterator[Hidden]:
    """Yield the tensors whose one reader is a node of ``VIEWS`` with several uses."""
    for item in items:
        uses = tuple(item.value.uses())
        if len(uses) != 1 or not is_op(uses[0].node, *VIEWS):
            continue
        after = uses[0].node.outputs[0].uses()
        if len(after) > 1:
            yield Hidden(prefix + item.name, uses[0].node.name or "", len(after))
