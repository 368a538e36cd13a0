"""The kinds of faults of ``faults.py``: each runs a workload, disturbs it once, and says what came.

Moments are drawn from the seed: after how many finished pieces of work the fault comes, and how
long after. A fault that finds nothing to hit any more (the work was over) is not counted.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from fault_source import Source
from fault_world import (
    NUM_CHECKPOINTS,
    World,
    difference,
    environment,
    leftovers,
    mlflow_problems,
    processes,
    results_of,
    run,
    session_problems,
)

from ke_ray.errors import KeRayError


@dataclass
class Outcome:
    """What a disturbed run came to.

    Attributes:
        kind, workload, seed: which run.
        hits: faults that met work under way; others are not counted.
        problems: what does not hold; empty where all was survived.
        difference: largest relative difference of a result from the undisturbed run's.
        duration_s: of the disturbed run, recovery included.
    """

    kind: str
    workload: str
    seed: int
    hits: int = 0
    problems: list[str] = field(default_factory=list)
    difference: float | None = None
    duration_s: float = 0.0


_RESTART = "fault-restart"
#: Ray's own, which find out within two minutes that their node is gone; they do no work of ours.
RAY_DAEMONS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")


class Trigger(threading.Thread):
    """Acts at each moment, once ``progress()`` is there; ``act`` says whether it met something.

    Args:
        moments: (progress, seconds after it), ascending.
    """

    def __init__(
        self,
        moments: list[tuple[int, float]],
        progress: Callable[[], int],
        act: Callable[[], bool],
    ) -> None:
        super().__init__(daemon=True)
        self.hits = 0
        self._moments, self._progress, self._act = moments, progress, act
        self._over = threading.Event()

    def run(self) -> None:
        """Wait and act, and try again while there is nothing to hit."""
        for after, delay_s in self._moments:
            while self._progress() < after:
                if self._over.wait(0.02):
                    return
            self._over.wait(delay_s)
            while not self._over.is_set():
                if self._act():
                    self.hits += 1
                    break
                self._over.wait(0.02)

    def __enter__(self) -> Trigger:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()


def moments(rng: random.Random, number: int, first: int = 0) -> list[tuple[int, float]]:
    """So many moments of a workload of about eight pieces."""
    return [(after, rng.random() / 2) for after in sorted(rng.sample(range(first, 7), number))]


def pieces(workload: str, output: Path) -> int:
    """How many pieces of work of a running study are on the disk."""
    if workload == "scan":
        return len(list(output.glob("coefficients/[!.]*.safetensors")))
    states = [int(p.parent.name[4:]) for p in output.glob("state/step*/state.json")]
    states += [int(p.parent.name[4:]) for p in output.glob("runs/*/state/step*/state.json")]
    done = len(list(output.glob("runs/*/run.json")))
    return 8 * done + (max(states) // (5 if workload == "pretrain" else 3) if states else 0)


def check(world: World, outcome: Outcome, output: Path, uri: str | None = None) -> None:
    """Fill in what does not hold after a run that has ended."""
    try:
        found = results_of(outcome.workload, output)
        outcome.difference = difference(found, world.expected[outcome.workload])
        if outcome.difference > 1e-6:
            outcome.problems.append(f"results differ by {outcome.difference:.2e}")
    except (ValueError, KeyError, OSError, KeRayError) as error:
        outcome.problems.append(f"results: {error}")
    outcome.problems += [f"{name} is left in the results" for name in leftovers(output)]
    outcome.problems += mlflow_problems(uri or world.mlflow_uri, output.name, outcome.workload)
    outcome.problems += session_problems()


def disturbed(
    world: World,
    outcome: Outcome,
    rng: random.Random,
    act: Callable[[], bool],
    number: int = 2,
    first: int = 0,
    **keys: Any,
) -> None:
    """Run a workload in this process' session, and act at moments of the seed's choice."""
    output = world.folder / f"{outcome.kind}-{outcome.seed}"
    study = world.study(outcome.workload, output, output.name, **keys)
    started = time.monotonic()
    trigger = Trigger(moments(rng, number, first), lambda: pieces(outcome.workload, output), act)
    with trigger:
        run(study)
    outcome.duration_s = time.monotonic() - started
    outcome.hits = trigger.hits
    for thread in threading.enumerate():
        if thread.name == _RESTART:
            thread.join()
    check(world, outcome, output, study.mlflow.uri)
    if not outcome.problems:
        shutil.rmtree(output)


def kill_one(rng: random.Random, *titles: str) -> Callable[[], bool]:
    """SIGKILL for one of this process' descendants with such a title."""

    def act() -> bool:
        found = processes(titles=titles)
        if found:
            os.kill(rng.choice(found).pid, signal.SIGKILL)
        return bool(found)

    return act


def scorer(world: World, outcome: Outcome, rng: random.Random, _: dict[str, Any]) -> None:
    """SIGKILL for a scorer actor."""
    disturbed(world, outcome, rng, kill_one(rng, "MapWorker"), 3)


def worker(world: World, outcome: Outcome, rng: random.Random, _: dict[str, Any]) -> None:
    """SIGKILL for a training worker."""
    disturbed(world, outcome, rng, kill_one(rng, "RayTrainWorker"), 4)


def trial(world: World, outcome: Outcome, rng: random.Random, _: dict[str, Any]) -> None:
    """SIGKILL for the process of a sweep's trial."""
    disturbed(world, outcome, rng, kill_one(rng, "ImplicitFunc", "run_trial"), 4)


def driver(world: World, outcome: Outcome, rng: random.Random, _: dict[str, Any]) -> None:
    """SIGKILL for the command itself, twice; then the same command goes to its end."""
    output = world.folder / f"driver-{outcome.seed}"
    study = world.study(outcome.workload, output, output.name)
    file = world.folder / f"driver-{outcome.seed}.yaml"
    file.write_text(study.model_dump_json(exclude_unset=True, by_alias=True))
    command = [sys.executable, "-m", "ke_ray", outcome.workload, str(file)]
    log = file.with_suffix(".log")
    started = time.monotonic()
    # As many threads as a Ray worker of one CPU has, so that sums are added in the same order.
    with environment(OMP_NUM_THREADS="1"), log.open("wb") as sink:
        for after, delay_s in moments(rng, 2):
            process = subprocess.Popen(command, stdout=sink, stderr=sink, stdin=subprocess.DEVNULL)
            while process.poll() is None and pieces(outcome.workload, output) < after + 1:
                time.sleep(0.02)
            time.sleep(delay_s / 3)
            daemons = {p.pid for p in processes(process.pid, titles=RAY_DAEMONS)}
            family = {process.pid, *(p.pid for p in processes(process.pid, titles=("",)))}
            outcome.hits += process.poll() is None
            process.kill()
            process.wait()
            left = outliving(sorted(family - daemons))
            outcome.problems += [f"process {pid} outlived its driver" for pid in left]
        last = subprocess.run(command, stdout=sink, stderr=sink, stdin=subprocess.DEVNULL)
    outcome.duration_s = time.monotonic() - started
    if last.returncode:
        told = log.read_text(errors="replace").strip().splitlines()[-1:]
        outcome.problems.append(f"the last command ended with {last.returncode}: {told}")
    check(world, outcome, output)
    if not outcome.problems:
        shutil.rmtree(output)


def outliving(pids: list[int], timeout_s: float = 60.0) -> list[int]:
    """Of a killed driver's family, who is there after a minute at most."""
    deadline = time.monotonic() + timeout_s
    left = pids
    while left and time.monotonic() < deadline:
        time.sleep(0.2)
        left = [p for p in left if psutil.pid_exists(p) and _status(p) != "zombie"]
    return left


def _status(pid: int) -> str:
    try:
        return str(psutil.Process(pid).status())
    except psutil.NoSuchProcess:
        return "zombie"


def _parent(pid: int) -> int | None:
    try:
        return psutil.Process(pid).ppid()
    except psutil.NoSuchProcess:
        return None


def mlflow(world: World, outcome: Outcome, rng: random.Random, options: dict[str, Any]) -> None:
    """The MLflow server is killed, stays away, and comes back."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server: list[subprocess.Popen[bytes]] = [start_server(world.folder, port)]
    back: list[threading.Thread] = []

    def act() -> bool:
        os.killpg(server[0].pid, signal.SIGKILL)
        server[0].wait()

        def restart() -> None:
            time.sleep(options["gone_s"])
            server[0] = start_server(world.folder, port)

        back.append(threading.Thread(target=restart, name=_RESTART))
        back[0].start()
        return True

    uri = f"http://127.0.0.1:{port}"
    try:
        settings = {"uri": uri, "experiment": f"mlflow-{outcome.seed}"}
        disturbed(world, outcome, rng, act, 1, 1, mlflow=settings)
    finally:
        for thread in back:
            thread.join()
        os.killpg(server[0].pid, signal.SIGKILL)
        server[0].wait()


def start_server(folder: Path, port: int) -> subprocess.Popen[bytes]:
    """``mlflow server`` on loopback, healthy when this returns."""
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--workers", "1"),
            *("--port", str(port), "--backend-store-uri", f"sqlite:///{folder}/server.db"),
            *("--artifacts-destination", str(folder / "artifacts")),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ
        | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        start_new_session=True,
    )
    while process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                return process
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"mlflow server ended with {process.returncode}")


def node(world: World, outcome: Outcome, rng: random.Random, options: dict[str, Any]) -> None:
    """A whole node goes, with all its processes, and another one comes later."""
    cluster, nodes = options["cluster"], options["nodes"]
    known: list[int] = []

    def act() -> bool:
        if not pieces("scan", world.folder / f"node-{outcome.seed}") and not processes():
            return False
        known.extend(process.pid for process in processes(titles=("ray::",)))
        cluster.remove_node(nodes.pop(), allow_graceful=False)
        return True

    disturbed(world, outcome, rng, act, 1)
    orphans = outliving([pid for pid in known if _parent(pid) == 1])
    outcome.problems += [f"process {pid} outlived its node" for pid in orphans]
    if not nodes:
        nodes.append(cluster.add_node(num_cpus=1))


def disk(world: World, outcome: Outcome, rng: random.Random, _: dict[str, Any]) -> None:
    """The results' disk is full four times; with more room the same command goes on."""
    mount = world.folder / f"disk-{outcome.seed}"
    mount.mkdir()
    sizes = sorted(rng.sample(range(24, 140, 4), 4))
    mounting = ["mount", "-t", "tmpfs", "-o", f"size={sizes[0]}k", "tmpfs", str(mount)]
    subprocess.run(mounting, check=True)
    try:
        output = mount / f"disk-{outcome.seed}-results"
        study = world.scan(output, output.name)
        started = time.monotonic()
        for size in sizes:
            subprocess.run(["mount", "-o", f"remount,size={size}k", str(mount)], check=True)
            try:
                outcome.hits += run(study).exit_code != 0
            except KeRayError as error:
                outcome.hits += 1
                if "no space" not in str(error):
                    outcome.problems.append(f"a full disk is called: {error}")
            half = [name for name in leftovers(output) if "/." in f"/{name}"]
            outcome.problems += [f"half a file after the full disk: {name}" for name in half]
        subprocess.run(["mount", "-o", "remount,size=64m", str(mount)], check=True)
        run(study)
        outcome.duration_s = time.monotonic() - started
        check(world, outcome, output)
    finally:
        subprocess.run(["umount", str(mount)], check=True)
    mount.rmdir()


def source(world: World, outcome: Outcome, rng: random.Random, _: dict[str, Any]) -> None:
    """Checkpoints over HTTP: two arrive slowly, two cut off twice, two after two refusals."""
    victims = rng.sample(range(1, NUM_CHECKPOINTS + 1), 6)
    wrongs = [["slow"], ["cut"] * 2, ["refuse"] * 2] * 2
    faults = {
        f"step{10 * victim}/model.safetensors": list(what)
        for victim, what in zip(victims, wrongs, strict=True)
    }
    with Source(world.series, faults) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_port}"
        rows = [f"{10 * (n + 1)},{base}/step{10 * (n + 1)}" for n in range(NUM_CHECKPOINTS)]
        listing = world.folder / f"source-{outcome.seed}.csv"
        listing.write_text("\n".join(["step,url", *rows]) + "\n")
        cache = world.folder / f"source-{outcome.seed}-cache"
        keys = {"checkpoints": {"spec": str(listing)}, "cache_dir": str(cache)}
        disturbed(world, outcome, rng, lambda: False, 1, **keys)
        outcome.hits = sum(not left for left in faults.values())
        server.shutdown()
    half = [path.name for path in cache.rglob("*.incomplete")]
    half += [path.name for path in cache.glob("partial/*")]
    outcome.problems += [f"{name} is left in the cache" for name in half]
    shutil.rmtree(cache)


#: Kind → (what injects it, the workloads it is tried on).
KINDS: dict[str, tuple[Callable[..., None], tuple[str, ...]]] = {
    "scorer": (scorer, ("scan",)),
    "worker": (worker, ("pretrain",)),
    "trial": (trial, ("sweep",)),
    "driver": (driver, ("scan", "pretrain", "sweep")),
    "mlflow": (mlflow, ("scan",)),
    "node": (node, ("scan",)),
    "disk": (disk, ("scan",)),
    "source": (source, ("scan",)),
}
