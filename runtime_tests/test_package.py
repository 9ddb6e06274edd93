from pathlib import Path

import pytest

from ffmerge.models.manifest import Manifest
from ffmerge.passes.graph.audit import audit
from ffmerge.runtime_tests.parity import check_parity
from ffmerge.runtime_tests.runtimes.registry import find_runtime


def test_every_listed_file_is_there_and_unchanged(package: Path) -> None:
    Manifest.read(package).check_files(package)


@pytest.mark.parametrize("optimization", find_runtime("cpu").levels)
def test_outputs_are_those_of_pytorch(package: Path, optimization: str) -> None:
    outputs = check_parity(package, Manifest.read(package), optimization=optimization)
    assert outputs
    assert [o for o in outputs if not o.ok] == []


def test_no_weight_is_stored_twice(package: Path) -> None:
    assert audit(package).duplicates == ()


def test_every_tie_has_one_initializer(package: Path) -> None:
    assert [tie for tie in audit(package).ties if not tie.ok] == []
