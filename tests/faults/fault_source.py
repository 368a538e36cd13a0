"""An HTTP server of files of which some arrive slowly, cut off, or not at all at first."""

from __future__ import annotations

import http.server
import time
from pathlib import Path

__all__ = ["Source"]


class Source(http.server.ThreadingHTTPServer):
    """Serves the series; ``faults`` says what goes wrong with which file, and how often."""

    daemon_threads = True

    def __init__(self, root: Path, faults: dict[str, list[str]]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root, self.faults = root, faults


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Source

    def log_message(self, *_: object) -> None:
        """Nothing is logged."""

    def do_HEAD(self) -> None:
        """As for GET, without the body."""
        self.do_GET(body=False)

    def do_GET(self, body: bool = True) -> None:
        """A file, or what goes wrong with it."""
        path = self.server.root / self.path.strip("/")
        if not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        faults = self.server.faults.get(self.path.strip("/"), [])
        fault = faults.pop() if body and faults else None
        if fault == "refuse":
            self.send_error(503)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if not body:
            return
        if fault == "slow":
            for start in range(0, len(data), 1 + len(data) // 30):
                self.wfile.write(data[start : start + 1 + len(data) // 30])
                time.sleep(0.05)
        else:
            self.wfile.write(data[: len(data) // 2] if fault == "cut" else data)
