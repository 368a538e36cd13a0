"""Who on this node uses a cached checkpoint: one locked file for each user.

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
    """Whether anybody holds a lease in ``folder``; files of the dead are removed."""
    used = False
    for lease in list(folder.iterdir()) if folder.is_dir() else []:
        if is_locked(lease):
            used = True
        else:
            lease.unlink(missing_ok=True)
    return used


def is_locked(path: Path) -> bool:
    """Whether anybody, this process included, holds the lock file ``path``."""
    if not path.exists():
        return False
    with try_lock(path) as mine:
        return not mine


@contextmanager
def try_lock(path: Path) -> Iterator[bool]:
    """Hold the lock file for the block if nobody else does; the value says whether it is held."""
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
