"""A web server and Hub of files that are made while they are sent, a set speed per connection.

A file is 1 MiB of noise over and over, each time with its number in front: what two versions, files
or places have in common is no whole block, so that bytes in a wrong place change the sha256.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_BLOCK, _CHUNK = 2**20, 2**17


def content(seed: str, start: int, stop: int) -> bytes:
    """The bytes of the file with that seed from ``start`` to before ``stop``."""
    noise = random.Random(seed).randbytes(_BLOCK - 8)
    first, last = start // _BLOCK, -(-stop // _BLOCK)
    blocks = b"".join(number.to_bytes(8, "big") + noise for number in range(first, last))
    return blocks[start - first * _BLOCK : stop - first * _BLOCK]


def sha256(seed: str, num_bytes: int) -> str:
    """Of the whole file."""
    digest = hashlib.sha256()
    for start in range(0, num_bytes, 16 * _BLOCK):
        digest.update(content(seed, start, min(start + 16 * _BLOCK, num_bytes)))
    return digest.hexdigest()


class FileHost(http.server.ThreadingHTTPServer):
    """Serves ``files`` (name → bytes) at ``/<name>``, and as ``org/lm`` of a Hub.

    Attributes:
        bytes_per_s: on each connection; None: as fast as it goes.
        texts: files that are as they are.
        version: seeds the content and is its ETag; empty: no ETag.
        answer: called for each GET of a file; returns how it is answered (see ``Handler.send``).
        pause_at: bytes after which nothing is sent until ``go_on``.
        ranges: the requested ranges; ``num_sent`` counts bytes of files that were sent.
    """

    daemon_threads = True

    def __init__(self, files: dict[str, int], bytes_per_s: float | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.bytes_per_s = files, bytes_per_s
        self.texts: dict[str, bytes] = {}
        self.version = "one"
        self.heeds_if_range = True
        self.answer = lambda: ""
        self.pause_at: int | None = None
        self.go_on = threading.Event()
        self.ranges: list[tuple[int, int] | None] = []
        self.num_sent = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is not worth a line."""

    def tree(self) -> list[dict[str, object]]:
        """The files as the Hub lists them."""
        entries: list[dict[str, object]] = [
            {"type": "file", "path": name, "size": len(text), "oid": "0" * 40}
            for name, text in self.texts.items()
        ]
        for name, size in self.files.items():
            lfs = {"oid": sha256(f"{name}{self.version}", size), "size": size}
            entries.append({"type": "file", "path": name, "size": size, "oid": "0", "lfs": lfs})
        return entries


class Handler(http.server.BaseHTTPRequestHandler):
    server: FileHost
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        # What is sent has arrived, and does not wait in megabytes of a buffer here.
        self.request.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**17)
        super().setup()

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        if self.path.startswith("/api/models/"):
            self.plain(json.dumps(self.server.tree()).encode())
        elif name in self.server.texts:
            self.plain(self.server.texts[name])
        elif name in self.server.files:
            self.send(name, self.server.answer())
        else:
            self.send_error(404)

    def plain(self, data: bytes, content_type: str = "text/plain") -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Type", content_type)
        self.end_headers()
        self.wfile.write(data)

    def send(self, name: str, answer: str) -> None:
        """A file or a range of it, or as ``answer`` says.

        A number is a status; ``html`` a web page; ``whole`` the file, whatever is requested;
        ``short`` the first half of the range, and says so; ``cut`` the first half, and does not;
        ``shifted`` a later range, ``unsaid`` one without Content-Range; ``endless`` never ends.
        """
        server, size = self.server, self.server.files[name]
        if answer.isdigit():
            self.send_error(int(answer))
            return
        if answer == "html":
            self.plain(b"<html>Please log in", "text/html; charset=utf-8")
            return
        version = server.version
        wanted = (self.headers.get("Range") or "").removeprefix("bytes=")
        held = self.headers.get("If-Range", f'"{version}"') if server.heeds_if_range else ""
        if answer == "whole" or held not in ("", f'"{version}"'):
            wanted = ""
        start, stop = 0, size
        if wanted:
            first, _, last = wanted.partition("-")
            start, stop = int(first), min(int(last) + 1, size)
        with server.lock:
            server.ranges.append((start, stop) if wanted else None)
        if answer == "short":
            stop = (start + stop) // 2
        if answer == "shifted":
            start, stop = start + 1, min(stop + 1, size)
        self.send_response(206 if wanted else 200)
        if wanted and answer != "unsaid":
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        if version:
            self.send_header("ETag", f'"{version}"')
        if answer == "endless":
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        if answer == "cut":
            stop = (start + stop) // 2
        with suppress(OSError):
            self.body(f"{name}{version}", start, stop)
            while answer == "endless":
                self.wfile.write(bytes(_CHUNK))
        self.close_connection = answer in ("cut", "endless")

    def body(self, seed: str, start: int, stop: int) -> None:
        server, begun = self.server, time.monotonic()
        noise = content(seed, 0, _BLOCK)[8:]
        for position in range(start - start % _BLOCK, stop, _BLOCK):
            block = (position // _BLOCK).to_bytes(8, "big") + noise
            view = memoryview(block)[max(0, start - position) : stop - position]
            for offset in range(0, len(view), _CHUNK):
                if server.pause_at is not None and server.num_sent >= server.pause_at:
                    server.go_on.wait(600)
                chunk = view[offset : offset + _CHUNK]
                self.wfile.write(chunk)
                with server.lock:
                    server.num_sent += len(chunk)
                if server.bytes_per_s:
                    due = begun + (position + offset + len(chunk) - start) / server.bytes_per_s
                    time.sleep(max(0.0, due - time.monotonic()))


@contextmanager
def serving(files: dict[str, int], bytes_per_s: float | None = None) -> Iterator[FileHost]:
    """A running host."""
    host = FileHost(files, bytes_per_s)
    threading.Thread(target=host.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield host
    finally:
        host.go_on.set()
        host.shutdown()
        host.server_close()
