"""Locks that let one command at a time write a folder, on any storage.

On this machine's disks, and on network file systems that support locks (NFS does), it is the
kernel's lock on a file, which ends with the process that holds it. On object stores, and on file
systems without locks, the same file is a *lease*: made, renewed every ``HEARTBEAT_S`` seconds and
taken over with conditional writes, and void ``EXPIRES_S`` seconds after the last renewal. Both name
the process and host that write, and since when; both are removed when the command ends.
"""

from __future__ import annotations

import datetime
import fcntl
import json
import logging
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from ke_ray import storage
from ke_ray.errors import ResultsError, StorageError

HEARTBEAT_S, EXPIRES_S = 15.0, 60.0
# Stores without conditional writes let two commands write a lease at once: the later one stays.
_SETTLE_S = 1.0
_JOIN_S = 5.0  # for a renewal that is under way when the command ends
# Who looks at a lock (``current_writer``) shares it for an instant, which is no reason to refuse.
_LOCK_ATTEMPTS, _LOCK_RETRY_S = 3, 0.05

log = logging.getLogger(__name__)
_tokens: dict[str, str] = {}  # of the leases that this process holds
_held: ContextVar[frozenset[str]] = ContextVar("locks that this command holds", default=frozenset())


def is_held(lock: str) -> bool:
    """Whether this command (this thread of control) holds ``sole_writer(lock, …)``."""
    return storage.absolute(lock) in _held.get()


def confirm_lease(lock: str, target: str) -> None:
    """Ask the store whether this process still has its lease, before what cannot be undone.

    Raises:
        ResultsError: another command has taken it over. (The kernel's locks cannot be.)
    """
    token = _tokens.get(storage.absolute(lock))
    if token is None:
        return
    owner = _owner_in(_read(lock), lock)
    if owner.get("token") != token:
        raise ResultsError(
            f"Another ke-ray command took over '{target}' while this one stood still; nothing more "
            "is written. Run the same command again once that one has ended."
        )


@contextmanager
def sole_writer(lock: str, target: str) -> Iterator[None]:
    """Hold a lock for the block; the lock is re-entrant.

    A lease that another command took over, which can happen to one that was suspended for longer
    than ``EXPIRES_S``, interrupts this command as Ctrl-C does.

    Args:
        lock: URI of the lock file; its folder is made where there is none.
        target: what is written, for the message.

    Raises:
        ResultsError: another command holds it, or ``lock`` is another file.
        StorageError: the folder cannot be written.
    """
    if is_held(lock):
        yield
        return
    descriptor = _lock_file(lock, target) if storage.is_local(lock) else None
    manager = _lease(lock, target) if descriptor is None else _locked(lock, descriptor)
    with manager:
        token = _held.set(_held.get() | {storage.absolute(lock)})
        try:
            yield
        finally:
            _held.reset(token)


@dataclass(frozen=True)
class Writer:
    """The command that a lock file names.

    Attributes:
        is_alive: whether it holds the lock, or renewed its lease within ``EXPIRES_S``; None where
            that cannot be found out from here.
        renewed_s: seconds since it renewed its lease; None where the kernel locks.
    """

    host: str
    pid: int | None
    since: str
    is_alive: bool | None
    renewed_s: float | None = None


def current_writer(lock: str) -> Writer | None:
    """Who holds a lock, or did when it was killed; nothing is written or kept.

    Returns:
        None where there is no lock file of ke_ray.
    """
    is_locked: bool | None = None
    if storage.is_local(lock):
        try:
            descriptor = os.open(storage.local_path(lock), os.O_RDONLY | os.O_NONBLOCK)
        except OSError as error:
            missing = isinstance(error, FileNotFoundError | NotADirectoryError)
            return None if missing else Writer("", None, "", None)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            is_locked = False
        except BlockingIOError:
            is_locked = True
        except OSError as error:
            log.debug("a file system without locks: %s", error)
        try:
            text = os.read(descriptor, 4096)
        except OSError:  # a folder
            text = b"-"
        finally:
            os.close(descriptor)
    else:
        try:
            text = storage.read_bytes(lock)
        except FileNotFoundError:
            return None
    owner = _parsed(text) if text else {}  # empty: it has just been locked
    if owner is None:
        return None
    renewed_s = max(0.0, _silent_s(owner)) if "renewed_at" in owner else None
    pid = owner.get("pid")
    return Writer(
        host=str(owner.get("host", "")),
        pid=pid if isinstance(pid, int) else None,
        since=str(owner.get("since", "")),
        is_alive=is_locked if renewed_s is None else renewed_s < EXPIRES_S,
        renewed_s=renewed_s,
    )


def _owner() -> dict[str, Any]:
    since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"ke_ray": "lock", "host": socket.gethostname(), "pid": os.getpid(), "since": since}


def _lock_file(lock: str, target: str) -> int | None:
    """An open descriptor with the kernel's lock; None where the file system has no locks."""
    path = storage.local_path(lock)
    while True:
        storage.make_dirs(path.parent)
        try:
            with storage.explained(lock, "lock"):
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:
            continue  # another command has just removed the folder
        try:
            locked = _flock(descriptor)
            before = os.pread(descriptor, 4096, 0)
            if before and _parsed(before) is None:
                raise _not_a_lock(lock)
            if locked is False:
                raise _refusal(target, _parsed(before) or {})
            if locked is None:
                if not before:  # else it is a lease
                    path.unlink(missing_ok=True)
                os.close(descriptor)
                return None
            # Its last holder may have removed the file between our opening and locking it.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    with storage.explained(lock, "lock"):
                        os.ftruncate(descriptor, 0)
                        os.pwrite(descriptor, json.dumps(_owner()).encode(), 0)
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _flock(descriptor: int) -> bool | None:
    """Whether the kernel gave us the lock; None where the file system has none."""
    for attempt in range(_LOCK_ATTEMPTS):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_LOCK_RETRY_S if attempt + 1 < _LOCK_ATTEMPTS else 0.0)
        except OSError as error:
            log.debug("a file system without locks: %s", error)
            return None
        else:
            return True
    return False


@contextmanager
def _locked(lock: str, descriptor: int) -> Iterator[None]:
    try:
        yield
    finally:
        with suppress(OSError):
            storage.local_path(lock).unlink()
        os.close(descriptor)


@contextmanager
def _lease(lock: str, target: str) -> Iterator[None]:
    mine = {**_owner(), "token": secrets.token_hex(16)}
    _take_lease(lock, target, mine)
    _tokens[storage.absolute(lock)] = mine["token"]
    ended = threading.Event()
    thread = threading.Thread(
        target=_renew, args=(lock, target, mine, ended), name="ke_ray-lease", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=_JOIN_S)
        del _tokens[storage.absolute(lock)]
        try:
            if not thread.is_alive() and _owner_in(_read(lock), lock).get("token") == mine["token"]:
                storage.remove(lock)
        except StorageError as error:  # it expires by itself, and must not hide why this ends
            log.warning("The lease on '%s' was not given back: %s", target, error)


def _take_lease(lock: str, target: str, mine: dict[str, Any]) -> None:
    before = _read(lock)
    if before is not None:
        if _silent_s(_owner_in(before, lock)) < EXPIRES_S:
            raise _refusal(target, _owner_in(before, lock))
        # Clocks may differ: see whether the lease is still renewed.
        time.sleep(1.5 * HEARTBEAT_S)
    now = _read(lock) if before is not None else None
    if now is not None and now != before:
        raise _refusal(target, _owner_in(now, lock))
    renewed = _renewed(mine)
    taken = storage.create(lock, renewed) if now is None else storage.replace(lock, renewed, now)
    if taken:
        time.sleep(0.0 if lock.startswith("memory://") else _SETTLE_S)
    owner = _owner_in(_read(lock), lock)
    if owner.get("token") != mine["token"]:
        raise _refusal(target, owner)


def _renew(lock: str, target: str, mine: dict[str, Any], ended: threading.Event) -> None:
    while not ended.wait(HEARTBEAT_S):
        try:
            text, renewed = _read(lock), _renewed(mine)
            if text is None:
                kept = storage.create(lock, renewed)
            else:
                is_mine = _owner_in(text, lock).get("token") == mine["token"]
                kept = is_mine and storage.replace(lock, renewed, text)
            if not kept:
                log.error(
                    "Another ke-ray command took over '%s' while this one stood still.", target
                )
                os.kill(os.getpid(), signal.SIGINT)  # wakes the main thread wherever it waits
                return
        except Exception as error:  # each driver has its own kinds; the next beat tries again
            log.warning("The lease on '%s' could not be renewed: %s", target, error)


def _renewed(owner: dict[str, Any]) -> bytes:
    return json.dumps({**owner, "renewed_at": time.time()}).encode()


def _silent_s(owner: dict[str, Any]) -> float:
    renewed_at = owner.get("renewed_at")
    return time.time() - renewed_at if isinstance(renewed_at, int | float) else 0.0


def _read(lock: str) -> bytes | None:
    try:
        return storage.read_bytes(lock)
    except FileNotFoundError:
        return None


def _owner_in(text: bytes | None, lock: str) -> dict[str, Any]:
    """Who holds a lease; empty where there is none."""
    owner = {} if text is None else _parsed(text)
    if owner is None:
        raise _not_a_lock(lock)
    return owner


def _parsed(text: bytes) -> dict[str, Any] | None:
    """The contents of a lock file; None where it is not ke_ray's."""
    try:
        owner = json.loads(text)
    except ValueError:
        return None
    return owner if isinstance(owner, dict) and owner.get("ke_ray") == "lock" else None


def _not_a_lock(lock: str) -> ResultsError:
    return ResultsError(
        f"'{lock}' is not a lock file of ke-ray, but ke-ray needs that name for its lock; move it, "
        "or give another output folder."
    )


def _refusal(target: str, owner: dict[str, Any]) -> ResultsError:
    description = (
        f"process {owner['pid']} on {owner['host']}, since {owner['since']}"
        if {"pid", "host", "since"} <= set(owner)
        else "it has just started"
    )
    expiry = ""
    if "renewed_at" in owner:
        expiry = (
            f" It renewed its lease {max(0.0, _silent_s(owner)):.0f} s ago; if it was killed, the "
            f"lease expires after {EXPIRES_S:.0f} s."
        )
    return ResultsError(
        f"Another ke-ray command is writing '{target}' ({description}); wait for it, or give "
        f"another output.{expiry}"
    )
