"""Fixtures every test file may use."""

import json
from collections.abc import Callable
from typing import Any

import golden
import pytest
import torch
from architectures import GENERATE
from tiny import FAMILIES

import ffmerge.__main__ as command_line

Command = Callable[..., tuple[int, str, str]]

# Modules of tests that `make test-fast` leaves out: each takes more than about ten seconds, most of
# them because they export models or start processes. What they test is in `make test`.
HEAVY = frozenset(
    """
    architectures bits call cli compare compress demo device engines export float32 fused fuzz
    golden gptq hooks inputs large_file lean loaded loaders narrow narrow_rows offload optimum
    optimum_plugin own_export own_parts packaging properties quantize quantize_models quickstart
    real_inputs recover recover_runs remote_code rivals runtime_footprint runtime_validate
    runtimes scale search serving tampering trace translation tutorials variants versions
    vit_base walk
    """.split()
)

# with several, a product's last bit depends on where its inputs lie, and some tests ask for it
torch.set_num_threads(1)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Callable[..., Any]:
    return FAMILIES[request.param]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command in this process; give its exit code, stdout and stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()  # what came before is not the command's
        with pytest.raises(SystemExit) as ended:
            command_line.main([*map(str, arguments)])
        return int(ended.value.code or 0), *capsys.readouterr()

    return call


@pytest.fixture
def run(command: Command) -> Callable[..., tuple[int, Any, str]]:
    """Run a command in this process; give its exit code, its JSON if any, and its stderr."""

    def call(*arguments: object) -> tuple[int, Any, str]:
        code, out, err = command(*arguments)
        return code, json.loads(out) if out.startswith("{") else {}, err

    return call


@pytest.fixture
def golden_result(request: pytest.FixtureRequest) -> golden.Check:
    """Compare with the result of a name in tests/golden, or write it if --write-golden is given."""
    write = request.config.getoption("--write-golden")

    def compare(name: str, found: Any, tolerance: float = 0.0) -> None:
        golden.check(name, found, write, tolerance)

    return compare


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-table", action="store_true", help="write docs/architectures.md anew")
    parser.addoption("--write-golden", action="store_true", help="write tests/golden anew")


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the marks in this same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep on one worker what shares fixtures or packages; mark what `make test-fast` leaves out.

    Every other architecture is free.
    """
    for item in items:
        name = item.path.stem
        case = getattr(item, "callspec", None)
        architecture = case and case.params.get("name")
        if name in ("test_serving", "test_optimum", "test_call") or architecture in GENERATE:
            name = "generate"
        elif name == "test_architectures":
            name = item.name
        item.add_marker(pytest.mark.xdist_group(name))
        if item.path.stem.removeprefix("test_") in HEAVY:
            item.add_marker(pytest.mark.heavy)
