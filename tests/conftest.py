"""Fixtures every test file may use."""

from collections.abc import Callable
from typing import Any

import pytest
from architectures import GENERATE
from tiny import FAMILIES


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Callable[..., Any]:
    return FAMILIES[request.param]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-table", action="store_true", help="write docs/architectures.md anew")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep on one worker what shares fixtures or packages; every other architecture is free."""
    for item in items:
        name = item.path.stem
        case = getattr(item, "callspec", None)
        architecture = case and case.params.get("name")
        if name in ("test_serving", "test_optimum") or architecture in GENERATE:
            name = "generate"
        elif name == "test_architectures":
            name = item.name
        item.add_marker(pytest.mark.xdist_group(name))
