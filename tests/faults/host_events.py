"""What happens to hosts, their wires and servers: each event holds for the time of a block.

An event is a context manager over a bed of hosts; it yields what it does, in words. Events that a
command cannot be untouched by count as met while one is under way; errors of servers count when a
request was struck.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from host_bed import CACHE, CPUS, WORKER_HOSTS, Bed

_HOSTS = ("h1", *WORKER_HOSTS, "store", "mlflow")
_REQUESTS = ("GET", "PUT", "HEAD", "LIST", "POST", "DELETE")


@dataclass(frozen=True)
class Event:
    """A kind of event.

    Attributes:
        make: over a bed, with the draws of a seed.
        seconds: shortest and longest time that it holds.
        server: whose relay counts what it strikes; None: it strikes whatever is under way.
    """

    make: Callable[[Bed, random.Random], AbstractContextManager[str]]
    seconds: tuple[float, float]
    server: str | None = None


@contextmanager
def power(bed: Bed, rng: random.Random) -> Iterator[str]:
    """A worker's host loses power, and comes back."""
    name = rng.choice(WORKER_HOSTS)
    bed.lab.kill(name)
    yield name
    bed.lab.boot(name)
    bed.cluster.join(name, f"--num-cpus={CPUS}")


@contextmanager
def head(bed: Bed, rng: random.Random) -> Iterator[str]:
    """The head's host loses power, the command's driver with it; a new cluster takes its place."""
    bed.lab.kill("h1")
    yield "h1"
    bed.heal()


@contextmanager
def driver(bed: Bed, rng: random.Random) -> Iterator[str]:
    """The command is killed while its workers live."""
    bed.driver.kill()
    yield "the command"


@contextmanager
def cut(bed: Bed, rng: random.Random) -> Iterator[str]:
    """A host's cable is out."""
    name = rng.choice(_HOSTS)
    bed.lab.cut(name)
    yield name
    bed.lab.mend(name)


@contextmanager
def one_way(bed: Bed, rng: random.Random) -> Iterator[str]:
    """What one host sends to another is lost."""
    sender, receiver = rng.sample(_HOSTS, 2)
    bed.lab.part(sender, receiver)
    yield f"{sender} to {receiver}"
    bed.lab.rejoin(sender, receiver)


@contextmanager
def partial(bed: Bed, rng: random.Random) -> Iterator[str]:
    """Two hosts do not reach each other, and both reach the others."""
    pair = rng.sample(_HOSTS, 2)
    for sender, receiver in (pair, pair[::-1]):
        bed.lab.part(sender, receiver)
    yield " and ".join(pair)
    for sender, receiver in (pair, pair[::-1]):
        bed.lab.rejoin(sender, receiver)


@contextmanager
def slow(bed: Bed, rng: random.Random) -> Iterator[str]:
    """A host's wire carries 1 Mbit/s."""
    name = rng.choice(_HOSTS)
    bed.lab.rate(name, "1mbit")
    yield name
    bed.lab.rate(name, None)


@contextmanager
def disk(bed: Bed, rng: random.Random) -> Iterator[str]:
    """The disk on which a worker's host caches checkpoints has room for none, or for one or two."""
    host = bed.lab.hosts[rng.choice(WORKER_HOSTS)]
    size = f"size={rng.choice((32, 64, 128))}k"
    host.run("mkdir", "-p", CACHE)
    host.run("mount", "-t", "tmpfs", "-o", size, "tmpfs", CACHE)
    yield f"{host.name}, {size}"
    host.run("umount", "--lazy", CACHE)


def _server(name: str, fault: str, *requests: str) -> Event:
    @contextmanager
    def make(bed: Bed, rng: random.Random) -> Iterator[str]:
        kinds = list(requests) or rng.sample(_REQUESTS, rng.randint(1, len(_REQUESTS)))
        share = rng.choice((0.2, 0.5, 1.0))
        rule = {"fault": fault, "requests": kinds, "share": share, "stall_s": 15}
        bed.set_faults(name, [rule])
        yield f"{share:.0%} of {'/'.join(kinds)}"
        bed.set_faults(name, [])

    return Event(make, (2.0, 30.0), name)


EVENTS: dict[str, Event] = {
    "power": Event(power, (1.0, 30.0)),
    "head": Event(head, (1.0, 10.0)),
    "driver": Event(driver, (0.0, 1.0)),
    "cut": Event(cut, (10.0, 120.0)),
    "one-way": Event(one_way, (5.0, 60.0)),
    "partial": Event(partial, (5.0, 60.0)),
    "slow": Event(slow, (5.0, 60.0)),
    "disk": Event(disk, (5.0, 30.0)),
    **{f"store-{f}": _server("store", f) for f in ("403", "500", "503", "reset", "stall")},
    "store-404": _server("store", "404", "GET", "HEAD"),
    "store-half": _server("store", "half", "GET", "LIST"),
    **{f"mlflow-{f}": _server("mlflow", f) for f in ("403", "404", "500", "503", "reset")},
    "mlflow-half": _server("mlflow", "half", "GET", "POST"),
    "mlflow-stall": _server("mlflow", "stall"),
}
