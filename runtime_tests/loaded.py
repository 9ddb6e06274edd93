"""What ONNX Runtime makes of a model's weights when it loads it, seen in a fresh process.

``python -m ffmerge.runtime_tests.loaded MODEL FOLDER`` measures a load, then writes the graph
that ONNX Runtime loaded to FOLDER. That is done without the pass that merges equal constants:
it runs after they were all made, in memory that the process does not give back.
"""

import argparse
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import onnx_ir as ir
import onnxruntime as ort

from ffmerge.errors import InputError, RuntimeCheckError
from ffmerge.passes.graph.audit import Audit, Loaded, Unshared
from ffmerge.passes.graph.audit import audit as audit_files
from ffmerge.passes.graph.read import read_model
from ffmerge.passes.graph.resident import LARGE
from ffmerge.passes.graph.tensors import NOTABLE, Stored, find_copies, graphs, is_op, stored
from ffmerge.runtime_tests.footprint import TRIVIAL, answer, in_fresh_process
from ffmerge.runtime_tests.memory import growth, resident
from ffmerge.runtime_tests.runtimes.registry import find_runtime

NAME = "loaded.onnx"


def audit(path: str | Path, load: bool = True) -> Audit:
    """Return what a file or package stores twice, what is tied, and what a runtime un-shares.

    As the command: with ``load`` each file is loaded by ONNX Runtime in a fresh process, and what
    it made of the weights is looked at; see :func:`ffmerge.passes.graph.audit.audit`.

    Raises:
        InputError: there is no ONNX file, or one cannot be read.
    """
    if load:
        return audit_files(path, look)
    return audit_files(path)


def look(path: Path) -> Loaded:
    """Return which weights of an ONNX file a load multiplies, and the memory it took.

    A weight is un-shared when constants of at least ``NOTABLE`` bytes more stand in its place,
    equal to it, transposed, or computed from it; or when the runtime packs it for its products
    and keeps it for other uses, which only memory shows.

    Raises:
        RuntimeCheckError: ONNX Runtime does not load the model, or does not save what it loaded.
    """
    before = read_model(path)
    with tempfile.TemporaryDirectory(prefix="ffmerge-") as folder:
        memory = in_fresh_process(__spec__.name, [str(path), folder], f"loading {path}")
        try:
            after = read_model(Path(folder) / NAME)
        except InputError as error:
            raise RuntimeCheckError(f"what ONNX Runtime saved of {path}: {error}") from error
        found = [*_multiplied(before, after), *_packed(after, memory["rss_bytes"])]
    return Loaded(tuple(found), **memory)


def _multiplied(before: ir.Model, after: ir.Model) -> Iterator[Unshared]:
    """Yield each weight in whose place constants of more elements stand, whatever their type."""
    origins, made = _notable(before), _notable(after)
    alike, made_of, rest = _equal(origins, made)
    producers = _producers(before)
    for name in rest:
        if origin := _source(name, producers, origins):
            made_of[origin].append(made[name])
    for name, copies in made_of.items():
        size = sum(item.tensor.nbytes for item in copies)
        extra = size - alike[name] * origins[name].tensor.nbytes
        elements = sum(item.tensor.size for item in copies)
        if elements > alike[name] * origins[name].tensor.size and extra >= NOTABLE:
            nodes = tuple(producers[i.name].name or "" for i in copies if i.name in producers)
            reason = f"ONNX Runtime {ort.__version__} makes {len(copies)} tensors of it on loading"
            yield Unshared(name, extra, len(copies), nodes, reason)


def _producers(model: ir.Model) -> dict[str | None, ir.Node]:
    """Return the nodes of a model by the names of what they compute."""
    producers = {}
    for graph in graphs(model):
        for node in graph:
            producers.update(dict.fromkeys((out.name for out in node.outputs), node))
    return producers


def _notable(model: ir.Model) -> dict[str, Stored]:
    """Return the stored tensors that are large enough to matter, by name."""
    return {item.name: item for item in stored(model) if item.tensor.nbytes >= NOTABLE}


def _equal(
    origins: Mapping[str, Stored], made: Mapping[str, Stored]
) -> tuple[dict[str, int], dict[str, list[Stored]], list[str]]:
    """Return which tensors were made as copies of one of the file.

    By the name of each of the file's: how many the file itself has of it, and those made of it,
    transposed or not; then the names of those made that are equal to none.
    """
    items = [*origins.values(), *made.values()]
    alike = dict.fromkeys(origins, 1)
    made_of: dict[str, list[Stored]] = {name: [] for name in origins}
    rest = set(made)
    for copies in find_copies([item.tensor for item in items]):
        if copies.first >= len(origins):
            continue
        group = [copies.first, *copies.identical, *copies.transposed]
        name = items[copies.first].name
        of_file = [index for index in group if index < len(origins)]
        alike[name] = len(of_file)
        for index in sorted(set(group) - set(of_file)):
            made_of[name].append(items[index])
            rest.discard(items[index].name)
    return alike, made_of, sorted(rest)


def _source(
    name: str, producers: Mapping[str | None, ir.Node], origins: Mapping[str, Stored]
) -> str | None:
    """Return the largest stored tensor that the value ``name`` is computed from."""
    seen, ahead = set[str](), [name]
    while ahead:
        current = ahead.pop()
        if current in seen:
            continue
        seen.add(current)
        if node := producers.get(current):
            ahead += [value.name or "" for value in node.inputs if value]
    found = [(item.tensor.nbytes, item.name) for item in origins.values() if item.name in seen]
    return max(found, default=(0, None))[1]


def _packed(after: ir.Model, grown: int | None) -> Sequence[Unshared]:
    """Return the weights kept both raw and packed, if memory grew by as much as that says."""
    once = twice = 0
    both = []
    for item in stored(after):
        once += item.tensor.nbytes
        packing = _packing(item)
        if 0 < len(packing) < len(item.value.uses()):
            twice += item.tensor.nbytes
            nodes = tuple(node.name or "" for node in packing)
            reason = "packed for these nodes on loading, and kept as it is for others"
            both.append(Unshared(item.name, item.tensor.nbytes, 2, nodes, reason))
    if grown is None or grown <= once + twice / 2:
        return []
    return both


def _packing(item: Stored) -> list[ir.Node]:
    """Return the nodes that a weight is packed for: products with a large matrix on the right."""
    is_matrix = item.tensor.dtype == ir.DataType.FLOAT and len(item.tensor.shape) == 2
    if not is_matrix or item.tensor.nbytes < LARGE:
        return []
    uses = item.value.uses()
    return [use.node for use in uses if use.idx == 1 and is_op(use.node, "MatMul", "Gemm")]


def _load_here(model: Path, folder: Path) -> dict[str, int | None]:
    ort.InferenceSession(TRIVIAL, providers=["CPUExecutionProvider"])
    before = resident()
    session = find_runtime("cpu").open(model)
    untrimmed, after = resident(trim=False), resident()
    del session
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / NAME)
    # else the saved model points at data files beside the original
    key = "session.optimized_model_external_initializers_"
    options.add_session_config_entry(f"{key}file_name", f"{NAME}_data")
    options.add_session_config_entry(f"{key}min_size_in_bytes", str(NOTABLE))
    try:
        ort.InferenceSession(
            str(model),
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=["CommonSubexpressionElimination"],
        )
    except Exception as error:  # ONNX Runtime's errors have no common class of their own
        raise RuntimeCheckError(f"ONNX Runtime does not save the model: {error}") from error
    rss, anonymous = growth(before, after)
    freed, _ = growth(after, untrimmed)
    if freed is not None:
        freed = max(0, freed)
    return {"rss_bytes": rss, "anonymous_bytes": anonymous, "freed_bytes": freed}


def main() -> None:
    """Print the memory of a load as JSON, and write what was loaded."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path)
    answer(_load_here, **vars(parser.parse_args()))


if __name__ == "__main__":
    main()
