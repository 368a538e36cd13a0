"""A real head node as a child process: own temporary folder, free ports, token on."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import requests
import worker_server
from servers import free_ports

RAY = str(Path(sys.executable).with_name("ray"))
#: The same, with workers that worker_server.py forks.
_RAY_START = (
    *(sys.executable, "-c"),
    "import sys; sys.path.insert(0, sys.argv.pop(1)); import worker_server; "
    "worker_server.use_worker_server(start=False); from ray.scripts.scripts import main; main()",
    *(str(Path(__file__).parent), "start"),
)
_NOT_INHERITED = ("RAY_", "HF_TOKEN", "MLFLOW_", "OMP_")
#: A busy machine is no dead node: a raylet ends where its agents take longer to start, and counts
#: as dead where it answers later. One that is killed refuses connections, which counts at once.
AGENT_PATIENCE = {"RAY_agent_register_timeout_ms": "300000"}
_PATIENCE = AGENT_PATIENCE | {"RAY_health_check_timeout_ms": "60000"}


@dataclass
class Head:
    """Where the head node listens, and what one needs to talk to it."""

    address: str
    gcs: str
    token: str
    folder: Path
    settings: dict[str, str] = field(default_factory=dict)  # variables of all its nodes

    @property
    def environment(self) -> dict[str, str]:
        """A process environment with the token's file."""
        return clean_environment() | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.folder / "token"),
        }

    def get(self, path: str, token: str | None = None) -> requests.Response:
        """A plain HTTP call, with a token or without."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return requests.get(f"{self.address}{path}", headers=headers, timeout=30)

    def alive(self) -> set[str]:
        """The nodes that are up; asked again where the dashboard is too busy to answer."""
        for attempt in range(20):
            try:
                found = self.get("/api/v0/nodes", self.token).json()["data"]["result"]["result"]
                break
            except requests.RequestException:
                assert attempt < 19, (self.folder / "head.log").read_text()
                time.sleep(1)
        return {node["node_id"] for node in found if node["state"] == "ALIVE"}

    def jobs(self, name: str) -> list[dict]:
        """The submissions whose id starts so, oldest first."""
        found = [
            job
            for job in self.get("/api/jobs/", self.token).json()
            if (job["submission_id"] or "").startswith(name)
        ]
        return sorted(found, key=lambda job: job["start_time"] or 0)


def clean_environment() -> dict[str, str]:
    """This process's, without what would lead to another cluster or hold a secret."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(_NOT_INHERITED)}
    # As in an activated virtual environment: jobs say `python`.
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', '')}"
    return kept | {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1", "PATH": path}


@contextmanager
def running_head(num_cpus: int = 2, settings: dict[str, str] | None = None) -> Iterator[Head]:
    """Start a head node, wait until its job server answers, and end it."""
    worker_server.use_worker_server()
    folder = Path(tempfile.mkdtemp(prefix="kr"))  # short: socket paths have 107 characters
    token = secrets.token_hex(32)
    (folder / "token").write_text(token)
    (folder / "token").chmod(0o600)
    gcs, dashboard, client, agent = free_ports(4)
    head = Head(f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{gcs}", token, folder, settings or {})
    command = [
        *(*_RAY_START, "--head", "--block", "--node-ip-address", "127.0.0.1"),
        *("--port", str(gcs), "--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard)),
        *("--ray-client-server-port", str(client), "--dashboard-agent-listen-port", str(agent)),
        *("--temp-dir", str(folder / "ray"), "--num-cpus", str(num_cpus)),
        *("--object-store-memory", "150000000", "--disable-usage-stats"),
    ]
    with started_node(command, head, "head"):
        deadline = time.monotonic() + 180
        while True:
            try:
                if head.get("/api/jobs/", token).status_code == 200:
                    break
            except requests.RequestException:
                pass
            assert time.monotonic() < deadline, (folder / "head.log").read_text()
            time.sleep(0.5)
        yield head
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def joined_node(head: Head, name: str, num_cpus: int, num_gpus: int = 0) -> Iterator[psutil.Popen]:
    """Another node of the head's cluster, with the GPUs that it declares; up when this returns."""
    (agent,) = free_ports(1)
    command = [
        *(*_RAY_START, "--block", "--address", head.gcs, "--node-ip-address", "127.0.0.1"),
        *("--num-cpus", str(num_cpus), "--num-gpus", str(num_gpus), "--disable-usage-stats"),
        *("--object-store-memory", "150000000", "--dashboard-agent-listen-port", str(agent)),
    ]
    with started_node(command, head, name) as process:
        yield process


@contextmanager
def started_node(command: list[str], head: Head, name: str) -> Iterator[psutil.Popen]:
    """A node whose ``ray start`` has come to its end.

    It gives up after 30 seconds, which a busy machine may take, and ends what it started; then it
    is tried again.
    """
    log = head.folder / f"{name}.log"
    for _ in range(3):
        with node(command, head, log) as process:
            while process.poll() is None and "Ray runtime started" not in log.read_text():
                time.sleep(0.2)
            if process.poll() is None:
                yield process
                return
    raise AssertionError(f"{name} did not start:\n{log.read_text()}")


@contextmanager
def node(command: list[str], head: Head, log: Path) -> Iterator[psutil.Popen]:
    """A ``ray start --block`` child, ended with all that it started.

    By SIGKILL, since Ray takes half a minute over a SIGTERM.
    """
    with log.open("wb") as output:
        process = psutil.Popen(
            command,
            env=head.environment | _PATIENCE | head.settings,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=head.folder,
        )
    try:
        yield process
    finally:
        if process.poll() is not None:
            print(f"The node ended by itself, with {process.returncode}:\n{log.read_text()}")
        else:
            family = [process, *process.children(recursive=True)]
            for member in family:
                with suppress(psutil.NoSuchProcess):
                    member.kill()
            psutil.wait_procs(family, timeout=60)
