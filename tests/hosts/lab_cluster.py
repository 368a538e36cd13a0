"""A Ray cluster on a laboratory's hosts, with S3 and MLflow on hosts of their own."""

from __future__ import annotations

import secrets
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import fault_proxy
from lab import Host, Lab
from ray_head import AGENT_PATIENCE, Head
from servers import Gate

BUCKET = "shared"
#: Folder of the rules of the relay to a host's server (``fault_proxy.py``).
FAULTS = "/tmp"
_BEHIND = 5001
_TOKEN = Path.home() / ".ray" / "auth_token"
_START_TIMEOUT_S = 180.0


@dataclass
class LabCluster:
    """Hosts, what runs on them, and the ways to it from this machine's loopback.

    Attributes:
        head: Ray's, as a user sees it through a forwarded port.
        mlflow_uri: of MLflow's server, as the hosts see it.
        mlflow_here: the same server, through a relay on the loopback.
        s3: the variables with which the hosts reach S3.
        s3_here: the same for this process, through a relay on the loopback.
    """

    lab: Lab
    head: Head
    mlflow_uri: str = ""
    mlflow_here: str = ""
    s3: dict[str, str] = field(default_factory=dict)
    s3_here: dict[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return self.head.folder

    @property
    def environment(self) -> dict[str, str]:
        """Of what is started on a host: the way to the cluster, to S3 and to MLflow."""
        return self.s3 | {
            "RAY_AUTH_MODE": "token",
            "RAY_ADDRESS": self.head.gcs,
            "MLFLOW_TRACKING_URI": self.mlflow_uri,
        }

    def join(self, name: str, *options: str) -> Host:
        """Make a host where there is none of the name, and its Ray node a part of the cluster."""
        host = self.lab.hosts.get(name) or self.lab.add(name)
        self._start_ray(host, f"--address={self.head.gcs}", *options).finish()
        return host

    def ke_ray(self, name: str, *words: object, **variables: str) -> subprocess.CompletedProcess:
        """A command on a host, whose driver joins the cluster."""
        environment = self.environment | variables
        host = self.lab.hosts[name]
        return host.run("python", "-m", "ke_ray", *words, environment=environment)

    def addresses_of(self, class_name: str) -> set[str]:
        """Of the hosts on which actors of a class were, dead ones included."""
        hosts = {node["node_id"]: node["node_ip"] for node in self._listed("nodes")}
        return {
            hosts[actor["node_id"]]
            for actor in self._listed("actors")
            if class_name in actor["class_name"] and actor["node_id"]
        }

    def _listed(self, kind: str) -> list[dict]:
        answer = self.head.get(f"/api/v0/{kind}?detail=1&limit=1000", self.head.token)
        return answer.json()["data"]["result"]["result"]

    def wait_for_mlflow(self) -> None:
        """Until the server answers, which takes longer to start than Ray."""
        _answers(f"{self.mlflow_here}/health", self.folder / "mlflow.log")

    def _start_ray(self, host: Host, *options: str) -> _RayStart:
        """``ray start`` under way: Ray's processes have its environment, so S3 comes first."""
        put_token(host, self.head.token)
        words = ["ray", "start", *options, "--object-store-memory=150000000"]
        environment = self.s3 | AGENT_PATIENCE | {"RAY_AUTH_MODE": "token"}
        # Ten times as often as by default: test_prometheus.py watches runs of seconds.
        environment["RAY_metrics_report_interval_ms"] = "1000"
        return _RayStart(host, words, environment, self.folder / f"{host.name}.log")


class _RayStart:
    """A ``ray start`` under way.

    It gives up after 30 seconds, which a busy machine may take, and ends what it started; then it
    is tried again.
    """

    def __init__(self, host: Host, words: list[str], environment: dict[str, str], log: Path):
        self._log = log
        self._begin = partial(host.start, words, log, environment)
        self._process = self._begin()

    def finish(self) -> None:
        """Until the node is up."""
        for _ in range(3):
            if self._process.wait(_START_TIMEOUT_S) == 0:
                return
            self._process = self._begin()
        raise AssertionError(self._log.read_text())


def put_token(host: Host, token: str) -> None:
    """Give a host a token, as the home folder's file."""
    path = host.path(_TOKEN)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o600)
    path.write_text(token)


@contextmanager
def running_cluster(folder: Path, workers: int = 2, cpus: int = 2) -> Iterator[LabCluster]:
    """Hosts ``store``, ``mlflow``, ``h1`` (the head), ``h2``, …; all of it is gone in the end.

    Args:
        folder: for logs.
        workers: hosts beside the head.
        cpus: that each of them declares.
    """
    token = secrets.token_hex(32)
    (folder / "token").write_text(token)
    (folder / "token").chmod(0o600)
    with ExitStack() as stack:
        lab = stack.enter_context(Lab())
        store, mlflow, first = lab.add("store"), lab.add("mlflow"), lab.add("h1")
        cluster = LabCluster(lab, Head("", f"{first.address}:6379", token, folder))
        cluster.s3 = {
            "AWS_ACCESS_KEY_ID": "lab",
            "AWS_SECRET_ACCESS_KEY": "lab",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://{store.address}:5000",
        }
        # The hosts reach both through relays that answer wrongly where a test says so.
        for host in (store, mlflow):
            relay_script = Path(fault_proxy.__file__).read_text()  # tests are not on the hosts
            words = ["python", "-S", "-c", relay_script, 5000, _BEHIND, FAULTS]
            host.start(words, folder / f"{host.name}-relay.log")
        serve_s3 = ("python", "-m", "moto.server", "-H", "127.0.0.1", "-p", _BEHIND)
        store.start(serve_s3, folder / "store.log")
        serve_mlflow = (
            *("python", "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", _BEHIND),
            *("--workers", "1", "--allowed-hosts", "*"),
            *("--backend-store-uri", f"sqlite:///{Path.home()}/server.db"),
            *("--artifacts-destination", Path.home() / "artifacts"),
        )
        options = ("--head", "--dashboard-host=127.0.0.1", "--num-cpus=0")
        starting = [cluster._start_ray(first, *options)]
        # A node that finds no head asks again: they all start at once.
        for number in range(2, workers + 2):
            host = lab.add(f"h{number}")
            options = (f"--address={cluster.head.gcs}", f"--num-cpus={cpus}")
            starting.append(cluster._start_ray(host, *options))
        mlflow.start(
            ["nice", "-n", "15", *serve_mlflow],  # Ray comes first, whose start is waited for
            folder / "mlflow.log",
            {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        )

        def relay(host: Host, port: int) -> str:
            return stack.enter_context(Gate(port, host.network)).uri

        s3_here = relay(store, _BEHIND)
        cluster.s3_here = cluster.s3 | {"AWS_ENDPOINT_URL": s3_here}
        cluster.mlflow_uri = f"http://{mlflow.address}:5000"
        cluster.mlflow_here = relay(mlflow, _BEHIND)
        cluster.head.address = relay(first, 8265)
        for start in starting:
            start.finish()
        _answers(f"{s3_here}/moto-api/", folder / "store.log")
        bucket = urllib.request.Request(f"{s3_here}/{BUCKET}", method="PUT")
        urllib.request.urlopen(bucket, timeout=30).close()
        _answers(f"{cluster.head.address}/api/jobs/", folder / "h1.log", token)
        yield cluster


def _answers(url: str, log: Path, token: str = "") -> None:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    deadline = time.monotonic() + _START_TIMEOUT_S
    while True:
        try:
            urllib.request.urlopen(request, timeout=5).close()
            return
        except OSError as error:
            assert time.monotonic() < deadline, f"no answer from {url}: {error}\n{log.read_text()}"
            time.sleep(0.2)
