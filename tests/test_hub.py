"""Of a model of the hub only what is needed is fetched: a hub of this test's own says what."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

COMMIT = "0" * 39 + "1"
_INDEX = {"metadata": {}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
_FILES = {
    "config.json": b"{}",
    "tokenizer.json": b"{}",
    "1_Pooling/config.json": b"{}",
    "model.safetensors.index.json": json.dumps(_INDEX).encode(),
    "model-1.safetensors": b"1",
    "model-2.safetensors": b"2",
    "consolidated.safetensors": b"3",
    "pytorch_model.bin": b"4",
    "onnx/model.onnx": b"5",
    "modeling_x.py": b"6",
    ".gitattributes": b"",
    "text [1]/config.json": b"{}",
    "text [1]/model.safetensors": b"7",
    "text [1]/model.fp16.safetensors": b"8",
    "packed/x.gguf": b"9",
}


def _tree() -> list[dict[str, Any]]:
    entries = []
    for name, content in _FILES.items():
        entries.append({"type": "file", "path": name, "size": len(content), "oid": COMMIT})
    return entries


class _Hub(BaseHTTPRequestHandler):
    asked: list[tuple[str, str]]  # file or commit, token

    def _send(self, body: bytes, **headers: str) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        token = self.headers.get("Authorization", "")
        if path.startswith("/api/models/me/model"):
            revision = path.rpartition("/revision/")[2] or "main"
            if "/tree/" in path:
                self._send(json.dumps(_tree()).encode(), Content_Type="application/json")
                return
            self.asked.append((revision, token))
            if revision not in ("main", "v1", COMMIT, "/api/models/me/model"):
                self.send_error(404)
                return
            files = []
            for name, content in _FILES.items():
                files.append({"rfilename": name, "size": len(content)})
            about = {"id": "me/model", "sha": COMMIT, "siblings": files}
            self._send(json.dumps(about).encode(), Content_Type="application/json")
            return
        name = path.partition(f"/resolve/{COMMIT}/")[2]
        if name not in _FILES:
            self.send_error(404)
            return
        if self.command == "GET":
            self.asked.append((name, token))
        tag = hashlib.sha1(name.encode()).hexdigest()
        self._send(_FILES[name], ETag=f'"{tag}"', X_Repo_Commit=COMMIT)

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def hub() -> Iterator[str]:
    """Yield the address of a hub."""
    _Hub.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


_FETCH = """
import sys
from ffmerge.config import LoadConfig
from ffmerge.errors import InputError
from ffmerge.models.hub import fetch
for options in OPTIONS:
    weights = options.pop("weights", True)
    try:
        folder = fetch("me/model", LoadConfig(**options), weights)
        print(sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()))
    except InputError as error:
        print(error)
    sys.stdout.flush()
"""


def _fetched(address: str, cache: Path, *options: dict[str, Any]) -> list[str]:
    """Return a line for each call of fetch, all in one fresh process."""
    env = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0"}
    env.pop("HF_TOKEN", None)
    code = _FETCH.replace("OPTIONS", repr(list(options)))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


def test_only_what_is_needed_is_fetched(hub: str, tmp_path: Path) -> None:
    structure, whole, part, packed, no_revision, no_folder, code = _fetched(
        hub,
        tmp_path,
        {"weights": False, "revision": "v1", "token": "hf_secret"},
        {},
        {"subfolder": "text [1]"},
        {"subfolder": "packed"},
        {"revision": "v9"},
        {"subfolder": "nowhere"},
        {"trust_remote_code": True, "weights": False},
    )
    small = [
        "1_Pooling/config.json", "config.json", "model.safetensors.index.json",
        "text [1]/config.json", "tokenizer.json",
    ]  # fmt: skip
    assert structure == repr(small)
    shards = ["model-1.safetensors", "model-2.safetensors"]
    assert whole == repr(sorted([*small, *shards]))
    assert part == repr(["config.json", "model.safetensors"])
    assert packed == repr(["x.gguf"])
    assert no_revision.startswith("me/model is not a local folder, and fetching it")
    assert "nowhere" in no_folder
    assert "modeling_x.py" in code
    assert ("v1", "Bearer hf_secret") in _Hub.asked
    never = {
        "consolidated.safetensors", "pytorch_model.bin", "onnx/model.onnx", ".gitattributes",
        "text [1]/model.fp16.safetensors",
    }  # fmt: skip
    assert not never & {name for name, _ in _Hub.asked}
    (cached,) = _fetched("http://127.0.0.1:1", tmp_path, {})  # nothing answers there
    assert cached.startswith("["), cached
    assert set(eval(cached)) >= set(eval(whole))
