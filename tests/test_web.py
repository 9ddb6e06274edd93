"""A package in a real browser: the page of examples/web, and transformers.js.

``make test-web`` runs this. One node program drives one headless Chromium and reports what it
saw; the tests compare that with ONNX Runtime and PyTorch here.
"""

import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import onnxruntime as ort
import pytest
from PIL import Image, ImageDraw, ImageFont

import ffmerge
from ffmerge.models import digits
from ffmerge.models.manifest import Manifest

pytestmark = pytest.mark.web

ROOT = Path(__file__).parents[1]
WEB, OUT, MODEL = ROOT / "examples/web", ROOT / "build/web", ROOT / "models/digits_vit"
BACKENDS = ("wasm", "webgpu")
# The strokes of a 1 and a 7, as fractions of the board.
STROKES = [[(0.25, 0.1), (0.25, 0.9)], [(0.65, 0.15), (0.86, 0.15), (0.7, 0.9)]]


def require_browser() -> str:
    """Return Chromium's path; a machine without it, node or the packages skips, and says so."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    missing = [
        name
        for name, there in (
            ("Chromium (Debian: apt-get install chromium)", browser),
            ("node 20 or newer", shutil.which("node")),
            ("the npm packages (run `make test-web`)", (WEB / "node_modules").is_dir()),
        )
        if not there
    ]
    if missing:
        required = os.environ.get("FFMERGE_WEB") == "required"
        fail = pytest.fail if required else pytest.skip
        fail(f"the browser tests were not run: this machine lacks {' and '.join(missing)}")
    return str(browser)


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of packages: the digits, original and with layers 1 to 3 merged."""
    require_browser()
    folder = tmp_path_factory.mktemp("packages")
    model = ffmerge.load(MODEL)
    ffmerge.export(model, folder / "original")
    config = ffmerge.MergeConfig(window=(1, 3))
    ffmerge.merge_(model, digits.load("calibration", count=200), config)
    ffmerge.export(model, folder / "merged")
    return folder


@pytest.fixture(scope="module")
def served(packages: Path) -> Iterator[str]:
    """Yield the address of the page with those packages."""
    spec = spec_from_file_location("serve", WEB / "serve.py")
    assert spec and spec.loader
    serve = module_from_spec(spec)
    spec.loader.exec_module(serve)
    with serve.server(packages, quiet=True) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://localhost:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def seen(served: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return what the browser saw; its screenshots stay in build/web."""
    photo = tmp_path_factory.mktemp("photo") / "photo.png"
    _print_digits("34", photo)
    OUT.mkdir(parents=True, exist_ok=True)
    job = {
        "url": served, "chromium": require_browser(), "out": str(OUT), "photo": str(photo),
        "strokes": STROKES,
    }  # fmt: skip
    command = ["node", WEB / "check.mjs", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert not done.returncode, done.stderr[-3000:]
    return json.loads(done.stdout)


def _print_digits(pair: str, path: Path) -> None:
    """Write dark digits on paper that is not quite white, and darker at one side."""
    shade = np.linspace(255, 215, 400)[None, :, None] * np.array([1, 0.98, 0.93])
    image = Image.fromarray(np.broadcast_to(shade, (200, 400, 3)).astype(np.uint8))
    font = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"
    brush = ImageDraw.Draw(image)
    for place, digit in zip((60, 250), pair, strict=True):
        brush.text((place, 30), digit, font=ImageFont.truetype(font, 120), fill=(30, 40, 90))
    image.save(path)


def _softmax(logits: Any) -> Any:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["original", "merged"])
def test_the_page_shows_what_onnx_runtime_computes(
    seen: Any, packages: Path, backend: str, name: str
) -> None:
    session = ort.InferenceSession(packages / name / "model.onnx")
    samples = seen["demo"][backend]["samples"]
    assert set(samples) == {path.stem for path in (WEB / "samples").iterdir()}
    for sample, found in samples.items():
        pixels = np.asarray(Image.open(WEB / "samples" / f"{sample}.png"), np.float32) / 255
        (logits,) = session.run(None, {"pixel_values": 2 * pixels[None, None] - 1})
        expected = _softmax(logits[0].astype(np.float64))
        assert np.abs(np.array(found[name]) - expected).max() < 1e-5  # measured 1.2e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_drawn_or_photographed_is_read(seen: Any, backend: str) -> None:
    """A one and a seven drawn with the mouse; 3 4 in print, dark on shaded paper."""
    for name in ("original", "merged"):
        assert np.argmax(seen["demo"][backend]["drawn"][name]) == 8
        assert np.argmax(seen["demo"][backend]["photo"][name]) == 7


def test_only_webgpu_uses_the_gpu(seen: Any, packages: Path) -> None:
    """One picture is two runs of some 195 nodes, of which reshapes need no dispatch."""
    used = {b: {s["dispatches"] for s in seen["demo"][b]["samples"].values()} for b in BACKENDS}
    assert used["wasm"] == {0}
    assert min(used["webgpu"]) > 300  # measured 323


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_page_tells_sizes_and_fits_a_phone(seen: Any, packages: Path, backend: str) -> None:
    found = seen["demo"][backend]
    assert found["isolated"]  # else wasm has one thread
    assert found["overflow"] <= 0
    sizes = [
        sum(
            file.bytes for file in Manifest.read(packages / name).files if "model.onnx" in file.path
        )
        for name in ("original", "merged")
    ]
    assert found["costs"].splitlines()[0].split("\t")[1:] == [
        *(f"{round(size / 1000):,} kB" for size in sizes),
        f"\u2212{100 * (1 - sizes[1] / sizes[0]):.1f} %",
    ]  # fmt: skip
    for width in ("desktop", "phone"):
        assert (OUT / f"{backend}-{width}.png").stat().st_size > 20_000
