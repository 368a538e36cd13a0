"""Published hosts, imitated on the loopback behind TLS and reached by their own names.

Nothing in a study or on a command line is changed for it. ``HTTPS_PROXY`` leads to a proxy that
ends the TLS of ``https://huggingface.co`` and others itself, with a certificate that
``SSL_CERT_FILE`` makes trusted, and passes the bytes on to the local server that stands in for the
host. Other hosts are refused, so that a test reaches nothing outside.
"""

from __future__ import annotations

import datetime
import http.server
import re
import select
import ssl
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from socket import create_connection

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


class Files(http.server.SimpleHTTPRequestHandler):
    """A folder's files whole or by one range, as object stores serve them; counts what it sends."""

    protocol_version = "HTTP/1.1"
    sent: dict[str, int]
    lock: threading.Lock

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        file = Path(self.translate_path(self.path))
        data = file.read_bytes() if file.is_file() else b""
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start, end = int(wanted[1]) if wanted else 0, len(data)
        if wanted and wanted[2]:
            end = min(end, int(wanted[2]) + 1)
        self.send_response(404 if not file.is_file() else 206 if wanted else 200)
        self.send_header("Content-Length", str(end - start))
        self.send_header("Accept-Ranges", "bytes")
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
        self.end_headers()
        if self.command == "GET":
            with self.lock:
                self.sent[self.path] = self.sent.get(self.path, 0) + end - start
            self.wfile.write(data[start:end])


@contextmanager
def serving_files(root: Path) -> Iterator[tuple[str, dict[str, int]]]:
    """A server of ``root``; yields its URL and the bytes sent so far of each path."""
    sent: dict[str, int] = {}
    handler = type("FilesOf", (Files,), {"sent": sent, "lock": threading.Lock()})
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(handler, directory=str(root))
    )
    with _running(server):
        yield f"http://127.0.0.1:{server.server_port}", sent


class _Proxy(http.server.BaseHTTPRequestHandler):
    """CONNECT alone: TLS ends here, and bytes pass on to the server that stands in for the host."""

    context: ssl.SSLContext
    ports: Mapping[str, int]

    def log_message(self, *args: object) -> None:
        pass

    def do_CONNECT(self) -> None:
        self.close_connection = True
        host = self.path.rpartition(":")[0]
        if host not in self.ports:
            self.send_error(502, f"no server stands in for {host}")
            return
        self.send_response(200)
        self.end_headers()
        with (
            self.context.wrap_socket(self.connection, server_side=True) as client,
            create_connection(("127.0.0.1", self.ports[host])) as server,
        ):
            while True:  # on one thread: a TLS connection is not for two
                ready = [client] if client.pending() else select.select([client, server], [], [])[0]
                for source in ready:
                    if not (data := source.recv(65536)):
                        return
                    (server if source is client else client).sendall(data)


@contextmanager
def https_hosts(servers: Mapping[str, str], folder: Path) -> Iterator[dict[str, str]]:
    """Let local servers stand in for hosts.

    Args:
        servers: host name → URL of a server on the loopback.
        folder: for the certificate.

    Yields:
        The variables of a process that is to reach them.
    """
    certificate = _certificate(list(servers), folder / "hosts.pem")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    ports = {host: int(url.rsplit(":", 1)[1]) for host, url in servers.items()}
    handler = type("ProxyOf", (_Proxy,), {"context": context, "ports": ports})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    proxy = f"http://127.0.0.1:{server.server_port}"
    with _running(server):
        yield {"HTTPS_PROXY": proxy, "https_proxy": proxy, "SSL_CERT_FILE": str(certificate)}


@contextmanager
def _running(server: http.server.ThreadingHTTPServer) -> Iterator[None]:
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()


def _certificate(hosts: list[str], path: Path) -> Path:
    """A key and a certificate of it for ``hosts``, which is its own authority, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "stand-in of a test")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(map(x509.DNSName, hosts)), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    path.write_bytes(private + certificate.public_bytes(serialization.Encoding.PEM))
    return path
