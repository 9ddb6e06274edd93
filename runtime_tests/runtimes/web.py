"""ONNX Runtime Web, wasm and WebGPU, in a headless Chromium.

A :class:`Browser` starts an HTTP server and a Chromium that opens ``web.html`` from it. The page
asks for the next job (``GET job``), does it (open a model, run it, release it) and posts its answer
(``POST answer``): jobs and answers are safetensors with JSON beside the tensors. Needs Chromium and
the folder of npm packages that holds onnxruntime-web (``FFMERGE_NODE_MODULES``, else
``node_modules`` here).
"""

import atexit
import json
import os
import queue
import secrets
import shutil
import subprocess
import tempfile
import threading
import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import onnx_ir as ir
from safetensors.numpy import load, save

from ffmerge.errors import NotInstalled, RuntimeCheckError
from ffmerge.models.probe import Array
from ffmerge.passes.graph.read import read_model
from ffmerge.passes.graph.tensors import stored
from ffmerge.runtime_tests.memory import Resident
from ffmerge.runtime_tests.runtimes.base import Runtime, Session

ENGINE = "ONNX Runtime Web"
BUNDLES = {"wasm": "ort.wasm.min.mjs", "webgpu": "ort.webgpu.min.mjs"}
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "chrome")
ANSWER_S, POLL_S = 600, 20.0
_ARGUMENTS = (
    "--headless", "--enable-unsafe-webgpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-default-apps", "--disable-extensions", "--no-proxy-server",
)  # fmt: skip
_DATA = "application/octet-stream"
_TYPES = {".html": "text/html", ".mjs": "text/javascript", ".wasm": "application/wasm"}

Message = tuple[dict[str, str], dict[str, Array]]


class Browser:
    """A page in a Chromium of its own that runs models on one backend."""

    def __init__(self, backend: str, threads: int) -> None:
        chromium, dist = _installed()
        self.jobs, self.answers = queue.Queue[bytes](), queue.Queue[bytes]()
        self.files: dict[str, Path | bytes] = {
            "": Path(__file__).with_name("web.html"),
            **{f"ort/{path.name}": path for path in dist.iterdir() if path.suffix in _TYPES},
        }
        self.held, self.numbers = 0, count()
        self.token = secrets.token_urlsafe()  # other programs of this machine do not know it
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, self))
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.profile = tempfile.TemporaryDirectory(prefix="ffmerge-", ignore_cleanup_errors=True)
        page = f"http://localhost:{self.server.server_port}/{self.token}/"
        url = f"{page}#{backend},{BUNDLES[backend]},{threads}"
        arguments = [*_ARGUMENTS, f"--user-data-dir={self.profile.name}"]
        if getattr(os, "geteuid", lambda: 1)() == 0:  # root has no sandbox
            arguments.append("--no-sandbox")
        self.process = subprocess.Popen(
            [chromium, *arguments, url],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        atexit.register(self.close)

    def ask(self, told: Mapping[str, str], tensors: Mapping[str, Array] | None = None) -> Message:
        """Return what the page answers.

        Raises:
            RuntimeCheckError: it fails, ends, or does not answer.
        """
        whole = {name: np.asarray(x, order="C") for name, x in (tensors or {}).items()}
        self.jobs.put(save(whole, dict(told)))
        answer = self._wait(told["work"])
        size = int.from_bytes(answer[:8], "little")
        found: dict[str, str] = json.loads(answer[8 : 8 + size])["__metadata__"]
        if "error" in found:
            doing = {"open": "load"}.get(told["work"], told["work"])
            raise RuntimeCheckError(f"{ENGINE} does not {doing} the model: {found['error']}")
        self.held = int(found["heap"]) + int(found["gpu"])
        return found, load(answer)

    def _wait(self, work: str) -> bytes:
        for _ in range(ANSWER_S):
            try:
                return self.answers.get(timeout=1)
            except queue.Empty:
                if self.process.poll() is not None:
                    ended = f"Chromium ended with {self.process.returncode} at {work}."
                    raise RuntimeCheckError(ended) from None
        raise RuntimeCheckError(f"the page did not {work} within {ANSWER_S} s.")

    def close(self) -> None:
        """End the browser and the server."""
        self.process.terminate()
        self.process.wait()
        self.server.shutdown()
        self.profile.cleanup()


class _Handler(BaseHTTPRequestHandler):
    """Gives the page its files and jobs, and takes its answers."""

    def __init__(self, browser: Browser, *args: Any) -> None:
        self.browser = browser
        super().__init__(*args)

    def do_GET(self) -> None:
        """Send a file, or the next job."""
        _, token, path = (*unquote(self.path).split("/", 2), "", "")[:3]
        if token != self.browser.token:
            return self.send_error(404)
        if path == "job":
            try:
                return self._send(self.browser.jobs.get(timeout=POLL_S))
            except queue.Empty:
                self.send_response(204)
                return self.end_headers()
        found = self.browser.files.get(path)
        if found is None:
            return self.send_error(404)
        if isinstance(found, bytes):
            return self._send(found)
        self._head(found.stat().st_size, _TYPES.get(found.suffix, _DATA))
        with found.open("rb") as file:
            return shutil.copyfileobj(file, self.wfile)

    def do_POST(self) -> None:
        """Take an answer."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path != f"/{self.browser.token}/answer":
            return self.send_error(404)
        self.browser.answers.put(body)
        return self._send(b"")

    def _send(self, content: bytes) -> None:
        self._head(len(content), _DATA)
        self.wfile.write(content)

    def _head(self, size: int, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(size))
        self.send_header("Content-Type", kind)
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")  # wasm threads need both
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.end_headers()

    def log_message(self, *args: object) -> None:
        """Say nothing."""


_browsers: dict[tuple[str, int], Browser] = {}


def _start(backend: str, model: Path | bytes, level: str, threads: int) -> Session:
    browser, number, found = _opened(backend, model, threads)

    def compute(names: Sequence[str], feeds: Mapping[str, Array]) -> list[Array]:
        _, outputs = _run(browser, number, names, feeds)
        if missing := set(names) - set(outputs):
            raise RuntimeCheckError(f"{ENGINE} gives no output {', '.join(sorted(missing))}.")
        return [outputs[name] for name in names]

    session = Session(ENGINE, found["used"], found["device"], compute)
    weakref.finalize(session, _release, browser, number).atexit = False
    return session


def _opened(
    backend: str, model: Path | bytes, threads: int
) -> tuple[Browser, str, Mapping[str, str]]:
    """Return the page that has loaded a model, its number there, and what the page tells of it."""
    if (backend, threads) not in _browsers:
        _browsers[backend, threads] = Browser(backend, threads)
    browser = _browsers[backend, threads]
    number, data = str(next(browser.numbers)), list[str]()
    browser.files[f"{number}/"] = model
    if isinstance(model, Path):
        tensors = (item.tensor for item in stored(read_model(model)))
        data = sorted({str(t.location) for t in tensors if isinstance(t, ir.ExternalTensor)})
        browser.files |= {f"{number}/{path}": model.parent / path for path in data}
    found, _ = browser.ask({"work": "open", "session": number, "data": json.dumps(data)})
    return browser, number, found


def _run(
    browser: Browser, number: str, names: Sequence[str], feeds: Mapping[str, Array]
) -> Message:
    told = {"work": "run", "session": number, "names": json.dumps(list(names))}
    return browser.ask(told, feeds)


def _release(browser: Browser, number: str) -> None:
    """Let the page forget a model, once nothing here holds its session."""
    if browser.process.poll() is None:
        browser.ask({"work": "release", "session": number})


def _dispatched(model: Path, names: Sequence[str], feeds: Mapping[str, Array]) -> None:
    """Return None: node by node it is not told; but a run that leaves the GPU idle is refused."""
    threads = next((threads for used, threads in _browsers if used == "webgpu"), 0)
    browser, number, _ = _opened("webgpu", model, threads)
    try:
        found, _ = _run(browser, number, names, feeds)
    finally:
        _release(browser, number)
    if found["dispatches"] == "0":
        raise RuntimeCheckError("WebGPU was asked for and not used: a run dispatched nothing.")


def _held(backend: str) -> Resident | None:
    """Return the bytes of the wasm heap and of the buffers on the GPU, which no file backs."""
    held = [b.held for (used, _), b in _browsers.items() if used == backend]
    if not held:
        return None
    return sum(held), sum(held)


def _installed() -> tuple[str, Path]:
    """Return Chromium and the files of ONNX Runtime Web.

    Raises:
        NotInstalled: one of them is not there.
    """
    programs: Sequence[str] = CHROMIUM
    if named := os.environ.get("FFMERGE_CHROMIUM"):
        programs = [named]
    chromium = next(filter(None, map(shutil.which, programs)), None)
    if not chromium:
        raise NotInstalled(
            "Chromium is not installed: install it (Debian: apt-get install chromium), or set "
            "FFMERGE_CHROMIUM to its program."
        )
    dist = Path(os.environ.get("FFMERGE_NODE_MODULES", "node_modules")) / "onnxruntime-web/dist"
    if not dist.is_dir():
        raise NotInstalled(
            f"{dist} does not exist: `npm install onnxruntime-web`, and set FFMERGE_NODE_MODULES "
            "to the node_modules folder that holds it."
        )
    return chromium, dist


RUNTIMES = (
    Runtime("wasm", "wasm", partial(_start, "wasm"), resident=partial(_held, "wasm")),
    Runtime(
        "web-webgpu", "webgpu", partial(_start, "webgpu"), arithmetic="native",
        profile=_dispatched, resident=partial(_held, "webgpu"),
    ),
)  # fmt: skip
