"""Servers of ``ke-ray dashboard``: the interactive page and MLflow's UI, on loopback.

Both are child processes: Streamlit on ``dashboards/explore.py``, and ``mlflow server`` on the
tracking database. They end with this process.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ke_ray import storage
from ke_ray.errors import KeRayError, UserError
from ke_ray.shipped import shipped_folder

_START_S = 120.0


@dataclass
class Dashboard:
    """Addresses and processes of the running pages; a context manager that ends them.

    ``mlflow_url`` is None where there is no tracking store to show.
    """

    url: str
    mlflow_url: str | None
    processes: list[subprocess.Popen[bytes]]

    def __enter__(self) -> Dashboard:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def wait(self) -> None:
        """Wait until a page exits by itself or Ctrl-C.

        Raises:
            KeRayError: a page ended with an error.
        """
        while True:
            for process in self.processes:
                code = process.poll()
                if code is not None:
                    raise KeRayError(f"A page exited by itself with exit code {code}.")
            time.sleep(0.5)

    def stop(self) -> None:
        """End the pages and their child processes."""
        for process in self.processes:
            _signal_group(process, signal.SIGTERM)
        for process in self.processes:
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                _signal_group(process, signal.SIGKILL)
                process.wait()


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    if process.poll() is None:
        # Each child leads its own session, so that MLflow's workers end with it.
        os.killpg(process.pid, number)


def start_dashboard(
    results: Sequence[str | os.PathLike[str]] = ("runs",),
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    mlflow_uri: str | None = None,
    mlflow_port: int | None = None,
    log: str | os.PathLike[str] | None = None,
    say: Callable[[str], None] = print,
) -> Dashboard:
    """Start the page and, where there is a tracking store, MLflow's UI; wait until both answer.

    Args:
        results: result folders or their parents; they need not exist yet.
        host: interface to listen on; any but loopback is open to others without a password.
        port, mlflow_port: None takes 8501 and 5000, or a free one where those are taken.
        mlflow_uri: ``http(s)://…`` of a running server is linked to; a database URI gets a server
            of its own; None looks for ``mlflow.db`` in the results, else ``MLFLOW_TRACKING_URI``.
        log: file for the output of the servers; default: none.
        say: called with each line for the user, including the addresses.

    Returns:
        The running pages; use ``with`` or call ``stop()``.

    Raises:
        UserError: a port is taken.
        KeRayError: a page does not start.
    """
    page = shipped_folder("dashboards") / "explore.py"
    paths = [os.fspath(path) for path in results]
    missing = [path for path in paths if storage.is_local(path) and not storage.exists(path)]
    for path in missing:
        say(f"'{path}' does not exist yet; the page shows it as soon as it does.")
    with open(log or os.devnull, "ab") as sink:
        processes: list[subprocess.Popen[bytes]] = []
        running = Dashboard("", None, processes)
        try:
            running.mlflow_url = _start_mlflow(
                mlflow_uri or _find_store(paths), host, mlflow_port, sink, processes
            )
            page_port = _port(host, port, 8501)
            running.url = f"http://{host}:{page_port}"
            options = ["--mlflow", running.mlflow_url] if running.mlflow_url else []
            command = ["streamlit", "run", str(page), *_streamlit_options(host, page_port)]
            processes.append(_spawn([*command, "--", *options, *paths], sink))
            if running.mlflow_url and len(processes) > 1:
                _await(f"{running.mlflow_url}/health", processes[0], "MLflow's UI", log)
            _await(f"{running.url}/_stcore/health", processes[-1], "the page", log)
        except BaseException:
            running.stop()
            raise
    if host not in ("127.0.0.1", "localhost", "::1"):
        say(f"Anybody who reaches {host} can read the results: there is no password.")
    say(f"results  {running.url}")
    say(f"MLflow   {running.mlflow_url or 'no tracking store found (--mlflow-uri names one)'}")
    return running


def _streamlit_options(host: str, port: int) -> list[str]:
    options = {
        "server.address": host,
        "server.port": str(port),
        "server.headless": "true",
        "server.fileWatcherType": "none",
        "browser.gatherUsageStats": "false",
        "client.toolbarMode": "viewer",
        "theme.light.primaryColor": "#0072B2",
        "theme.dark.primaryColor": "#56B4E9",
    }
    return [f"--{name}={value}" for name, value in options.items()]


def _find_store(paths: Sequence[str]) -> str | None:
    """``mlflow.db`` in or beside a result folder, else ``MLFLOW_TRACKING_URI`` or the default."""
    for path in paths:
        if storage.is_local(path):
            for folder in (storage.local_path(path), storage.local_path(path).parent):
                if (folder / "mlflow.db").is_file():
                    return f"sqlite:///{(folder / 'mlflow.db').absolute()}"
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        return uri
    local = Path("mlflow.db").absolute()
    return f"sqlite:///{local}" if local.is_file() else None


def _start_mlflow(
    uri: str | None,
    host: str,
    port: int | None,
    sink: object,
    processes: list[subprocess.Popen[bytes]],
) -> str | None:
    if not uri:
        return None
    if uri.startswith(("http://", "https://")):
        return _without_login(uri.rstrip("/"))
    server_port = _port(host, port, 5000)
    command = ["mlflow", "server", "--host", host, "--port", str(server_port), "--workers", "1"]
    # In the environment: a database URI may hold a password, and `ps` shows command lines.
    # Without its job runner for GenAI judges: two processes fewer, and seconds faster.
    variables = {"MLFLOW_BACKEND_STORE_URI": uri, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    processes.append(_spawn(command, sink, **variables))
    return f"http://{host}:{server_port}"


def _without_login(url: str) -> str:
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _spawn(module: Sequence[str], sink: object, **variables: str) -> subprocess.Popen[bytes]:
    environment = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true", **os.environ}
    environment |= variables
    return subprocess.Popen(
        [sys.executable, "-m", *module],
        stdin=subprocess.DEVNULL,
        stdout=sink,  # type: ignore[call-overload]
        stderr=sink,
        env=environment,
        start_new_session=True,
    )


def _port(host: str, requested: int | None, default: int) -> int:
    """The requested port, or else the default one, or else a free one."""
    for port in (requested,) if requested is not None else (default, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise UserError(f"Port {requested} of {host} cannot be used: is it taken? Choose another.")


def _await(address: str, process: subprocess.Popen[bytes], what: str, log: object) -> None:
    deadline = time.monotonic() + _START_S
    hint = f" See '{log}'." if log else " Give --log FILE to see why."
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise KeRayError(f"{what} exited at once with exit code {process.returncode}.{hint}")
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    raise KeRayError(f"{what} did not answer at {address} within {_START_S:.0f} s.{hint}")
