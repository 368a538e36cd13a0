"""Leases on the cached checkpoints of this node: one locked file per user.

A lock on an open file belongs to the process and vanishes with it, however it dies, in any
container and after any restart; a list of process numbers would lie after a crash.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


def take_lease(folder: Path) -> FileLock:
    """A new lease in ``folder``; call it with the entry's own lock held, as :func:`is_leased`."""
    folder.mkdir(parents=True, exist_ok=True)
    lease = FileLock(folder / f"{os.getpid()}-{uuid.uuid4().hex[:12]}", thread_local=False)
    lease.acquire()
    return lease


def drop_lease(lease: FileLock) -> None:
    """Give a lease back, from any thread."""
    lease.release()
    Path(lease.lock_file).unlink(missing_ok=True)


def is_leased(folder: Path) -> bool:
    """Whether any process holds a lease in ``folder``; files of dead processes are removed."""
    used = False
    for lease in list(folder.iterdir()) if folder.is_dir() else []:
        if is_locked(lease):
            used = True
        else:
            lease.unlink(missing_ok=True)
    return used


def is_locked(path: Path) -> bool:
    """Whether any process, this one included, holds the lock file ``path``."""
    if not path.exists():
        return False
    with try_lock(path) as acquired:
        return not acquired


@contextmanager
def try_lock(path: Path) -> Iterator[bool]:
    """Try to hold the lock file for the block; the value is whether that succeeded."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()
