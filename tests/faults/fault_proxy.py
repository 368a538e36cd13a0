"""A relay to an HTTP server that answers some requests wrongly, as its rules say.

    python fault_proxy.py PORT SERVER_PORT FOLDER

Rules are a JSON list in ``FOLDER/faults.json``, read at each request; none: everything passes::

    [{"fault": "503", "requests": ["GET"], "share": 0.5, "stall_s": 20}]

``fault`` is a status, or ``reset`` (the connection is cut), ``half`` (an answer that ends in its
middle) or ``stall`` (no answer for ``stall_s``, then a reset). ``requests`` are methods, or LIST
for the GET that lists a bucket; none given: all. ``FOLDER/hits`` grows by a byte for each fault.

Needs nothing but Python, so that it starts at once on a host that has only that.
"""

from __future__ import annotations

import http.client
import http.server
import json
import random
import socket
import struct
import sys
import threading
import time
from pathlib import Path
from typing import Any

_OWN_HEADERS = ("connection", "keep-alive", "transfer-encoding", "content-length", "date", "server")
#: What S3 says with a status, for clients that read the code and not the status.
_CODES = {
    403: "AccessDenied",
    404: "NoSuchKey",
    500: "InternalError",
    503: "SlowDown",
}


class FaultProxy(http.server.ThreadingHTTPServer):
    """Relays to a port of the loopback.

    Args:
        address: host and port to listen on.
        server_port: of the server behind it.
        folder: of ``faults.json`` and ``hits``.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], server_port: int, folder: Path) -> None:
        super().__init__(address, _Handler)
        self.server_port_behind, self.folder = server_port, folder
        self.random = random.Random(0)
        self.lock = threading.Lock()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that has gone is no news."""

    def fault(self, kind: str) -> dict[str, Any] | None:
        """The rule that strikes a request of a kind, counted; None: it passes."""
        try:
            rules = json.loads((self.folder / "faults.json").read_text())
        except (FileNotFoundError, ValueError):  # there is none, or it is being written
            return None
        with self.lock:
            for rule in rules:
                if kind in rule.get("requests", [kind]) and self.random.random() < rule["share"]:
                    with (self.folder / "hits").open("ab") as hits:
                        hits.write(b"x")
                    return dict(rule)
        return None


class _Handler(http.server.BaseHTTPRequestHandler):
    server: FaultProxy
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Nothing is logged."""

    def _relay(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        is_list = self.command == "GET" and "list-type=" in self.path
        rule = self.server.fault("LIST" if is_list else self.command)
        fault = rule["fault"] if rule else ""
        if fault == "stall":
            time.sleep(rule["stall_s"])  # type: ignore[index]
        if fault in ("reset", "stall"):
            self._reset()
        elif fault.isdigit():
            text = f"<Error><Code>{_CODES[int(fault)]}</Code><Message>fault</Message></Error>"
            self._answer(int(fault), [("Content-Type", "application/xml")], text.encode())
        else:
            self._pass_on(body, half=fault == "half")

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = do_PATCH = _relay  # noqa: N815

    def _pass_on(self, body: bytes, half: bool) -> None:
        behind = http.client.HTTPConnection("127.0.0.1", self.server.server_port_behind)
        headers = {k: v for k, v in self.headers.items() if k.lower() not in ("connection",)}
        try:
            behind.request(self.command, self.path, body or None, headers)
            answer = behind.getresponse()
            data = answer.read()
        except (OSError, http.client.HTTPException):
            self._reset()
            return
        finally:
            behind.close()
        kept = [(k, v) for k, v in answer.getheaders() if k.lower() not in _OWN_HEADERS]
        length = answer.getheader("Content-Length") if self.command == "HEAD" else None
        self._answer(answer.status, kept, data, length, half)

    def _answer(
        self,
        status: int,
        headers: list[tuple[str, str]],
        data: bytes,
        length: str | None = None,
        half: bool = False,
    ) -> None:
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", length or str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if half else data)
        if half:
            self.wfile.flush()
            self._reset()

    def _reset(self) -> None:
        self.close_connection = True
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.wfile = self.rfile = _Closed()  # type: ignore[assignment]
        self.connection.close()


class _Closed:
    """In place of a cut connection's files, which the server flushes and closes."""

    closed = True

    def flush(self) -> None:
        """Nothing is left to send."""

    def close(self) -> None:
        """It is closed."""


if __name__ == "__main__":
    port, behind, place = sys.argv[1:]
    FaultProxy(("0.0.0.0", int(port)), int(behind), Path(place)).serve_forever()
