"""A browser, node and the npm packages of examples/web, for the tests of `make test-web`."""

import os
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WEB = ROOT / "examples" / "web"
NODE_MODULES = WEB / "node_modules"


def require_browser() -> str:
    """Return Chromium's path; a machine without it, node or the packages skips, and says so."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    parts = {
        "Chromium (Debian: apt-get install chromium)": browser,
        "node 20 or newer": shutil.which("node"),
        "the npm packages (run `make test-web`)": NODE_MODULES.is_dir(),
    }
    missing = [name for name, there in parts.items() if not there]
    if missing:
        required = os.environ.get("FFMERGE_WEB") == "required"
        fail = pytest.fail if required else pytest.skip
        fail(f"the browser tests were not run: this machine lacks {' and '.join(missing)}")
    return str(browser)
