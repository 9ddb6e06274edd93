"""The second environment: optimum-onnx on transformers 4.57 (`make install-optimum`)."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BIN = ROOT / ".venv-optimum" / "bin"


def require_optimum() -> Path:
    """Return the folder of its programs; without it `make test` fails, a plain pytest skips."""
    if not (BIN / "python").exists():
        missing = "the second environment is not installed: run `make install-optimum`"
        (pytest.fail if os.environ.get("FFMERGE_OPTIMUM") == "required" else pytest.skip)(missing)
    return BIN


def run_in_optimum(script: str, *arguments: object) -> str:
    """Run Python code in it, ``sys.argv[1:]`` being ``arguments``; return what it prints.

    The code can import ffmerge, optimum.onnxruntime and the helpers in tests/. The test fails
    with the end of its stderr if it ends with an error.
    """
    command = [require_optimum() / "python", "-c", script, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    if done.returncode:
        pytest.fail(f"the second environment exits with {done.returncode}:\n{done.stderr[-3000:]}")
    return done.stdout
