"""What ``push`` sends: the package's files and no others, to a stand-in of the hub's interface."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from graphs import normal
from huggingface_hub import constants
from packages import linear_package

from ffmerge.models.manifest import FileRecord, Manifest, Variant

COMMIT = "a" * 40


class Hub(BaseHTTPRequestHandler):
    """The calls of one upload: create, preupload, commit; what was sent is kept by path."""

    sent: dict[str, bytes]
    calls: list[tuple[str, str | None]]
    summary: str

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.calls.append((self.path, self.headers["Authorization"]))
        name = "org/name"
        url = f"http://{self.headers['Host']}/{name}"
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            if asked["name"] != "name":
                return self._answer(403, {"error": "not yours"})
            return self._answer(200, {"url": url, "name": name, "id": name})
        if self.path.endswith("/preupload/main"):
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self._answer(200, {"files": files})
        for line in body.splitlines():
            each = json.loads(line)
            if each["key"] == "header":
                Hub.summary = each["value"]["summary"]
            if each["key"] == "file":
                value = each["value"]
                self.sent[value["path"]] = base64.b64decode(value["content"])
        return self._answer(200, {"commitUrl": f"{url}/commit/{COMMIT}", "commitOid": COMMIT})

    def do_GET(self) -> None:
        if not self.path.startswith("/api/models/org/name"):
            return self._answer(404, {"error": "no such model"})
        return self._answer(200, {"id": "org/name", "sha": COMMIT, "siblings": []})

    def _answer(self, status: int, value: dict[str, Any]) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    Hub.sent, Hub.calls = {}, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    client = huggingface_hub.HfApi
    monkeypatch.setattr("huggingface_hub.HfApi", lambda **how: client(endpoint=address, **how))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield Hub
    server.shutdown()


@pytest.fixture
def package(tmp_path: Path) -> Path:
    folder = tmp_path / "package"
    linear_package(folder, normal(4, 3), np.zeros(3, np.float32))
    return folder


def test_the_files_of_the_package_are_sent_and_no_others(
    hub: type[Hub], package: Path, run: Any
) -> None:
    (package / "notes.txt").write_text("not of the package")
    code, found, err = run("push", package, "org/name", "--token", "hf_x", "--json")
    assert code == 0, err
    assert "notes.txt" not in hub.sent and "ffmerge.json" in hub.sent
    assert set(hub.sent) == set(found["files"])
    for name, content in hub.sent.items():
        assert content == (package / name).read_bytes()
    assert {authorization for _, authorization in hub.calls} == {"Bearer hf_x"}


def test_a_name_is_no_pattern(hub: type[Hub], package: Path, run: Any) -> None:
    (package / "odd[1].txt").write_text("of the package")
    (package / "odd1.txt").write_text("not of the package")
    content = (package / "odd[1].txt").read_bytes()
    record = FileRecord("odd[1].txt", len(content), hashlib.sha256(content).hexdigest())
    manifest = Manifest.read(package)
    replace(manifest, files=(*manifest.files, record)).write(package)
    code, _, err = run("push", package, "org/name", "--token", "hf_x", "--json")
    assert code == 0, err
    assert "odd[1].txt" in hub.sent and "odd1.txt" not in hub.sent


def test_the_commit_names_what_the_package_is_for(hub: type[Hub], package: Path, run: Any) -> None:
    manifest = Manifest.read(package)
    path = manifest.graphs[0].path
    other = Variant("portable", path, True, path)
    replace(manifest, profile="cpu", variants=(other,)).write(package)
    code, _, err = run("push", package, "org/name", "--token", "hf_x", "--json")
    assert code == 0, err
    assert hub.summary == f"{manifest.model_type} in fp32 for cpu, portable, by ffmerge"


def test_a_package_that_is_not_whole_stays_here(hub: type[Hub], package: Path, run: Any) -> None:
    graph = next(package.glob("*.onnx"))
    graph.write_bytes(graph.read_bytes() + b"x")
    code, _, err = run("push", package, "org/name", "--token", "hf_x")
    assert code in (1, 2) and graph.name in err and not hub.calls


def test_what_the_hub_refuses_is_one_sentence(hub: type[Hub], package: Path, run: Any) -> None:
    code, _, err = run("push", package, "org/other", "--token", "hf_x")
    assert code == 2 and err.startswith("ffmerge: org/other cannot be written on the hub")
    assert not hub.sent
