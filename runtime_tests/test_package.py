from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from ffmerge.models.manifest import Manifest
from ffmerge.runtime_tests.parity import check_parity
from ffmerge.runtime_tests.runtimes.registry import find_runtime

# Smaller initializers (norms, shapes) may be equal by chance and cost next to nothing.
LARGE = 1024


def test_every_listed_file_is_there_and_unchanged(package: Path) -> None:
    Manifest.read(package).check_files(package)


@pytest.mark.parametrize("optimization", find_runtime("cpu").levels)
def test_outputs_are_those_of_pytorch(package: Path, optimization: str) -> None:
    outputs = check_parity(package, Manifest.read(package), optimization=optimization)
    assert outputs
    assert [o for o in outputs if not o.ok] == []


def test_no_large_initializer_is_stored_twice(package: Path) -> None:
    for graph in Manifest.read(package).graphs:
        first: dict[object, str] = {}
        for name, key in _contents(package / graph.path):
            assert key not in first, f"{name} holds the same bytes as {first[key]}"
            first[key] = name


def test_members_of_a_tie_have_one_initializer(package: Path) -> None:
    manifest = Manifest.read(package)
    for graph in manifest.graphs:
        stored = {name for name, _ in _contents(package / graph.path)}
        for tie in manifest.ties:
            assert len(stored.intersection(tie.members)) <= 1, f"tie {tie.name} is stored twice"


def _contents(model: Path) -> Iterator[tuple[str, object]]:
    """Yield the large initializers' names and contents, a matrix the same as its transpose."""
    seen: set[object] = set()
    for graph in ir.load(model).graphs():
        for name, value in graph.initializers.items():
            tensor = value.const_value
            if tensor is None or tensor.nbytes < LARGE:
                continue
            place = (getattr(tensor, "location", name), getattr(tensor, "offset", None))
            if place in seen:  # one region of the data file under two names is stored once
                continue
            seen.add(place)
            array = tensor.numpy()
            turned = np.ascontiguousarray(array.T)
            contents = sorted([(array.shape, array.tobytes()), (turned.shape, turned.tobytes())])
            yield name, (tensor.dtype, *contents[0])
