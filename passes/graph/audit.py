"""What a model stores more than once, and what a runtime or a tool would un-share."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ffmerge.errors import InputError, RuntimeCheckError
from ffmerge.models import manifest
from ffmerge.models.record import Tie
from ffmerge.passes.graph.contract import VIEWS, TieCheck, check_ties, read_ties
from ffmerge.passes.graph.read import read_model
from ffmerge.passes.graph.tensors import Stored, find_copies, is_op, location_of, stored

# Added bytes from which a copy at load is a finding: exporters reshape and transpose scalars for
# their shape arithmetic in every layer, and runtimes fold those.
NOTABLE = 1024


@dataclass(frozen=True)
class Duplicate:
    """Tensors of one file with equal bytes; ``bytes`` is what storing one would save."""

    names: tuple[str, ...]
    bytes: int
    kind: str


@dataclass(frozen=True)
class Unshared:
    """A tensor that ONNX Runtime copies on loading, or by the graph alone would copy.

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

    ``basis`` of ``unshared_at_load`` is "loaded" if every file was, else "graph": then
    ``basis_reason`` says why, and the findings of the files not loaded are what constant
    folding would do to the graph. ``memory`` is what each load took, by file.
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
    which are used together, such as encoder and decoder. Not across those of ``onnx/``, nor a
    file named as another with a suffix: they are alternatives.

    Ties are those of the ``ffmerge.json`` in the folder (for a file: its folder), else those each
    file records itself. A tie must hold in every file that has one of its names, and in at least
    one. ``look`` loads a file on a runtime; where it is not given, or raises RuntimeCheckError,
    the graph is read instead.

    Raises:
        InputError: there is no ONNX file, or one cannot be read.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    files = [path]
    if path.is_dir():
        files = sorted([*folder.glob("*.onnx"), *folder.glob("onnx/**/*.onnx")])
    if not files:
        raise InputError(f"{path} holds no .onnx file.")
    promised = manifest.Manifest.read(folder).ties if (folder / manifest.NAME).exists() else None
    total, counted = 0, set[object]()
    duplicates: list[Duplicate] = []
    unshared: list[Unshared] = []
    hidden: list[Hidden] = []
    together: dict[str, list[Stored]] = {}
    memory: dict[str, dict[str, int | None]] = {}
    reasons = [] if look else ["not loaded"]
    checks: dict[str, list[TieCheck]] = {tie.name: [] for tie in promised or ()}
    for file in files:
        model, label = read_model(file), file.relative_to(folder).as_posix()
        prefix = f"{label}:" if len(files) > 1 else ""
        items = stored(model)
        total += sum(
            item.tensor.nbytes for item in items if location_of(item.tensor) not in counted
        )
        counted |= {location_of(item.tensor) for item in items}
        duplicates += _duplicates(items, prefix)
        beside = [other.stem for other in files if other.parent == folder == file.parent]
        if beside and not any(file.stem.startswith(f"{other}_") for other in beside):
            together[prefix] = items
        found = [finding for item in items if (finding := _at_load(item, prefix))]
        hidden += [finding for finding in found if isinstance(finding, Hidden)]
        copied = [finding for finding in found if isinstance(finding, Unshared)]
        try:
            if look:
                loaded = look(file)
                copied = [replace(each, name=prefix + each.name) for each in loaded.unshared]
                memory[label] = {key: n for key, n in vars(loaded).items() if key != "unshared"}
        except RuntimeCheckError as error:
            reasons.append(str(error))
        unshared += copied
        for check in check_ties(model, _ties_for(model, promised), file.name):
            checks.setdefault(check.group, []).append(check)
    duplicates += _across(together)
    twice = sum(duplicate.bytes for duplicate in duplicates)
    return Audit(
        files=tuple(file.relative_to(folder).as_posix() for file in files),
        bytes_total=total,
        bytes_unique=total - twice,
        bytes_duplicate=twice,
        duplicates=tuple(duplicates),
        unshared_at_load=tuple(unshared),
        hidden=tuple(hidden),
        ties=tuple(_verdict(name, found) for name, found in checks.items()),
        basis="graph" if reasons else "loaded",
        basis_reason="; ".join(reasons),
        memory=memory,
    )


def _ties_for(model: ir.Model, promised: Sequence[Tie] | None) -> Sequence[Tie]:
    if promised is None:
        return read_ties(model)
    return [tie for tie in promised if not model.graph.initializers.keys().isdisjoint(tie.members)]


def _verdict(name: str, found: Sequence[TieCheck]) -> TieCheck:
    if not found:
        return TieCheck(name, False, "none of its names is an initializer")
    return next((check for check in found if not check.ok), found[0])


def _duplicates(items: Sequence[Stored], prefix: str) -> Iterator[Duplicate]:
    for copies in find_copies([item.tensor for item in items]):
        first = items[copies.first]
        for kind in ("identical", "transposed"):
            others = [items[index] for index in getattr(copies, kind)]
            if others:
                names = tuple(prefix + item.name for item in (first, *others))
                yield Duplicate(names, len(others) * first.tensor.nbytes, kind)


def _across(files: Mapping[str, Sequence[Stored]]) -> Iterator[Duplicate]:
    """Yield what several files hold and none of them could take from another's data file."""
    items = [
        (p, item) for p, each in files.items() for item in each if item.tensor.nbytes >= NOTABLE
    ]
    for copies in find_copies([item.tensor for _, item in items]):
        first_of: dict[str, tuple[str, object]] = {}
        for index in sorted([copies.first, *copies.identical, *copies.transposed]):
            prefix, item = items[index]
            first_of.setdefault(prefix, (prefix + item.name, location_of(item.tensor)))
        extra = len({location for _, location in first_of.values()}) - 1
        if extra:
            names = tuple(name for name, _ in first_of.values())
            yield Duplicate(names, extra * items[copies.first][1].tensor.nbytes, "across files")


def _at_load(item: Stored, prefix: str) -> Unshared | Hidden | None:
    """Return what becomes of a tensor when every node that reads only constants is folded."""
    ends: dict[ir.Node | None, tuple[ir.DataType, int]] = {}
    for node, dtype in _uses_when_folded(item.value, item.tensor.dtype):
        ends[node] = (dtype, ends.get(node, (dtype, 0))[1] + 1)
    nodes = [node for node in ends if node is not None]
    if len(ends) > 1:
        size = sum(dtype.itemsize for dtype, _ in ends.values()) * item.tensor.size
        extra = int(size) - item.tensor.nbytes
        if extra < NOTABLE:
            return None
        kinds = Counter(node.op_type for node in nodes)
        reason = " and ".join(f"{count} {kind} nodes" for kind, count in kinds.items())
        reason += " would each be folded into a tensor of their own"
        reason += ", and it is also used directly" if None in ends else ""
        folding = tuple(node.name or "" for node in nodes)
        return Unshared(prefix + item.name, extra, len(ends), folding, reason)
    views = [node for node in item.value.consumers() if is_op(node, *VIEWS)]
    uses = sum(count for _, count in ends.values())
    if len(views) == 1 and len(item.value.uses()) == 1 and uses > 1:
        return Hidden(prefix + item.name, views[0].name or "", uses)
    return None


def _uses_when_folded(
    value: ir.Value, dtype: ir.DataType, node: ir.Node | None = None
) -> Iterator[tuple[ir.Node | None, ir.DataType]]:
    """Yield for each use that is left the node whose result it reads (None: the tensor), and type.

    ONNX Runtime removes an Identity, and a Cast to the same type, without a copy (seen in
    1.31); a Reshape folds when its shape is constant.
    """
    if value.is_graph_output():
        yield node, dtype
    for use in value.uses():
        after = use.node.outputs[0]
        if use.idx:  # as the shape of a Reshape it passes nothing on
            yield node, dtype
        elif is_op(use.node, "Transpose") or _reshapes(use.node):
            yield from _uses_when_folded(after, dtype, use.node)
        elif is_op(use.node, "Cast"):
            target = ir.DataType(use.node.attributes["to"].as_int())
            last = node if target == dtype else use.node
            yield from _uses_when_folded(after, target, last)
        elif is_op(use.node, "Identity"):
            yield from _uses_when_folded(after, dtype, node)
        else:
            yield node, dtype


def _reshapes(node: ir.Node) -> bool:
    """Say whether a node is a Reshape to constants; before opset 5 they are an attribute."""
    const = ir.convenience.get_const_tensor
    return is_op(node, "Reshape") and all(shape and const(shape) for shape in node.inputs[1:])
