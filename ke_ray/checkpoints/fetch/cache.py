"""The cache of checkpoints on this node: fetched once, shared, and kept within a byte budget.

The first process that needs a checkpoint fetches it into ``<cache_dir>/entries/<key>``; others on
the node wait for it. It appears there whole, by a rename, or not at all; what a killed fetch left
is resumed. Every user of an entry holds a lease: a lock on a file of its own, which the operating
system takes back when the process dies, however it dies. To make room, the least recently used
entries without lease are removed first; a fetch that does not fit beside entries in use waits until
one is released.

    <cache_dir>/.ke-ray.json       says that the names below are a cache's (``storage.ownership``)
                budget.lock        held to count bytes
                entries/<key>/     the files of a checkpoint
                partial/<key>/     a fetch under way, and how many bytes it will take
                locks/<key>.lock   held by the fetcher
                leases/<key>/*     one locked file for each user
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from filelock import FileLock, Timeout

from ke_ray.checkpoints.fetch.checkpoint import fetch_into, size_to_fetch
from ke_ray.checkpoints.fetch.leases import drop_lease, is_leased, is_locked, take_lease, try_lock
from ke_ray.checkpoints.reference import CheckpointRef
from ke_ray.checkpoints.retries import RetryPolicy
from ke_ray.errors import CheckpointError, StorageError
from ke_ray.secrets import redact
from ke_ray.storage import local_path, slug
from ke_ray.storage.ownership import mark_cache

_LOG = logging.getLogger(__name__)
_FOLDERS = ("entries", "partial", "locks", "leases")
_POLL_S = 0.2
_MARGIN = 64 * 2**20  # bytes of the disk left free


@dataclass(frozen=True)
class FetchEstimate:
    """The network traffic and disk space that a selection of checkpoints needs.

    Attributes:
        num_bytes: to fetch, over the checkpoints whose size is known.
        largest_bytes: of one checkpoint.
        num_to_fetch: checkpoints that are neither local nor in the cache.
        num_unknown: those of them whose source does not tell their size.
    """

    num_bytes: int
    largest_bytes: int
    num_to_fetch: int
    num_unknown: int


def default_cache_dir() -> Path:
    """``$KE_RAY_CACHE``, or ``~/.cache/ke_ray/checkpoints``."""
    folder = os.environ.get("KE_RAY_CACHE")
    return Path(folder) if folder else Path.home() / ".cache" / "ke_ray" / "checkpoints"


class Store:
    """Fetches checkpoints for one process; threads may share it.

    Args:
        cache_dir: on a disk of this node; :func:`default_cache_dir` by default.
        cache_bytes: budget for entries and fetches under way; None leaves the disk as the limit.
        endpoint: of the Hub.
        policy: retries of downloads.
        wait_s: how long a fetch waits for entries in use to be released.
    """

    def __init__(
        self,
        cache_dir: str | os.PathLike[str] | None = None,
        cache_bytes: int | None = None,
        *,
        endpoint: str | None = None,
        policy: RetryPolicy | None = None,
        wait_s: float = 6 * 3600.0,
    ) -> None:
        if cache_bytes is not None and cache_bytes <= 0:
            raise StorageError(f"cache_bytes is {cache_bytes}; it must be a positive number.")
        self._root = (local_path(cache_dir) if cache_dir else default_cache_dir()).absolute()
        self._budget = cache_bytes
        self._endpoint = endpoint
        self._policy = policy or RetryPolicy()
        self._wait_s = wait_s
        self._guard = threading.Lock()
        self._leases: dict[str, list[FileLock]] = {}

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release everything; entries stay in the cache."""
        with self._guard:
            leases_by_key, self._leases = self._leases, {}
        for leases in leases_by_key.values():
            for lease in leases:
                drop_lease(lease)

    def fetch(self, ref: CheckpointRef, *, should_stop: Callable[[], bool] | None = None) -> str:
        """The local folder of a checkpoint, which stays until it is released.

        A local checkpoint is returned where it lies. Each fetch takes one more lease; give it
        back with :meth:`release`, or all with :meth:`close`.

        Args:
            ref: as listed by ``list_checkpoints``.
            should_stop: called while bytes arrive and while waiting for room.

        Raises:
            CheckpointError: the source is gone, incomplete or refuses.
            StorageError: it does not fit the budget or the disk, or nothing can be written.
        """
        if ref.is_local:
            return str(local_path(ref.location))
        key, entry = self._key(ref), self._entry(ref)
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            mark_cache(self._root, "checkpoint cache", (*_FOLDERS, "budget.lock"))
            for name in _FOLDERS:
                (self._root / name).mkdir(parents=True, exist_ok=True)
            with self._entry_lock(key, should_stop):
                lease = take_lease(self._root / "leases" / key)
                try:
                    if not entry.is_dir():
                        self._fetch_entry(ref, key, entry, should_stop)
                    os.utime(entry)
                except BaseException:
                    drop_lease(lease)
                    raise
        except OSError as error:
            raise StorageError(
                f"The checkpoint cache '{self._root}' cannot be written: "
                f"{error.strerror or error}. Choose a --cache-dir with free space that you may "
                "write to."
            ) from error
        with self._guard:
            self._leases.setdefault(key, []).append(lease)
        return str(entry)

    def release(self, ref: CheckpointRef) -> None:
        """Give back one lease of a checkpoint; nothing happens where there is none."""
        with self._guard:
            leases = self._leases.get(self._key(ref), [])
            lease = leases.pop() if leases else None
        if lease is not None:
            drop_lease(lease)

    def is_cached(self, ref: CheckpointRef) -> bool:
        """Whether nothing needs to be fetched."""
        return ref.is_local or self._entry(ref).is_dir()

    def bytes_to_fetch(self, refs: Iterable[CheckpointRef]) -> FetchEstimate:
        """The cost of fetching ``refs``; servers are asked only for sizes that are missing."""
        absent = [ref for ref in refs if not self.is_cached(ref)]
        with ThreadPoolExecutor(8, thread_name_prefix="ke_ray-size") as pool:
            sizes = list(pool.map(lambda ref: size_to_fetch(ref, self._endpoint), absent))
        known_sizes = [size for size in sizes if size is not None]
        return FetchEstimate(
            sum(known_sizes),
            max(known_sizes, default=0),
            len(absent),
            len(sizes) - len(known_sizes),
        )

    def used_bytes(self) -> int:
        """Bytes of entries and partial fetches on the disk."""
        with self._budget_lock():
            return sum(_tree_bytes(self._root / name) for name in ("entries", "partial"))

    def _budget_lock(self) -> FileLock:
        """Held to count bytes, and for whatever moves counted bytes: evicting, and finishing."""
        return FileLock(self._root / "budget.lock")

    def _key(self, ref: CheckpointRef) -> str:
        location = redact(ref.location).rstrip("/")
        identity = "\0".join((location, ref.commit or ref.revision or ""))
        return f"{slug(ref.name)[:60]}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"

    def _entry(self, ref: CheckpointRef) -> Path:
        return self._root / "entries" / self._key(ref)

    @contextmanager
    def _entry_lock(self, key: str, should_stop: Callable[[], bool] | None) -> Iterator[None]:
        lock = FileLock(self._root / "locks" / f"{key}.lock")
        while not lock.is_locked:
            if should_stop is not None and should_stop():
                raise CheckpointError(
                    f"Stopped while waiting for '{key}', which another process is fetching."
                )
            with suppress(Timeout):
                lock.acquire(timeout=1.0)
        try:
            yield
        finally:
            lock.release()

    def _fetch_entry(
        self,
        ref: CheckpointRef,
        key: str,
        entry: Path,
        should_stop: Callable[[], bool] | None,
    ) -> None:
        partial = self._root / "partial" / key
        size = size_to_fetch(ref, self._endpoint)
        # Where the source does not tell or is too busy: the checkpoints of a series are alike.
        need = self._largest_entry() if size is None else size
        self._make_room(key, need, ref.label, should_stop)
        try:
            fetch_into(
                ref,
                partial,
                endpoint=self._endpoint,
                policy=self._policy,
                should_stop=should_stop,
                max_bytes=size or self._budget,  # a server may state 0 for what it does not know
            )
            with self._budget_lock():  # else a count could see it in neither place
                partial.rename(entry)
        finally:
            self._reservation(key).unlink(missing_ok=True)
        _LOG.info("Fetched %s (%d bytes)", ref.label, _tree_bytes(entry))
        if size is None:  # the budget is kept after the fact
            self._make_room(None, 0, ref.label, should_stop)

    def _largest_entry(self) -> int:
        entries = (self._root / "entries").iterdir()
        largest = max((_tree_bytes(entry) for entry in entries), default=0)
        return largest if self._budget is None else min(largest, self._budget)

    def _reservation(self, key: str) -> Path:
        return self._root / "partial" / f"{key}.bytes"

    def _make_room(
        self, key: str | None, need: int, label: str, should_stop: Callable[[], bool] | None
    ) -> None:
        """Evict until ``need`` more bytes fit, and reserve them for the entry ``key``."""
        if self._budget is not None and need > self._budget:
            raise StorageError(
                f"'{label}' needs {need:,} bytes, more than the whole cache budget of "
                f"{self._budget:,}; raise --cache-bytes."
            )
        deadline = time.monotonic() + self._wait_s
        while True:
            with self._budget_lock():
                missing = self._missing(key, need)
                in_use = missing > 0 and self._evict(missing, key)
                missing = self._missing(key, need) if missing > 0 else missing
                if missing <= 0:
                    if key is not None:
                        (self._root / "partial" / key).mkdir(exist_ok=True)
                        self._reservation(key).write_text(str(need))
                    return
            if key is None:
                return
            if not in_use:
                raise StorageError(
                    f"The disk of the cache '{self._root}' has too little space for '{label}' "
                    f"({need:,} bytes, {missing:,} missing); free some or choose another "
                    "--cache-dir."
                )
            if should_stop is not None and should_stop():
                raise CheckpointError(f"Fetching '{label}' was stopped while waiting for room.")
            if time.monotonic() > deadline:
                raise StorageError(
                    f"No room for '{label}' ({need:,} bytes) within {self._wait_s:,.0f} s: the "
                    f"cache '{self._root}' is full of checkpoints in use; raise --cache-bytes."
                )
            time.sleep(_POLL_S)

    def _missing(self, key: str | None, need: int) -> int:
        """Bytes to free before ``need`` fit the budget and the disk; <= 0 when they do."""
        entries = _tree_bytes(self._root / "entries")
        others = growth = 0
        for partial in (self._root / "partial").iterdir():
            name = partial.name.removesuffix(".bytes")
            if not partial.is_dir() or name == key:
                continue
            present = _tree_bytes(partial)
            planned = _read_int(self._reservation(name)) if self._is_fetching(name) else 0
            others += max(present, planned)
            growth += max(0, planned - present)
        present = _tree_bytes(self._root / "partial" / key) if key is not None else 0
        disk = shutil.disk_usage(self._root).free - _MARGIN - growth
        over_disk = max(0, need - present) - disk if need else 0
        if self._budget is None:
            return over_disk
        return max(over_disk, entries + others + max(need, present) - self._budget)

    def _is_fetching(self, key: str) -> bool:
        return is_locked(self._root / "locks" / f"{key}.lock")

    def _evict(self, num_bytes: int, keep: str | None) -> bool:
        """Free ``num_bytes``, least recently used first; whether something is still in use.

        Abandoned fetches go first. Each victim's own lock is held while its leases are looked at
        and it is renamed away, so that nobody can take a lease in between.
        """
        freed, in_use = 0, False
        partial = [path for path in (self._root / "partial").iterdir() if path.is_dir()]
        entries = list((self._root / "entries").iterdir())
        for path in sorted(partial, key=_mtime) + sorted(entries, key=_mtime):
            if path.name == keep:
                continue
            with try_lock(self._root / "locks" / f"{path.name}.lock") as acquired:
                if not acquired or is_leased(self._root / "leases" / path.name):
                    in_use = True
                elif freed < num_bytes:
                    freed += _discard(path)
        return in_use


def _discard(path: Path) -> int:
    """Remove an entry; readers that mapped its files keep them until they are done."""
    size = _tree_bytes(path)
    removed = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.gone")
    try:
        path.rename(removed)
    except FileNotFoundError:
        return 0
    shutil.rmtree(removed, ignore_errors=True)
    return size


def _tree_bytes(path: Path) -> int:
    total = 0
    for folder, _, files in os.walk(path):
        for name in files:
            try:
                status = Path(folder, name).stat()
            except FileNotFoundError:
                continue  # removed or renamed meanwhile
            # An incomplete file has its full size from the start, and holes.
            has_holes = name.endswith(".incomplete")
            allocated = min(status.st_size, status.st_blocks * 512)
            total += allocated if has_holes else status.st_size
    return total


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _read_int(path: Path) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return 0
