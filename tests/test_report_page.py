"""The report in a real browser: nothing is cut off on a phone, on a desk or in print."""

import re
import subprocess
from dataclasses import replace
from html import escape
from pathlib import Path

import numpy as np
import pytest
from packages import linear_package
from test_report import AFTER, BEFORE, STAGES
from web_env import ROOT, require_browser

from ffmerge.models.record import Group, MergeRecord
from ffmerge.runtime_tests.report import Extras, Point, write_report
from ffmerge.runtime_tests.validate import check_package

pytestmark = pytest.mark.web
OUT = ROOT / "build" / "web"
# What headless Chromium needs to stay silent; as root it has no sandbox.
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
SIZES = (10**7, 5 * 10**6, 10**6)
# How wide the page is, and by how much a table is wider than what shows of it.
MEASURE = """<script>
let hidden = 0
for (const box of document.querySelectorAll(".scroll")) {
  hidden = Math.max(hidden, box.scrollWidth - box.clientWidth)
}
parent.document.title = `${document.documentElement.scrollWidth} ${innerWidth} ${hidden}`
</script>"""


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
    points = [Point(f"way {size}, int8", size, size / 1e7, size == 10**6) for size in SIZES]
    also = Extras(commands, alike, points, "accuracy")
    report = write_report(folder, after, BEFORE, STAGES, also)
    report.write_text(report.read_text().replace("</body>", f"{MEASURE}</body>"))
    return report


def chromium(page: Path, width: int, *options: str) -> str:
    """Return what Chromium prints for a page in a window of that width."""
    command = [
        require_browser(), *FLAGS, f"--user-data-dir={page.parent / 'profile'}",
        f"--window-size={width},3600", *options, page.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def framed(page: Path, width: int) -> Path:
    """Return a page with another one in a frame: no window of the browser is below 500 wide."""
    frame = page.with_name(f"{width}.html")
    style = f"border: 0; width: {width}px; height: 3500px"
    frame.write_text(
        "<!DOCTYPE html><html><head><title></title></head><body style='margin: 0'>"
        f'<iframe style="{style}" srcdoc="{escape(page.read_text())}"></iframe></body></html>'
    )
    return frame


@pytest.mark.parametrize(("name", "width"), [("phone", 390), ("desktop", 1100)])
def test_nothing_is_wider_than_the_window(page: Path, name: str, width: int) -> None:
    page = framed(page, width)
    title = re.search(r"<title>(\d+) (\d+) (\d+)</title>", chromium(page, width, "--dump-dom"))
    assert title and int(title[1]) <= int(title[2]) <= width
    assert int(title[3]) == 0  # no table is cut off at its right
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
