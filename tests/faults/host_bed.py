"""Hosts to disturb: the laboratory's cluster, its store and MLflow, and commands on its head."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import fault_driver
import s3fs
from fault_world import WORKERS, World, leftovers, mlflow_problems, results_of
from lab import Host
from lab_cluster import BUCKET, FAULTS, LabCluster
from servers import Gate

WORKER_HOSTS = ("h2", "h3")
CPUS = 2
#: Where the scan's workers cache what they fetch.
CACHE = "/tmp/fetched"
STORE = f"s3://{BUCKET}/faults"
#: Ray Data's, which it makes once per cluster and keeps.
RAY_ACTORS = ("_StatsActor", "ActorLocationTracker", "_AutoscalingCoordinatorActor")


class Driver:
    """One command after the other on the head's host, each forked from a process that waits."""

    def __init__(self, host: Host, environment: dict[str, str]) -> None:
        script = Path(fault_driver.__file__).read_text()  # tests are not on the hosts
        self._host = host
        self._process = subprocess.Popen(
            host.words(["python", "-c", script]),
            env=host.environment | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._pid = 0
        self._code: int | None = None
        self._ended = threading.Event()
        assert self._line() == "ready"

    def start(self, words: list[str], log: str, **variables: str) -> None:
        """Start ``ke-ray WORDS…``; what it prints goes to a file of the host."""
        assert self._process.stdin is not None
        request = {"words": words, "log": log, "environment": variables}
        self._ended.clear()
        self._code = None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        self._pid = int(self._line() or 0)
        threading.Thread(target=self._wait, daemon=True).start()

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def _wait(self) -> None:
        line = self._line()
        self._code = int(line) if line else -9  # the host went off
        self._ended.set()

    @property
    def is_running(self) -> bool:
        """Whether a command is under way."""
        return bool(self._pid) and not self._ended.is_set()

    def wait(self, timeout_s: float) -> int | None:
        """The exit code, −N for signal N; None: no end within the time."""
        return self._code if self._ended.wait(timeout_s) else None

    def kill(self) -> None:
        """SIGKILL for the command."""
        self._host.run("kill", "-9", self._pid)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


class Bed:
    """The hosts, what a workload needs on them, and what they must be like after it.

    Args:
        cluster: running, with MLflow.
        folder: of the world, and of downloaded results.
    """

    def __init__(self, cluster: LabCluster, folder: Path, stack: ExitStack) -> None:
        self.cluster, self.lab, self.folder = cluster, cluster.lab, folder
        self._stack = stack
        self.world = World(folder / "world")
        self.world.mlflow_uri = cluster.mlflow_uri
        self.files = s3fs.S3FileSystem(
            key="lab",
            secret="lab",
            endpoint_url=cluster.s3_here["AWS_ENDPOINT_URL"],
            use_listings_cache=False,
            skip_instance_cache=True,
        )
        self._start_driver()

    @property
    def head(self) -> Host:
        return self.lab.hosts["h1"]

    def _start_driver(self) -> None:
        self.driver = Driver(self.head, self.cluster.environment)
        self._stack.callback(self.driver.close)

    def put_world(self, workloads: set[str]) -> None:
        """Make what workloads read, and put it on the store."""
        self.world.folder.mkdir(parents=True, exist_ok=True)
        self.world.build_inputs(workloads)
        target = STORE.removeprefix("s3://")
        self.files.put(f"{self.world.folder}/", f"{target}/", recursive=True)

    def command(self, workload: str, name: str, *, logged: bool = True) -> list[str]:
        """The words of a workload; its study's file is on the head."""
        output = self.world.folder / "out" / name
        changes: dict[str, Any] = {}
        if workload == "scan":
            changes = {"cache_dir": CACHE}
        elif workload == "pretrain":
            changes = {"num_workers": 2}
        study = self.world.study(workload, output, name if logged else None, **changes)
        text = study.model_dump_json(exclude_unset=True, by_alias=True)
        path = f"/tmp/{name}.yaml"
        self.head.path(path).write_text(text.replace(str(self.world.folder), STORE))
        return [workload, path]

    def log(self, name: str) -> Path:
        """What a workload's commands have printed."""
        return self.head.path(f"/tmp/{name}.log")

    def is_begun(self, name: str) -> bool:
        """Whether a workload's command has written anything."""
        return bool(self.files.find(f"{BUCKET}/faults/out/{name}"))

    def results(self, workload: str, name: str) -> tuple[dict[Any, Any], list[str]]:
        """A workload's results, and the names that a finished one may not hold."""
        local = self.folder / "out" / name
        shutil.rmtree(local, ignore_errors=True)
        self.files.get(f"{BUCKET}/faults/out/{name}/", f"{local}/", recursive=True)
        return results_of(workload, local), leftovers(local)

    def remove(self, name: str) -> None:
        """A workload's results, here and there."""
        shutil.rmtree(self.folder / "out" / name, ignore_errors=True)
        self.files.rm(f"{BUCKET}/faults/out/{name}", recursive=True)

    def set_faults(self, server: str, rules: list[dict[str, Any]]) -> None:
        """The rules of the relay to ``store`` or ``mlflow``."""
        self.lab.hosts[server].path(f"{FAULTS}/faults.json").write_text(json.dumps(rules))

    def hits(self, server: str) -> int:
        """How many requests its rules have struck."""
        path = self.lab.hosts[server].path(f"{FAULTS}/hits")
        return path.stat().st_size if path.exists() else 0

    def alive(self) -> set[str]:
        """Addresses of the nodes that the head takes for alive."""
        return {n["node_ip"] for n in self.cluster._listed("nodes") if n["state"] == "ALIVE"}

    def heal(self) -> None:
        """Make all hosts nodes of the cluster again, where they are not."""
        if not self.head.is_on:
            self.restart_head()
        for name in WORKER_HOSTS:
            host = self.lab.hosts[name]
            if not host.is_on:
                self.lab.boot(name)
            elif host.address in self.alive() and self._has_raylet(host):
                continue
            else:
                host.run("ray", "stop", "--force")
            self.cluster.join(name, f"--num-cpus={CPUS}")

    def restart_head(self) -> None:
        """The head's host comes back, with a new cluster that the workers join."""
        self.lab.boot("h1")
        options = ("--head", "--dashboard-host=127.0.0.1", "--num-cpus=0")
        self.cluster._start_ray(self.head, *options).finish()
        gate = self._stack.enter_context(Gate(8265, self.head.network))
        self.cluster.head.address = gate.uri
        for name in WORKER_HOSTS:
            if self.lab.hosts[name].is_on:
                self.lab.hosts[name].run("ray", "stop", "--force")
        self._start_driver()

    def _has_raylet(self, host: Host) -> bool:
        return any("raylet/raylet" in line for line in self._processes(host))

    def _processes(self, host: Host) -> list[str]:
        lines = []
        for path in host.path("/proc").glob("[0-9]*/cmdline"):
            try:
                lines.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
            except OSError:  # it has just ended
                continue
        return lines

    def left(self, timeout_s: float = 90.0) -> list[str]:
        """Processes, actors and placement groups that outlive the work, after some patience."""
        deadline = time.monotonic() + timeout_s
        while True:
            problems = [
                f"{name}: {line.strip()[:80]} is left"
                for name in ("h1", *WORKER_HOSTS)
                for line in self._processes(self.lab.hosts[name])
                if any(word in line for word in WORKERS)
            ]
            for kind, gone in (("actors", "DEAD"), ("placement_groups", "REMOVED")):
                for each in self.cluster._listed(kind):
                    name = each.get("class_name", "")
                    if each["state"] != gone and name not in RAY_ACTORS:
                        problems.append(f"{kind}: {name} {each['state']} is left")
            if not problems or time.monotonic() > deadline:
                return problems
            time.sleep(1)

    def mlflow_problems(self, workload: str, name: str) -> list[str]:
        """What is untrue in MLflow."""
        return mlflow_problems(self.cluster.mlflow_here, name, workload)


@contextmanager
def running_bed(cluster: LabCluster, folder: Path, workloads: set[str]) -> Iterator[Bed]:
    """A bed on a running cluster, with what the workloads read on its store."""
    with ExitStack() as stack:
        bed = Bed(cluster, folder, stack)
        bed.put_world(workloads)
        cluster.wait_for_mlflow()
        yield bed
