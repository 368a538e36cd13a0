"""Real servers on the loopback, as child processes that end with the test."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

_CLONE_NEWNET = 0x40000000


def free_ports(number: int) -> list[int]:
    """Ports that nothing listened on a moment ago."""
    sockets = [socket.socket() for _ in range(number)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def free_port() -> int:
    """One of them."""
    return free_ports(1)[0]


@contextmanager
def running_server(
    command: list[str], health: str, log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen]:
    """Start a server, wait until ``health`` answers, and end its process group afterwards."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
    deadline = time.monotonic() + 180
    try:
        while True:
            try:
                urllib.request.urlopen(health, timeout=2).close()
                break
            except OSError:
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, f"no answer from {health}:\n{log.read_text()}"
                time.sleep(0.3)
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@contextmanager
def running_mlflow(folder: Path, port: int | None = None) -> Iterator[str]:
    """``mlflow server`` over SQLite in ``folder``; yields its URI."""
    port = port or free_port()
    uri = f"http://127.0.0.1:{port}"
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"),
        *("--port", str(port), "--workers", "1"),
        *("--backend-store-uri", f"sqlite:///{folder}/server.db"),
        *("--artifacts-destination", str(folder / "artifacts")),
    ]
    # Its job runner would be one more process that imports MLflow, for GenAI's judges.
    environment = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    with running_server(command, f"{uri}/health", folder / "mlflow-server.log", environment):
        yield uri


class Gate:
    """A relay to a server on the loopback, at a port of its own.

    Closed, it refuses connections and cuts those under way, as a killed server does.

    Args:
        port: of the server.
        network: the network namespace whose loopback the server is on; None: this process's.
    """

    def __init__(self, port: int, network: Path | None = None) -> None:
        self._own = _bound(0)
        self.uri = f"http://127.0.0.1:{self._own.getsockname()[1]}"
        self._port, self._network = port, network
        self._sockets: list[socket.socket] = []

    def __enter__(self) -> Gate:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        self._own.close()

    def open(self) -> None:
        """Relay from now on."""
        self._own.listen()
        self._sockets = [self._own]
        threading.Thread(target=self._accept, args=(self._own,), daemon=True).start()

    def close(self) -> None:
        """Cut every connection, and refuse new ones."""
        while self._sockets:
            end = self._sockets.pop()
            with suppress(OSError):  # the other side was first
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        if self._own.fileno() < 0:
            # Bound and not listening it refuses connections, and keeps the port from others.
            self._own = _bound(int(self.uri.rsplit(":", 1)[1]))

    def _accept(self, listener: socket.socket) -> None:
        if self._network is not None:
            _enter_network(self._network)
        with suppress(OSError):  # closed
            while True:
                client = listener.accept()[0]
                try:
                    server = socket.create_connection(("127.0.0.1", self._port))
                except ConnectionRefusedError:  # as the server does
                    client.close()
                    continue
                self._sockets += [client, server]
                if listener.fileno() < 0:  # closed meanwhile
                    self.close()
                    return
                for ends in ((client, server), (server, client)):
                    threading.Thread(target=_relay, args=ends, daemon=True).start()


def _bound(port: int) -> socket.socket:
    own = socket.socket()
    own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    own.bind(("127.0.0.1", port))
    return own


def _enter_network(namespace: Path) -> None:
    """Make the sockets that this thread opens from now on those of another network namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    with namespace.open() as file:
        if libc.setns(file.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns {namespace}")


def _relay(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)


@contextmanager
def running_s3(folder: Path) -> Iterator[dict[str, str]]:
    """An S3 service with an empty bucket ``shared``; yields the variables that lead to it."""
    import s3fs

    url = f"http://127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", url.rsplit(":", 1)[1]]
    variables = {
        "AWS_ACCESS_KEY_ID": "tests",
        "AWS_SECRET_ACCESS_KEY": "tests",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": url,
    }
    with running_server(command, f"{url}/moto-api/", folder / "s3-server.log"):
        files = s3fs.S3FileSystem(key="tests", secret="tests", endpoint_url=url)
        files.mkdir("shared")
        s3fs.S3FileSystem.clear_instance_cache()  # it may lead to a service that was here before
        try:
            yield variables
        finally:
            s3fs.S3FileSystem.clear_instance_cache()
