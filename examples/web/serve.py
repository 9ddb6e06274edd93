"""Serve the page and the packages beside it, with the headers that wasm threads need.

``python examples/web/serve.py --packages build/demo``, then open the address it prints.
"""

import argparse
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

HERE = Path(__file__).parent


class Isolated(SimpleHTTPRequestHandler):
    """Files below this folder; what is asked for below /packages/ comes from another one."""

    def __init__(self, *args, packages: Path, quiet: bool = False, **kwargs) -> None:
        self.packages, self.quiet = packages, quiet
        super().__init__(*args, directory=str(HERE), **kwargs)

    def translate_path(self, path: str) -> str:
        """Return the file that a path of the page names."""
        if path.startswith("/packages/"):
            here, self.directory = self.directory, str(self.packages)
            try:
                return super().translate_path(path.removeprefix("/packages"))
            finally:
                self.directory = here
        return super().translate_path(path)

    def end_headers(self) -> None:
        """Isolate the page from others: only then a browser lets wasm threads share memory."""
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()

    def log_message(self, *args: object) -> None:
        """Log as http.server does, unless quiet."""
        if not self.quiet:
            super().log_message(*args)


def server(packages: Path, port: int = 0, quiet: bool = False) -> ThreadingHTTPServer:
    """Return a server on this machine only; with port 0 the system picks one."""
    handler = partial(Isolated, packages=packages.resolve(), quiet=quiet)
    return ThreadingHTTPServer(("127.0.0.1", port), handler)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--packages", type=Path, default=Path("build/demo"), metavar="FOLDER")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    print(f"http://localhost:{options.port}/")
    server(options.packages, options.port).serve_forever()
