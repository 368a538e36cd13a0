"""Disturb commands on a cluster of hosts, and count what came of it.

    PYTHONPATH=tests/helpers:tests/hosts python tests/faults/host_faults.py FOLDER \
        [--injections 1000] [--until 18:20] [--events cut,power,…] [--workloads scan,…]

Each run is one command (a scan, continual learning, a pretraining or a sweep) whose checkpoints and
results lie on S3, on a cluster of a head without CPUs and two workers (``tests/hosts``). A seed
draws what befalls it and when (``host_events.py``). A command that ends with an error is started
again, as its message says. FOLDER keeps a line of JSON per run, with the commit; the same call goes
on where the last one ended. The exit code is 1 where a run was not survived.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_AUTH_MODE", "token")  # before Ray is imported, which reads it then

from fault_world import difference, results_of
from host_bed import Bed, running_bed
from host_events import EVENTS
from lab import ROOT, why_not
from lab_cluster import running_cluster

WORKLOADS = ("scan", "continual", "scan", "sweep", "scan", "pretrain")
_MAX_STARTS = 12
_COMMAND_TIMEOUT_S = 900.0
_LEASE_PAUSE_S = 15.0


@dataclass
class HostOutcome:
    """What a disturbed run came to.

    Attributes:
        events: kind, what, after how many seconds, for how long, and whether it met something.
        codes: exit codes of the commands, each started after the one before had ended.
        problems: what does not hold; empty where all was survived.
    """

    seed: int
    workload: str
    commit: str
    events: list[dict[str, Any]] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    difference: float | None = None
    duration_s: float = 0.0

    @property
    def injections(self) -> int:
        """Events that met work under way."""
        return sum(event["met"] for event in self.events)


class Run:
    """A command under disturbance, started again where it ends with an error."""

    def __init__(self, bed: Bed, outcome: HostOutcome, name: str) -> None:
        self._bed, self._outcome, self._name = bed, outcome, name
        self._words = bed.command(outcome.workload, name)
        self._started = time.monotonic()
        self._since = 0.0
        self._is_under_way = False
        self.is_done = False

    def start(self) -> None:
        """Start the command."""
        self._since = time.monotonic()
        self._driver = self._bed.driver
        self._driver.start(self._words, f"/tmp/{self._name}.log")
        self._is_under_way = True

    def look(self, *, again: bool = True) -> bool:
        """Whether the command is under way; one that failed is started again, on whole hosts."""
        if self.is_done:
            return False
        if self._is_under_way:
            if self._driver.is_running:
                if time.monotonic() - self._since > _COMMAND_TIMEOUT_S:
                    raise TimeoutError(f"no end in {_COMMAND_TIMEOUT_S:.0f} s: {self.last_words()}")
                return True
            self._is_under_way = False
            code = self._driver.wait(10)
            assert code is not None
            self._outcome.codes.append(code)
            self.is_done = code == 0
            if code not in (0, 1, 2, -9):
                self._outcome.problems.append(f"exit code {code}: {self.last_words()}")
        if self.is_done or not again:
            return False
        if "renewed its lease" in self.last_words():
            time.sleep(_LEASE_PAUSE_S)  # that of a killed command is void after a minute
        if len(self._outcome.codes) >= _MAX_STARTS:
            raise RuntimeError(f"{_MAX_STARTS} starts were not enough: {self.last_words()}")
        self._bed.heal()
        self.start()
        return True

    def last_words(self) -> str:
        """The end of what it printed."""
        return " ".join(self._bed.log(self._name).read_text(errors="replace").split())[-600:]

    def meet(self, kind: str, rng: random.Random, seconds: float) -> None:
        """Let an event happen while the command is under way."""
        bed, event = self._bed, EVENTS[kind]
        struck = bed.hits(event.server) if event.server else 0
        at_s = time.monotonic() - self._started
        with event.make(bed, rng) as what:
            _wait(seconds, lambda: self.look(again=False))
        met = bed.hits(event.server) > struck if event.server else True
        self._outcome.events.append(
            {"kind": kind, "what": what, "at_s": round(at_s, 1), "s": round(seconds, 1), "met": met}
        )


def _wait(seconds: float, under_way: Callable[[], bool]) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and under_way():
        time.sleep(0.1)


def draw_seconds(rng: random.Random, span: tuple[float, float]) -> float:
    """A length in seconds; short ones are as likely as long ones by their logarithms."""
    low, high = max(span[0], 0.1), span[1]
    return math.exp(rng.uniform(math.log(low), math.log(high)))


def disturb(
    bed: Bed,
    outcome: HostOutcome,
    kinds: Sequence[str],
    rng: random.Random,
    expected: dict[Any, Any],
    longest_s: float = math.inf,
) -> None:
    """Run a workload while one event after the other befalls it, and fill in what came of it."""
    name = f"{outcome.workload}-{outcome.seed}"
    run = Run(bed, outcome, name)
    started = time.monotonic()
    try:
        run.start()
        _wait(60, lambda: run.look() and not bed.is_begun(name))
        for kind in kinds:
            _wait(rng.uniform(0, min(3, longest_s)), run.look)
            if not run.look():
                break
            run.meet(kind, rng, min(draw_seconds(rng, EVENTS[kind].seconds), longest_s))
        while run.look():
            time.sleep(0.2)
        if any(event["kind"].startswith("mlflow") for event in outcome.events):
            run.is_done = False  # what did not get through to MLflow is sent by the next command
            run.start()
            while run.look():
                time.sleep(0.2)
        bed.heal()
        check(bed, outcome, name, expected)
    except Exception as error:  # the campaign goes on: this is a count
        outcome.problems.append(f"{type(error).__name__}: {error}"[:1500])
    outcome.duration_s = round(time.monotonic() - started, 1)


def check(bed: Bed, outcome: HostOutcome, name: str, expected: dict[Any, Any]) -> None:
    """Fill in what does not hold after a run that has ended."""
    found, left = bed.results(outcome.workload, name)
    outcome.difference = difference(found, expected)
    if outcome.difference > 1e-6:
        outcome.problems.append(f"results differ by {outcome.difference:.2e}")
    outcome.problems += [f"{each} is left in the results" for each in left]
    outcome.problems += bed.mlflow_problems(outcome.workload, name)
    outcome.problems += bed.left()
    if "Traceback (most recent" in bed.log(name).read_text(errors="replace"):
        outcome.problems.append("a traceback was printed")
    if not outcome.problems:
        bed.remove(name)


def undisturbed(bed: Bed, workload: str) -> dict[Any, Any]:
    """A workload's results when nothing befalls it; those of an earlier call where there are."""
    name = f"undisturbed-{workload}"
    local = bed.folder / "out" / name
    if not local.exists():
        bed.driver.start(bed.command(workload, name, logged=False), f"/tmp/{name}.log")
        code = bed.driver.wait(_COMMAND_TIMEOUT_S)
        assert code == 0, bed.log(name).read_text()
        return bed.results(workload, name)[0]
    return results_of(workload, local)


def campaign(
    folder: Path, injections: int, until: float, kinds: Sequence[str], workloads: Sequence[str]
) -> list[HostOutcome]:
    """Run until there are so many injections, or the time is over; each run is saved at once."""
    file = folder / "outcomes.jsonl"
    outcomes = [HostOutcome(**json.loads(line)) for line in _lines(file)]
    while sum(o.injections for o in outcomes) < injections and time.time() < until:
        with (
            tempfile.TemporaryDirectory(prefix="kf") as logs,
            running_cluster(Path(logs)) as cluster,
            running_bed(cluster, folder, set(workloads)) as bed,
        ):
            commit = _commit()  # of the code that these hosts have a copy of
            # Hosts that something was wrong with are not used again.
            while sum(o.injections for o in outcomes) < injections and time.time() < until:
                seed = len(outcomes)
                outcome = HostOutcome(seed, workloads[seed % len(workloads)], commit)
                rng = random.Random(f"hosts {seed}")
                expected = undisturbed(bed, outcome.workload)
                chosen = rng.choices(kinds, k=rng.randint(3, 8))
                disturb(bed, outcome, chosen, rng, expected)
                outcomes.append(outcome)
                with file.open("a") as lines:
                    lines.write(json.dumps(asdict(outcome)) + "\n")
                met = ", ".join(f"{e['kind']} ({e['what']})" for e in outcome.events if e["met"])
                print(
                    f"{seed} {outcome.workload}: {met}; codes {outcome.codes}; "
                    f"{'; '.join(outcome.problems) or 'survived'} ({outcome.duration_s:.0f} s)",
                    flush=True,
                )
                if outcome.problems:
                    _keep_logs(bed, folder / "logs" / str(seed), Path(logs))
                    break
    return outcomes


def _keep_logs(bed: Bed, target: Path, cluster_logs: Path) -> None:
    shutil.copytree(cluster_logs, target, dirs_exist_ok=True)
    if bed.head.is_on:
        for path in bed.head.path("/tmp").glob("*.log"):
            shutil.copy(path, target)


def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


def _commit() -> str:
    words = [
        "git",
        "-C",
        str(ROOT),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=12",
        "--exclude=*",
    ]
    return subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()


def summary(outcomes: Sequence[HostOutcome]) -> list[tuple[str, int, int]]:
    """Kind of event, injections that met something, and those in runs that were survived."""
    met: collections.Counter[str] = collections.Counter()
    survived: collections.Counter[str] = collections.Counter()
    for outcome in outcomes:
        for event in outcome.events:
            met[event["kind"]] += event["met"]
            survived[event["kind"]] += event["met"] and not outcome.problems
    return [(kind, met[kind], survived[kind]) for kind in EVENTS if met[kind]]


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="kept: outcomes.jsonl, and logs of what failed")
    parser.add_argument("--injections", type=int, default=1000, help="in the folder, in all")
    parser.add_argument("--until", help="HH:MM; no run starts later")
    parser.add_argument("--events", default=",".join(EVENTS))
    parser.add_argument("--workloads", default=",".join(WORKLOADS))
    options = parser.parse_args()
    if reason := why_not():
        parser.error(reason)
    kinds = options.events.split(",")
    if unknown := set(kinds) - set(EVENTS):
        parser.error(f"unknown events {', '.join(unknown)}; there are {', '.join(EVENTS)}")
    until = math.inf
    if options.until:
        clock = datetime.time.fromisoformat(options.until)
        until = datetime.datetime.combine(datetime.datetime.now().date(), clock).timestamp()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    outcomes = campaign(folder, options.injections, until, kinds, options.workloads.split(","))
    for kind, met, survived in summary(outcomes):
        print(f"{kind:13} {survived} of {met} survived")
    total = sum(outcome.injections for outcome in outcomes)
    print(f"{total} injections in {len(outcomes)} runs")
    return 1 if any(outcome.problems for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
