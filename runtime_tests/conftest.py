"""The option that names the package the checks in this folder run on."""

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--package``."""
    parser.addoption("--package", type=Path, help="folder of the ffmerge package to check")


@pytest.fixture
def package(request: pytest.FixtureRequest) -> Path:
    """Return the package that was named."""
    folder = request.config.getoption("--package")
    if folder is None:
        pytest.skip("no --package given: python -m ffmerge.runtime_tests --package FOLDER")
    return Path(folder)
