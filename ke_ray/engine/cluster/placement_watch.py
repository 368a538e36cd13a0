"""A watch over work that waits for a node of a cluster, so that nothing waits in silence.

Scorers, Ray Train's worker groups and Ray Tune's trials are actors and placement groups of this
command's Ray job; Ray's control store says which of them have no node yet. What is requested and
what the nodes have is logged at once where no node can hold it, else after ``limit_s``, and then
every ``limit_s``. Where nothing of the job runs, no node can hold what waits and nothing adds
nodes, the work ends with a :class:`PlacementError`.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from ke_ray.engine.cluster.placement import (
    Node,
    actors_of_job,
    cluster_nodes,
    describe_nodes,
    describe_resources,
    in_driver,
    may_grow,
)
from ke_ray.errors import ConfigError, PlacementError

log = logging.getLogger(__name__)

#: Seconds after which a wait is logged.
WAIT_VARIABLE = "KE_RAY_PLACEMENT_WAIT_S"
_DEFAULT_WAIT_S = 120.0
_POLL_S = 5.0
#: Ends the main thread's wait, in Ray's own code too; SIGINT and SIGTERM mean something to Ray.
_SIGNAL = signal.SIGUSR2


@contextmanager
def watch_placement(num_optional: int = 0) -> Iterator[None]:
    """Say what the block waits for, and end it where it would wait for ever.

    Needs a Ray session. In a worker process it does nothing: the driver's watch sees all that its
    job waits for.

    Args:
        num_optional: actors and groups that may wait without a word while others run.

    Raises:
        PlacementError: no node can hold what the block waits for, and none will come.
        ConfigError: ``KE_RAY_PLACEMENT_WAIT_S`` is not a number of seconds.
    """
    if not in_driver():
        yield
        return
    is_main = threading.current_thread() is threading.main_thread()
    watch = _Watch(_limit_s(), num_optional, can_end=is_main)
    thread = threading.Thread(target=watch.run, name="placement-watch", daemon=True)
    kept = signal.signal(_SIGNAL, _interrupt) if is_main else None
    thread.start()
    try:
        try:
            yield
        finally:
            watch.done.set()
            thread.join()
    except BaseException as error:
        if watch.verdict is None:
            raise
        raise PlacementError(watch.verdict) from error
    finally:
        if is_main:
            signal.signal(_SIGNAL, kept)
    if watch.verdict is not None:  # Ray took the interrupt for one of its own
        raise PlacementError(watch.verdict)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _limit_s() -> float:
    value = os.environ.get(WAIT_VARIABLE, _DEFAULT_WAIT_S)
    try:
        limit_s = float(value)
    except ValueError:
        limit_s = 0.0
    if not limit_s > 0:
        raise ConfigError(f"{WAIT_VARIABLE} is '{value}'; give a number of seconds above 0.")
    return limit_s


@dataclass(frozen=True)
class _Demand:
    """What the job waits for: groups of bundles, each to be placed whole; whether any work runs."""

    groups: tuple[tuple[tuple[tuple[str, float], ...], ...], ...]
    is_running: bool

    def fits(self, nodes: Sequence[Node]) -> bool:
        """Whether each group alone fits on empty nodes."""
        return all(_fit([dict(bundle) for bundle in group], nodes) for group in self.groups)

    def __str__(self) -> str:
        counts = Counter(describe_resources(dict(b)) for group in self.groups for b in group)
        return ", ".join(f"{number} × ({text})" for text, number in counts.items())


class _Watch:
    """State of one watch, which runs on a thread."""

    def __init__(self, limit_s: float, num_optional: int, *, can_end: bool) -> None:
        self.done = threading.Event()
        self.verdict: str | None = None
        self._can_end = can_end
        self._num_optional = num_optional
        self._limit_s = limit_s
        self._waiting_since = self._last_seen = self._last_logged = -math.inf
        self._impossible_since = math.inf

    def run(self) -> None:
        """Look every few seconds until ``done``."""
        while not self.done.wait(min(_POLL_S, self._limit_s / 4)):
            try:
                demand = _demand_of_job()
                if len(demand.groups) > (self._num_optional if demand.is_running else 0):
                    self._look(demand, cluster_nodes(), time.monotonic())
            except Exception:  # a control store that is away for a moment must not end the watch
                log.debug("Could not see what waits for a node", exc_info=True)

    def _look(self, demand: _Demand, nodes: Sequence[Node], now: float) -> None:
        if now - self._last_seen > 3 * _POLL_S:  # Ray Train's wait goes on when it asks anew
            self._waiting_since = self._last_logged = now
            self._impossible_since = math.inf
        self._last_seen = now
        is_possible = demand.fits(nodes)
        is_news = not is_possible and self._impossible_since == math.inf
        self._impossible_since = math.inf if is_possible else min(self._impossible_since, now)
        has_end = self._can_end and not (is_possible or demand.is_running or may_grow())
        ends_in_s = self._impossible_since + self._limit_s - now if has_end else None
        if ends_in_s is not None and ends_in_s <= 0:
            self._end(demand, nodes)
        elif is_news or now - self._last_logged >= self._limit_s:
            self._last_logged = now
            log.warning(
                "Waiting for a place (%.0f s so far): %s requested, the cluster has %s. %s",
                *(now - self._waiting_since, demand, describe_nodes(nodes)),
                _outlook(demand, is_possible, ends_in_s),
            )

    def _end(self, demand: _Demand, nodes: Sequence[Node]) -> None:
        self.verdict = (
            f"No node of the cluster can hold what the work needs: {demand} requested, the "
            f"cluster has {describe_nodes(nodes)}. Finished work is saved. Add nodes or request "
            "less, and run the same command again to resume."
        )
        self.done.set()
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, _SIGNAL)


def _outlook(demand: _Demand, is_possible: bool, ends_in_s: float | None) -> str:
    if is_possible:
        return f"Free in all: {_free()}; it starts when other work releases what it holds."
    if ends_in_s is not None:
        return f"No node can hold it; this ends in {ends_in_s:.0f} s unless one joins that can."
    if demand.is_running:
        return "No node can hold it; the work that runs already continues without it."
    return "No node can hold it; it starts when a node joins that can."


def _free() -> str:
    import ray

    return describe_resources(ray.available_resources())


def _fit(bundles: Sequence[dict[str, float]], nodes: Sequence[Node]) -> bool:
    """Whether the bundles fit on empty nodes, the largest placed first."""
    remaining = [dict(node) for node in nodes]
    for bundle in sorted(bundles, key=lambda b: (b.get("GPU", 0), b.get("CPU", 0)), reverse=True):
        for node in remaining:
            if all(node.get(name, 0) >= amount for name, amount in bundle.items()):
                for name, amount in bundle.items():
                    node[name] -= amount
                break
        else:
            return False
    return True


def _demand_of_job() -> _Demand:
    """What actors and placement groups of this job wait for."""
    import ray
    from ray._private.state import state
    from ray.core.generated import gcs_pb2

    store = state._connect_and_get_accessor()
    job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
    groups: list[tuple[tuple[tuple[str, float], ...], ...]] = []
    is_running = False
    for actor in actors_of_job():
        needs = _counted(actor.required_resources)
        if not needs or actor.placement_group_id or actor.state == actor.DEAD:
            continue  # needs no place, or has that of its group
        # A pending actor has the node that its request waits on; a worker process only once placed.
        if actor.state == actor.ALIVE or actor.address.worker_id:
            is_running = True
        else:
            groups.append((needs,))
    for raw in store.get_placement_group_table():
        group = gcs_pb2.PlacementGroupTableData.FromString(raw)
        bundles = tuple(_counted(bundle.unit_resources) for bundle in group.bundles)
        if group.creator_job_id != job.binary() or not any(bundles):
            continue
        if group.state == group.CREATED:
            is_running = True
        elif group.state != group.REMOVED:
            groups.append(bundles)
    return _Demand(tuple(groups), is_running)


def _counted(resources: Node) -> tuple[tuple[str, float], ...]:
    return tuple(sorted((k, v) for k, v in resources.items() if k in ("CPU", "GPU") and v))
