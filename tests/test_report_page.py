"""The report in a real browser: nothing is cut off on a phone, on a desk or in print."""

import re
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from packages import linear_package
from test_report import AFTER, BEFORE, STAGES
from web_env import ROOT, require_browser

from ffmerge.models.record import Group, MergeRecord
from ffmerge.runtime_tests.report import write_report
from ffmerge.runtime_tests.validate import check_package

pytestmark = pytest.mark.web
OUT = ROOT / "build" / "web"
# What headless Chromium needs to stay silent; as root it has no sandbox.
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
MEASURE = (
    "<script>document.title = document.documentElement.scrollWidth + ' ' + innerWidth</script>"
)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a report with everything on it, and at its end a script that measures it."""
    folder = tmp_path_factory.mktemp("report")
    groups = (Group("encoder", tuple(range(3, 16))), Group("decoder", (7, 9)))
    merge = MergeRecord("calibrated", groups, 9, 5, 36, 20, {"name": None})
    eye = np.eye(4, dtype=np.float32)
    linear_package(folder / "package", eye, np.zeros(4, np.float32), merge=merge)
    found = check_package(folder / "package")
    after = replace(found, manifest=replace(found.manifest, files=AFTER.manifest.files))
    alike = [{"name": "encoder", "layers": list(range(16)), "cka": np.eye(16).tolist()}]
    commands = ["ffmerge export merged package --task image-classification --opset 20 --dtype int8"]
    report = write_report(folder, after, BEFORE, STAGES, commands, alike)
    report.write_text(report.read_text().replace("</body>", f"{MEASURE}</body>"))
    return report


def chromium(page: Path, width: int, *options: str) -> str:
    """Return what Chromium prints for a page in a window of that width."""
    command = [
        require_browser(), *FLAGS, f"--user-data-dir={page.parent / 'profile'}",
        f"--window-size={width},3600", *options, page.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.parametrize(("name", "width"), [("phone", 500), ("desktop", 1100)])
def test_nothing_is_wider_than_the_window(page: Path, name: str, width: int) -> None:
    """500 is the narrowest window of headless Chromium."""
    title = re.search(r"<title>(\d+) (\d+)</title>", chromium(page, width, "--dump-dom"))
    assert title and int(title[1]) <= int(title[2]) <= width
    OUT.mkdir(parents=True, exist_ok=True)
    picture = OUT / f"report-{name}.png"
    picture.unlink(missing_ok=True)
    chromium(page, width, f"--screenshot={picture}")
    assert picture.stat().st_size > 100_000  # measured 280,000 and more


def test_in_print_it_is_a_few_pages(page: Path) -> None:
    paper = OUT / "report.pdf"
    chromium(page, 1100, f"--print-to-pdf={paper}")
    pages = len(re.findall(rb"/Type\s*/Page\b", paper.read_bytes()))
    assert pages <= 3  # measured 3
