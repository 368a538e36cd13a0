"""Temporary files and folders, and removing those whose writers were killed.

The future ``<target>`` is written as ``.ke-ray-<16 hex digits>-<target>`` beside it,
locked while its writer lives, and renamed in the end. The next write of the same target removes
the leftovers of killed writers.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
import time
from contextlib import suppress
from pathlib import Path

_PREFIX = ".ke-ray-"
_NAME = re.compile(re.escape(_PREFIX) + "[0-9a-f]{16}-")
# Between its creation and its lock a temporary file looks like one whose writer is dead.
_LEFTOVER_AGE_S = 2.0
_LARGE_FOLDER, _LARGE_FOLDER_S = 200, 30.0
_large_folders: dict[Path, tuple[float, list[str]]] = {}


def hold(descriptor: int) -> None:
    """Lock an open temporary file or folder, which shows others that its writer lives."""
    with suppress(OSError):  # a file system without locks
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def temporary_path(target: Path) -> Path:
    """A temporary name beside ``target``; :func:`hold` the file while it is written."""
    return target.with_name(f"{_PREFIX}{secrets.token_hex(8)}-{target.name}")


def is_temporary(name: str) -> bool:
    """Whether ``name`` was made by :func:`temporary_path`."""
    return _NAME.match(name) is not None


def remove_leftovers(target: Path) -> None:
    """Remove temporary files and folders of ``target`` whose writers were killed."""
    for name in _temporary_names(target.parent):
        match = _NAME.match(name)
        if match is None or name[match.end() :] != target.name:
            continue
        path = target.with_name(name)
        with suppress(OSError):  # another process writes it, or has just removed or renamed it
            if time.time() - path.lstat().st_mtime < _LEFTOVER_AGE_S:
                continue
            descriptor = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink()
            finally:
                os.close(descriptor)


def _temporary_names(folder: Path) -> list[str]:
    """Names of temporary files; those of a large folder may be half a minute old.

    Every write asks for them: listing a folder of n files for each would take n² steps.
    """
    listed_at, names = _large_folders.get(folder, (0.0, []))
    if listed_at and time.monotonic() - listed_at < _LARGE_FOLDER_S:
        return names
    with os.scandir(folder) as entries:
        every = [entry.name for entry in entries]
    names = [name for name in every if name.startswith(_PREFIX)]
    if len(every) >= _LARGE_FOLDER:
        _large_folders[folder] = (time.monotonic(), names)
    return names
