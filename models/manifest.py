"""``ffmerge.json``: what a package holds and promises, as data.

The exporter writes it last. Whatever opens a package (serving, the runtime tests, the report) reads
it first, and has it check the files before one is opened.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ffmerge.config import DTYPES, SHORT
from ffmerge.errors import InputError
from ffmerge.files import open_inside, plain, read_json, restored, sha256, size_text, write_json
from ffmerge.models.codes import Form
from ffmerge.models.probe import Probe
from ffmerge.models.record import MergeRecord, Tie
from ffmerge.profiles import PROFILES

NAME, REFERENCE = "ffmerge.json", "reference.safetensors"
SCHEMA = 3
RTOL = 1e-5  # of float32: what an element may be off in parts of its size
DIGITS = 16  # of a tensor's sha256: it names what changed, that of the file tells that it did


@dataclass(frozen=True)
class FileRecord:
    """One file of the package, relative to its folder."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class TensorRecord:
    """Where the bytes of an initializer are, so that a change of the file can be named."""

    name: str
    path: str
    offset: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class MetricResult:
    """A task metric, and on how many examples it was measured."""

    name: str
    value: float
    examples: int


@dataclass(frozen=True)
class Skip:
    """Something a pass left alone, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class GraphRecord:
    """A graph: its file, its outputs, and the inputs on which it is compared with PyTorch.

    With ``parts`` it does what those other graphs do, which are then there for who wants them.
    ``rounding`` says by how much an element of each output is off in PyTorch's float32, on these
    very inputs, beyond ``RTOL`` of its size; it is empty where that was not measured. ``optional``
    are inputs that have a default in the file, which ONNX Runtime takes something else for. Of a
    graph of one size, outputs ``by_token`` have the tokens of a row as second dimension.
    """

    path: str
    outputs: tuple[str, ...]
    probe: Probe
    parts: tuple[str, ...] = ()
    rounding: Mapping[str, float] = field(default_factory=dict)
    optional: tuple[str, ...] = ()
    by_token: tuple[str, ...] = ()


@dataclass(frozen=True)
class Variant:
    """A ``graph`` in another form: ``path`` is what a runtime opens.

    Its ``kind`` is ort or prepacked, or the precision or profile that it has where a package has
    several. If it is not ``portable`` it depends on the processor it was made on, and so do its
    bytes. Of a precision or profile of its own ``cache`` is the type of the keys and values that it
    takes, and ``optional`` as a graph's.
    """

    kind: str
    path: str
    portable: bool
    graph: str
    cache: str | None = None
    optional: tuple[str, ...] = ()

    def recorded(self, graph: GraphRecord) -> GraphRecord:
        """Return the record of ``graph``, whose variant this is, with inputs as this takes them."""
        if self.cache is None:
            return graph
        probe = graph.probe.with_cache(self.cache)
        return replace(graph, probe=probe, optional=self.optional)


@dataclass(frozen=True, repr=False)
class Manifest:
    """The package's contents; the same bytes for the same input (no times).

    ``bytes_total`` is the sum of ``files``, ``bytes_unique`` that of the distinct initializers,
    ``parameter_bytes`` that of the distinct PyTorch parameters. ``metric`` is PyTorch's on the real
    rows that the package holds, if they have labels. ``bits`` are those of each weight, by name,
    where they were chosen for a budget; ``int8`` says of graphs in int8, by path, what has a range
    of its own in their products: rows, or blocks of them. ``graphs``, ``dtype`` and
    ``profile`` (what the graphs are for, ``export --for``) are the first ones, others ``variants``.
    """

    versions: Mapping[str, str]
    source: Mapping[str, Any]
    model_type: str
    task: str
    dtype: str
    opset: int
    parameters: int
    parameter_bytes: int
    bytes_total: int
    bytes_unique: int
    merge: MergeRecord | None
    ties: tuple[Tie, ...]
    skipped: tuple[Skip, ...]
    graphs: tuple[GraphRecord, ...]
    files: tuple[FileRecord, ...]
    tensors: tuple[TensorRecord, ...] = ()
    metric: MetricResult | None = None
    variants: tuple[Variant, ...] = ()
    bits: Mapping[str, Form] = field(default_factory=dict)
    int8: Mapping[str, str] = field(default_factory=dict)
    profile: str = "portable"

    def __repr__(self) -> str:
        size, dtypes = size_text(self.bytes_total), ", ".join(self.dtypes)
        paths = ", ".join(graph.path for graph in self.graphs)
        return f"<Manifest: {self.model_type}, {self.task}, {dtypes}, {size}, {paths}>"

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The precisions that the package has its graphs in, the one of ``graphs`` first."""
        kinds = [variant.kind for variant in self.variants if variant.kind in DTYPES]
        return (self.dtype, *dict.fromkeys(kinds))

    @property
    def profiles(self) -> tuple[str, ...]:
        """What the package has graphs for, the profile of ``graphs`` first."""
        kinds = [variant.kind for variant in self.variants if variant.kind in PROFILES]
        return (self.profile, *dict.fromkeys(kinds))

    @property
    def kinds(self) -> tuple[str, ...]:
        """What its graphs are told apart by: its profiles if there are several, else precisions."""
        if len(self.profiles) > 1:
            return self.profiles
        return self.dtypes

    def of_kind(self, kind: str) -> "Manifest":
        """Return what it says of the graphs for one of its profiles, or in one of its precisions.

        Raises:
            InputError: the package has none.
        """
        if kind in PROFILES:
            return self.in_profile(kind)
        return self.in_dtype(kind)

    def in_dtype(self, dtype: str | None = None) -> "Manifest":
        """Return what it says of the graphs in one precision, by default the first.

        Raises:
            InputError: the package has none in it.
        """
        wanted = self.dtype
        if dtype is not None:
            wanted = SHORT.get(dtype, dtype)
        if wanted not in self.dtypes:
            raise InputError(f"the package has no {dtype}: there is {', '.join(self.dtypes)}.")
        if len(self.dtypes) == 1:
            return self
        graphs = self._graphs(wanted)
        if wanted != "fp32":  # weights are rounded much further
            graphs = [replace(graph, rounding={}) for graph in graphs]
        return replace(self, dtype=wanted, graphs=tuple(graphs), variants=())

    def in_profile(self, profile: str | None = None) -> "Manifest":
        """Return what it says of the graphs for one profile, by default the first.

        Raises:
            InputError: the package has none for it.
        """
        wanted = profile or self.profile
        if wanted not in self.profiles:
            there = ", ".join(self.profiles)
            raise InputError(
                f"the package has no graphs for {profile}: there are those for {there}."
            )
        if len(self.profiles) == 1:
            return self
        graphs = self._graphs(wanted)
        return replace(self, profile=wanted, graphs=tuple(graphs), variants=())

    def _graphs(self, kind: str) -> list[GraphRecord]:
        """Return the graphs of a kind, each where it is in that."""
        paths = {graph.path: graph.path for graph in self.graphs}
        found = {each.graph: each for each in self.variants if each.kind == kind}
        paths |= {path: variant.path for path, variant in found.items()}
        graphs = []
        for graph in self.graphs:
            if graph.path in found:
                graph = found[graph.path].recorded(graph)
            parts = tuple(paths[part] for part in graph.parts)
            graphs.append(replace(graph, path=paths[graph.path], parts=parts))
        return graphs

    def served(self, kind: str = "onnx") -> dict[str, GraphRecord]:
        """Return the graphs that are used together, none another's part, by path of that kind.

        A precision is a kind, too, and so is a profile.

        Raises:
            InputError: the package has none of that kind.
        """
        parts = {part for graph in self.graphs for part in graph.parts}
        records = {graph.path: graph for graph in self.graphs if graph.path not in parts}
        if kind in ("onnx", self.dtype, self.profile):
            return records
        found = {}
        for variant in self.variants:
            if variant.kind == kind and variant.graph in records:
                found[variant.path] = variant.recorded(records[variant.graph])
        if not found:
            raise InputError(f"the package holds no graph of the kind {kind!r}.")
        return found

    def write(self, folder: Path) -> None:
        """Write ``ffmerge.json`` into ``folder``."""
        value = {"schema": SCHEMA, **plain(self)}
        if self.merge:
            value["merge"] = self.merge.to_json()
        write_json(folder / NAME, value)

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read the manifest of a package.

        Raises:
            InputError: there is none, or it is of another schema.
        """
        if not (folder / NAME).is_file():
            raise InputError(_no_package(folder))
        value = read_json(folder / NAME)
        if not isinstance(value, dict) or value.pop("schema", None) != SCHEMA:
            raise InputError(
                f"{folder / NAME} is not of schema {SCHEMA}: export the package again."
            )
        try:
            manifest: Manifest = restored(cls, value)
            return manifest
        except (TypeError, KeyError) as error:
            raise InputError(
                f"{folder / NAME} is not a manifest this version reads: {error}."
            ) from error

    def check_files(self, folder: Path) -> None:
        """Raise InputError at the first listed file that is outside, a link, missing or changed.

        So it does at a graph or variant that is none of the files. Of a changed file it names the
        tensors whose bytes changed.
        """
        for file in self.files:
            try:
                descriptor = open_inside(folder, file.path)
            except InputError as error:
                raise InputError(f"{folder / NAME} lists {file.path!r}, which {error}") from error
            try:
                size = os.fstat(descriptor).st_size
                if size != file.bytes or sha256(descriptor) != file.sha256:
                    where = self._changed(file, descriptor)
                    raise InputError(
                        f"{folder / file.path} is not the file that {NAME} describes: {where}. "
                        "Export again."
                    )
            finally:
                os.close(descriptor)
        listed = {file.path for file in self.files}
        opened = [graph.path for graph in self.graphs]
        opened += [variant.path for variant in self.variants]
        for path in opened:
            if path not in listed:
                raise InputError(
                    f"{folder / NAME} names {path!r}, which is none of its files: export again."
                )

    def _changed(self, file: FileRecord, descriptor: int) -> str:
        """Say what of a file is not as recorded."""
        size = os.fstat(descriptor).st_size
        if size != file.bytes:
            return f"it has {size} bytes instead of {file.bytes}"
        recorded = [tensor for tensor in self.tensors if tensor.path == file.path]
        if not recorded:
            return "its bytes changed"
        changed = []
        for tensor in recorded:
            if sha256(descriptor, tensor.offset, tensor.bytes)[:DIGITS] != tensor.sha256:
                changed.append(tensor.name)
        if not changed:
            return "other bytes than those of its tensors changed"
        names = ", ".join(changed[:4])
        if len(changed) > 4:
            names += f" and {len(changed) - 4} more"
        return f"the bytes of {names} changed"


def reference_key(graph: str, case: int, output: str) -> str:
    """Return the name under which what PyTorch gave is kept in ``REFERENCE``."""
    return f"{graph}/{case}.{output}"


def best_keys(graph: str, case: int, output: str) -> tuple[str, str]:
    """Return the names under which the best classes of logits are kept, and their scores."""
    key = reference_key(graph, case, output)
    return f"{key}.classes", f"{key}.scores"


def input_key(graph: str, name: str) -> str:
    """Return the name under which an input of the real case is kept in ``REFERENCE``."""
    return f"{graph}/real.{name}"


LABELS = "real.labels"  # what the labels of the real rows are kept under in ``REFERENCE``


def record_files(folder: Path) -> tuple[FileRecord, ...]:
    """Return a record of every file below ``folder``, sorted by path."""
    records = []
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            records.append(FileRecord(name, path.stat().st_size, sha256(path)))
    return tuple(records)


def _no_package(folder: Path) -> str:
    """Return what is wrong with a folder that holds no manifest, and what to do."""
    if not folder.exists():
        return f"{folder} does not exist."
    hint = "ffmerge export makes one of a checkpoint."
    if (folder / "package" / NAME).is_file():  # of ffmerge compress
        hint = f"give {folder / 'package'}."
    return f"{folder} is no package, as it holds no {NAME}: {hint}"
