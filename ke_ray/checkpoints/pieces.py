"""Files that arrive in pieces, over several connections, each piece resumed where it stopped.

The pieces go to their places in ``<name>.incomplete``, which has the file's size from the start.
``<name>.incomplete.json`` beside it says which version of the file it is and how far each piece has
come; after a kill only what arrived since the last note is fetched again, at most a hundredth of
the file or ``_NOTE_EVERY_BYTES``, and what the connections had not yet handed over.

SHA-256 takes bytes in their order, in which pieces do not arrive. The calling thread computes it
piece by piece from the pages just written, while later pieces are still under way.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ke_ray.checkpoints.retries import ChangedError, Retries, RetryPolicy, TransferError

_LOG = logging.getLogger(__name__)
#: The first piece is small: with it comes what the others need to know.
FIRST_PIECE_BYTES = 8 * 2**20
_MAX_PIECE_BYTES = 64 * 2**20
_NOTE_EVERY_BYTES = 4 * 2**20
CONNECTIONS = 8  # for each file
FILES_AT_ONCE = 4
_PROCESS_CONNECTIONS = threading.BoundedSemaphore(16)
_BOOT = Path("/proc/sys/kernel/random/boot_id")

#: Yields the bytes of a file from ``start`` to before ``stop``; where it ends early it is called
#: again for the rest.
Reader = Callable[[int, int], Generator[bytes]]


@dataclass(frozen=True)
class Version:
    """What tells a file at its source from a later one under the same name.

    ``tag`` is empty where the source does not say; such a file is not resumed by another process.
    """

    size_bytes: int
    tag: str


@dataclass
class _Piece:
    start: int
    position: int  # of the first byte that has not arrived
    stop: int


def fetch_pieces(
    version: Version,
    read: Reader,
    partial: Path,
    *,
    policy: RetryPolicy,
    should_stop: Callable[[], bool] | None = None,
    connections: int = CONNECTIONS,
    hashed: bool = False,
) -> str | None:
    """Fetch a file to ``partial``, going on from what is noted beside it.

    Args:
        version: of the file at its source.
        read: called by several threads at once.
        policy: for each piece.
        should_stop: called by those threads while bytes arrive.
        connections: pieces under way at once.
        hashed: whether the sha256 is wanted.

    Returns:
        The sha256, where it is wanted.

    Raises:
        TransferError: a piece could not be fetched, ``should_stop`` ended it, or
            (``ChangedError``) the file is another one by now.
        OSError: the local disk refused.
    """
    progress = _Progress(partial, version)
    stopped = threading.Event()
    stop = either(stopped.is_set, should_stop)

    def call_for(piece: _Piece) -> Callable[[], None]:
        return lambda: _fetch_piece(piece, read, progress, Retries(policy, stopped), stop)

    calls = [call_for(piece) for piece in progress.pieces]
    digest = hashlib.sha256()
    try:
        with closing(run_in_order(calls, connections, stopped)) as finished:
            for piece, _ in zip(progress.pieces, finished, strict=True):
                for chunk in progress.read_back(piece) if hashed else ():
                    digest.update(chunk)
    finally:
        progress.close()
    return digest.hexdigest() if hashed else None


def run_in_order(
    calls: Iterable[Callable[[], None]], at_once: int, stopped: threading.Event
) -> Generator[None]:
    """Make calls on a few threads; yields when the first has ended, the second, …

    The first to fail sets ``stopped``, which the others are to heed, and its error is raised.
    """
    failures: list[BaseException] = []

    def run(call: Callable[[], None]) -> None:
        try:
            call()
        except BaseException as error:
            if not stopped.is_set():
                failures.append(error)
            stopped.set()
            raise

    pool = ThreadPoolExecutor(at_once, thread_name_prefix="ke_ray-fetch")
    try:
        for task in [pool.submit(run, call) for call in calls]:
            task.result()
            yield
    except Exception as error:
        if failures and failures[0] is not error:
            raise failures[0] from None
        raise
    finally:
        stopped.set()
        pool.shutdown(cancel_futures=True)


def either(one: Callable[[], bool], other: Callable[[], bool] | None) -> Callable[[], bool]:
    """Whether one of two reasons to stop holds."""
    return one if other is None else lambda: one() or other()


def _fetch_piece(
    piece: _Piece,
    read: Reader,
    progress: _Progress,
    retries: Retries,
    should_stop: Callable[[], bool],
) -> None:
    while piece.position < piece.stop:
        before = piece.position
        try:
            if should_stop():
                raise TransferError("the caller stopped it", final=True)
            with _PROCESS_CONNECTIONS, closing(read(piece.position, piece.stop)) as chunks:
                for chunk in chunks:
                    progress.write(piece, chunk)
                    if should_stop():
                        raise TransferError("the caller stopped it", final=True)
            if piece.position < piece.stop:
                raise TransferError(
                    f"the connection ended after {piece.position:,} of {piece.stop:,} bytes"
                )
        except ChangedError:
            raise
        except TransferError as error:
            _LOG.info("Bytes %d to %d: %s", piece.start, piece.stop, error)
            progressed = piece.position > before
            if not retries.wait(error.after_s, progressed=progressed, final=error.final):
                error.attempts = retries.failures
                raise


class _Progress:
    """The incomplete file and the note on it; safe to be killed at any moment."""

    def __init__(self, partial: Path, version: Version) -> None:
        self._note = _note_path(partial)
        self._version = version
        self._lock = threading.Lock()
        self._unnoted = 0
        self.pieces = _noted_pieces(partial, version) or _cut(version.size_bytes)
        is_new = all(piece.position == piece.start for piece in self.pieces)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | (os.O_TRUNC if is_new else 0)
        self._descriptor = os.open(partial, flags, 0o666)
        if is_new:
            self._note.unlink(missing_ok=True)  # until the file has its size
            os.ftruncate(self._descriptor, version.size_bytes)
        self._write_note()

    def write(self, piece: _Piece, chunk: bytes) -> None:
        """Put the next bytes of a piece in their place."""
        written = 0
        while written < len(chunk):
            rest = memoryview(chunk)[written:]
            written += os.pwrite(self._descriptor, rest, piece.position + written)
        with self._lock:
            piece.position += len(chunk)
            self._unnoted += len(chunk)
            if self._unnoted >= min(_NOTE_EVERY_BYTES, self._version.size_bytes // 100):
                self._write_note()

    def read_back(self, piece: _Piece) -> Generator[bytes]:
        """The bytes of a piece that has arrived."""
        for start in range(piece.start, piece.stop, 2**20):
            yield os.pread(self._descriptor, min(2**20, piece.stop - start), start)

    def close(self) -> None:
        with suppress(OSError):  # a full disk has its own message
            self._write_note()
        os.close(self._descriptor)

    def _write_note(self) -> None:
        self._unnoted = 0
        note = {**asdict(self._version), "boot": _boot()}
        note["pieces"] = [(piece.start, piece.position, piece.stop) for piece in self.pieces]
        temporary = self._note.with_name(f"{self._note.name}.new")
        temporary.write_text(json.dumps(note))
        os.replace(temporary, self._note)


def noted_version(partial: Path) -> Version | None:
    """The version of which a part has arrived and can be gone on with."""
    note = _read_note(partial)
    return Version(note["size_bytes"], note["tag"]) if note else None


def arrived_bytes(partial: Path) -> int:
    """Bytes of an incomplete file that have arrived, as noted."""
    note = _read_note(partial)
    if note is None:
        return partial.stat().st_size if partial.exists() else 0
    return sum(position - start for start, position, _ in note["pieces"])


def discard(partial: Path) -> None:
    """Remove an incomplete file and the note on it."""
    _note_path(partial).unlink(missing_ok=True)
    partial.unlink(missing_ok=True)


def finish(partial: Path, target: Path) -> None:
    """Give a file that has arrived its name."""
    os.replace(partial, target)
    _note_path(partial).unlink(missing_ok=True)


def _note_path(partial: Path) -> Path:
    return partial.with_name(f"{partial.name}.json")


def _boot() -> str:
    """Changes when the machine starts: a note may then be newer than the bytes it speaks of."""
    with suppress(OSError):
        return _BOOT.read_text().strip()
    return ""


def _read_note(partial: Path) -> dict[str, Any] | None:
    try:
        note = json.loads(_note_path(partial).read_text())
        is_ours = note["tag"] and note["boot"] == _boot()
        is_whole = partial.stat().st_size == note["size_bytes"]
        ends = [0, *(stop for _, _, stop in note["pieces"])]
        starts = [*(start for start, _, _ in note["pieces"]), note["size_bytes"]]
        are_between = all(start <= position <= stop for start, position, stop in note["pieces"])
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return note if is_ours and is_whole and starts == ends and are_between else None


def _noted_pieces(partial: Path, version: Version) -> list[_Piece]:
    if noted_version(partial) != version:
        return []
    note = _read_note(partial)
    return [_Piece(*numbers) for numbers in note["pieces"]] if note else []


def _cut(size_bytes: int) -> list[_Piece]:
    """A small first piece, then pieces of which every connection gets a few."""
    share = (size_bytes - FIRST_PIECE_BYTES) // (4 * CONNECTIONS)
    length = min(max(share, FIRST_PIECE_BYTES), _MAX_PIECE_BYTES)
    starts = [0, *range(FIRST_PIECE_BYTES, size_bytes, length)]
    stops = [*starts[1:], size_bytes]
    return [_Piece(start, start, stop) for start, stop in zip(starts, stops, strict=True)]
