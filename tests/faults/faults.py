"""Inject faults into real runs and count what came of them.

    python tests/faults/faults.py [--injections 50] [--kinds scorer,driver,…] [--seed 0] [--json]

Kinds (``fault_kinds.py``): SIGKILL of a scorer actor, a training worker, a sweep's trial, the
driver; the MLflow server gone for 30 seconds; a whole node of a cluster gone; a full disk (a small
tmpfs: root only); a checkpoint source over HTTP that is slow, truncates, or fails twice. After
each: the results equal the undisturbed run's, nothing is missing, doubled or half-written, MLflow's
statuses are true, and no process or placement group is left. The exit code is 1 where one of these
does not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

# Before Ray is imported, which reads it then.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from fault_kinds import KINDS, Outcome
from fault_world import World

from ke_ray.engine.cluster.session import ray_session

_MISSES_ALLOWED = 3  # in a row: the fault came when the work was over


def can_mount(folder: Path) -> bool:
    """Whether this user may mount a tmpfs here."""
    place = folder / "mount-probe"
    place.mkdir(exist_ok=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode == 0:
        subprocess.run(["umount", str(place)], check=True)
    place.rmdir()
    return mounted.returncode == 0


@contextmanager
def two_nodes() -> Iterator[dict[str, Any]]:
    """A cluster of a head node and another one, of one CPU each, that this process has joined."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    nodes = [cluster.add_node(num_cpus=1)]
    os.environ["RAY_ADDRESS"] = cluster.address
    try:
        with ray_session():
            yield {"cluster": cluster, "nodes": nodes}
    finally:
        del os.environ["RAY_ADDRESS"]
        cluster.shutdown()


def inject(
    kind: str,
    number: int,
    seed: int,
    world: World,
    options: dict[str, Any],
    say: Callable[[str], None],
) -> Iterator[Outcome]:
    """Disturbed runs of a kind until ``number`` injections have hit something."""
    function, workloads = KINDS[kind]
    hits = misses = 0
    attempt = seed
    while hits < number and misses < _MISSES_ALLOWED:
        outcome = Outcome(kind, workloads[attempt % len(workloads)], attempt)
        started = time.monotonic()
        try:
            function(world, outcome, random.Random(f"{kind} {attempt}"), options)
        except Exception as error:  # the loop goes on: this is a count
            outcome.problems.append(f"{type(error).__name__}: {error}")
            outcome.hits = outcome.hits or 1
            outcome.duration_s = time.monotonic() - started
        attempt += 1
        hits += outcome.hits
        misses = 0 if outcome.hits else misses + 1
        told = "; ".join(outcome.problems) or "survived"
        say(
            f"{kind:7} {outcome.workload:8} seed {outcome.seed}: {outcome.hits} injected, {told} "
            f"({outcome.duration_s:.1f} s)"
        )
        if outcome.hits or outcome.problems:
            yield outcome


def dealt(kinds: Sequence[str], injections: int) -> dict[str, int]:
    """Kind → number of injections: as given (``scorer:6``), else an even share."""
    given = dict(kind.partition(":")[::2] for kind in kinds)
    share = -(-injections // len(given)) if given else 0
    return {kind: int(number) if number else share for kind, number in given.items()}


def run_all(
    kinds: Sequence[str],
    injections: int,
    *,
    seed: int,
    folder: Path,
    gone_s: float = 30.0,
    say: Callable[[str], None] = lambda text: print(text, flush=True),
) -> list[Outcome]:
    """At least ``injections`` faults, dealt evenly over ``kinds``.

    Args:
        kinds: names, or ``NAME:NUMBER`` for so many of a kind.
        gone_s: how long the MLflow server stays away.
        say: called with a line for each injection.
    """
    numbers = dealt(kinds, injections)
    if "disk" in numbers and not can_mount(folder):
        say("disk: skipped, since this user may not mount a tmpfs")
        del numbers["disk"]
    world = World(folder)
    outcomes: list[Outcome] = []
    options: dict[str, Any] = {"gone_s": gone_s}
    workloads = {workload for kind in numbers for workload in KINDS[kind][1]}
    with ray_session(num_cpus=2):
        world.build(workloads)
        for kind in (kind for kind in numbers if kind not in ("node", "driver")):
            outcomes += inject(kind, numbers[kind], seed, world, options, say)
    if "node" in numbers:
        with two_nodes() as cluster:
            outcomes += inject("node", numbers["node"], seed, world, options | cluster, say)
    if "driver" in numbers:  # its commands start sessions of their own
        outcomes += inject("driver", numbers["driver"], seed, world, options, say)
    return outcomes


def summary(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Counts of each kind and workload."""
    rows = []
    for kind in KINDS:
        for workload in KINDS[kind][1]:
            own = [o for o in outcomes if (o.kind, o.workload) == (kind, workload)]
            if own:
                known = [o.difference for o in own if o.difference is not None]
                rows.append(
                    {
                        "kind": kind,
                        "workload": workload,
                        "runs": len(own),
                        "injections": sum(o.hits for o in own),
                        "survived": sum(o.hits for o in own if not o.problems),
                        "largest_difference": max(known, default=None),
                        "mean_s": sum(o.duration_s for o in own) / len(own),
                    }
                )
    return rows


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--injections", type=int, default=50, help="over all kinds")
    parser.add_argument(
        "--kinds", default=",".join(KINDS), help="NAME or NAME:NUMBER, comma-separated"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gone", type=float, default=30.0, help="seconds without MLflow server")
    parser.add_argument("--folder", help="kept afterwards; default: a temporary one")
    parser.add_argument("--json", action="store_true", help="print JSON last")
    options = parser.parse_args()
    kinds = options.kinds.split(",")
    unknown = sorted(set(dealt(kinds, 0)) - set(KINDS))
    if unknown:
        parser.error(f"unknown kinds {', '.join(unknown)}; there are {', '.join(KINDS)}")
    os.environ.pop("RAY_ADDRESS", None)
    with tempfile.TemporaryDirectory(prefix="kf") as temporary:
        folder = Path(options.folder or temporary).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        token = folder / "token"  # one for all sessions: a process reads it once
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(token)
        outcomes = run_all(
            kinds, options.injections, seed=options.seed, folder=folder, gone_s=options.gone
        )
    rows = summary(outcomes)
    for row in rows:
        worst = row["largest_difference"]
        told = "–" if worst is None else "none" if worst == 0 else f"{worst:.1e}"
        print(f"{row['kind']:8} {row['workload']:8} {row['survived']} of {row['injections']} "
              f"survived; difference {told}; {row['mean_s']:.1f} s")  # fmt: skip
    total = sum(row["injections"] for row in rows)
    failed = total - sum(row["survived"] for row in rows)
    print(f"{total} injections in {len(outcomes)} runs, {failed} not survived")
    if options.json:
        print(json.dumps({"rows": rows, "outcomes": [asdict(o) for o in outcomes]}))
    return 1 if any(outcome.problems for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
