"""Fixtures every test file may use."""

from collections.abc import Callable
from typing import Any

import pytest
from tiny import FAMILIES


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Callable[..., Any]:
    return FAMILIES[request.param]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-table", action="store_true", help="write docs/architectures.md anew")
