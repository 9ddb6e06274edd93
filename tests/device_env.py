"""The third environment: what a device has, no torch (`make install-device`)."""

import os
import subprocess
from pathlib import Path

import pytest

import ffmerge

ROOT = Path(__file__).parents[1]
PYTHON = ROOT / ".venv-device" / "bin" / "python"


def require_device() -> Path:
    """Return its Python; without it `make test` fails, a plain pytest skips."""
    if not PYTHON.exists():
        missing = "the device's environment is not installed: run `make install-device`"
        (pytest.fail if os.environ.get("FFMERGE_DEVICE") == "required" else pytest.skip)(missing)
    return PYTHON


def run_on_device(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run its Python with these arguments, on the very code that is tested."""
    path = str(Path(ffmerge.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": path}
    command = [require_device(), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
