"""Native checkpoints behind a real HTTP server that is slow, truncates and fails as told."""

from __future__ import annotations

import http.server
import threading
import time
from pathlib import Path

from ke_ray.checkpoints.find.catalog import list_checkpoints
from ke_ray.checkpoints.formats.fingerprint import weights_sha256
from ke_ray.checkpoints.reference import CheckpointRef
from ke_ray.checkpoints.transfer import RetryPolicy

QUICK = RetryPolicy(attempts=4, backoff_s=0.02, max_retry_after_s=1.0, timeout_s=2.0)


class Site(http.server.ThreadingHTTPServer):
    """Serves a folder; ``faults[path]`` is a list of what goes wrong, one for each request."""

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root = root
        self.faults: dict[str, list[str]] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.pause_s = 0.0
        self.gate: threading.Barrier | None = None  # that many weights are sent at once
        self.stated: dict[str, str] = {}  # path -> the sha256 that it states, as the Hub does

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def count(self, method: str, ending: str) -> int:
        return sum(m == method and path.endswith(ending) for m, path, _ in self.requests)


class Handler(http.server.BaseHTTPRequestHandler):
    server: Site
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        wanted = self.headers.get("Range")
        self.server.requests.append((self.command, self.path, wanted))
        file = self.server.root / self.path.strip("/")
        faults = self.server.faults.get(self.path, [])
        fault = faults.pop(0) if faults and body else ""
        status, _, detail = fault.partition(":")
        if status.isdigit():
            self.send_response(int(status))
            if detail:
                self.send_header("Retry-After", detail)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if not file.is_file():
            self.send_error(404)
            return
        if self.server.gate is not None and body and file.suffix == ".safetensors":
            self.server.gate.wait(120)
        data = file.read_bytes()
        if self.path in self.server.stated and not body:
            self.send_response(302)  # to a store that knows nothing of hashes
            self.send_header("Location", "/store")
            self.send_header("X-Linked-ETag", f'"{self.server.stated[self.path]}"')
            self.send_header("X-Linked-Size", str(len(data)))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        etag = f'"{hash(data)}"'
        if wanted and self.headers.get("If-Range", etag) == etag and fault != "norange":
            first, last = (int(number) for number in wanted.removeprefix("bytes=").split("-"))
            last = min(last, len(data) - 1)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        else:
            first, last = 0, len(data) - 1
            self.send_response(200)
        rest = data[first : last + 1]
        self.send_header("Content-Length", str(len(rest)))
        self.send_header("ETag", etag)
        self.end_headers()
        if not body:
            return
        if fault == "cut":
            self.wfile.write(rest[: len(rest) // 2])
            self.close_connection = True
        elif fault == "stall":
            self.wfile.write(rest[: len(rest) // 2])
            self.wfile.flush()
            time.sleep(3)
            self.close_connection = True
        else:
            for offset in range(0, len(rest), 65536):
                self.wfile.write(rest[offset : offset + 65536])
                if self.server.pause_s:
                    time.sleep(self.server.pause_s)


def refs_of(site: Site, tmp_path: Path) -> list[CheckpointRef]:
    rows = [f"{step},{site.url}/step{step}-unsharded/" for step in range(3)]
    (tmp_path / "list.csv").write_text("\n".join(["Step,Checkpoint Directory", *rows]))
    return list_checkpoints(str(tmp_path / "list.csv"))


WEIGHTS = "/step0-unsharded/model.safetensors"


def truth(site: Site, step: int) -> str:
    return weights_sha256(site.root / f"step{step}-unsharded")
