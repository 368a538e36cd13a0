"""Ownership of folders: a command writes and removes only what ke_ray itself has made.

A command *claims* its output folder before it reads or writes anything there. The folder has to be
new, or empty, or its own: with a ``manifest.json`` of the same kind of results, or with the marker
``.ke-ray.json``, which a claim writes before anything else, so that the folder of a command that
was killed before its manifest is recognised. In a claimed folder the names that this kind of
results has (docs/results.md lists them) belong to ke_ray; other files stay as they are. Single
files (a report, a picture) contain a marker.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ke_ray import storage
from ke_ray.errors import ResultsError, StorageError
from ke_ray.storage.sole_writer import is_held, sole_writer

MARK, LOCK, PROGRESS = ".ke-ray.json", ".ke-ray.lock", ".ke-ray.progress.json"
_SHOWN = 4


@contextmanager
def claimed(folder: str, kind: str, *, evidence: tuple[str, str] | None = None) -> Iterator[None]:
    """Own an output folder for the block; claims of one command may be nested.

    A folder that is empty in the end (the request was wrong) is as it was before.

    Args:
        folder: path or URI.
        kind: of results: a manifest's ``kind``, or another word for folders that have none.
        evidence: (a folder inside, the kind of its manifest) that also prove ownership, for
            folders of earlier versions that had no manifest.

    Raises:
        ResultsError: it is not ke_ray's, holds results of another kind, or another command is
            writing it. Nothing was written.
        StorageError: it cannot be written.
    """
    check_claim(folder, kind, evidence)
    lock = storage.join(folder, LOCK)
    if is_held(lock):
        yield
        return
    new_folders = _missing_folders(folder)
    try:
        with sole_writer(lock, folder):
            # Another program may have filled it before the lock was taken.
            if not check_claim(folder, kind, evidence):
                storage.write_json(storage.join(folder, MARK), {"ke_ray": "output", "kind": kind})
            try:
                yield
            finally:
                with suppress(StorageError):  # which must not hide why this ends
                    if not _foreign_names(folder) or _kind(folder, "manifest.json"):
                        storage.remove(storage.join(folder, MARK))  # empty, or has a manifest
    finally:
        with suppress(OSError):  # not empty
            for path in new_folders:
                path.rmdir()


def check_claim(folder: str, kind: str, evidence: tuple[str, str] | None = None) -> bool:
    """Check whether :func:`claimed` could claim the folder; nothing is written.

    Returns:
        True where its contents prove it; False where it is new or empty.

    Raises:
        ResultsError: it is not ke_ray's, or holds results of another kind.
        StorageError: it is a file.
    """
    names = _foreign_names(folder)
    if not names:
        return _kind(folder, MARK) == kind
    owner = _kind(folder, "manifest.json") or _kind(folder, MARK)
    if owner is None and evidence is not None:
        inside, inner_kind = evidence
        if _kind(storage.join(folder, inside), "manifest.json") == inner_kind:
            owner = kind
    if owner == kind:
        return True
    if owner is not None:
        raise ResultsError(
            f"'{folder}' holds results of kind '{owner}', expected '{kind}'; give another output "
            "folder."
        )
    shown = ", ".join(f"'{name}'" for name in names[:_SHOWN])
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    raise ResultsError(
        f"'{folder}' holds {shown}{more}, but no manifest or marker of ke-ray; nothing was "
        "changed. Give an output folder that is new or empty."
    )


def lock_beside(target: str) -> str:
    """The lock of a file or folder that is made by a rename, and cannot contain one."""
    parent, _, name = storage.absolute(target).rstrip("/").rpartition("/")
    return storage.join(parent, f".ke-ray-{name}.lock")


def check_replaceable(target: str, mark: bytes, name: str) -> None:
    """Refuse to overwrite a file that ke_ray did not make.

    Args:
        target: path or URI of a file that is about to be written.
        mark: what ke_ray writes into the first KiB of such files.
        name: of such a file in a result folder, which owns it without a mark.

    Raises:
        StorageError: there is another file, or a folder.
    """
    if not storage.exists(target):
        return
    folder, _, own_name = storage.absolute(target).rpartition("/")
    if own_name == name and any(_kind(folder, file) for file in ("manifest.json", MARK)):
        return
    with suppress(IsADirectoryError), storage.open_read(target) as file:
        if mark in file.read(1024):
            return
    raise StorageError(
        f"'{target}' exists and has no marker of ke-ray; nothing was changed. Move it, or give "
        "another name."
    )


def mark_cache(folder: str | os.PathLike[str], kind: str, names: Collection[str]) -> None:
    """Mark a folder that many processes share as a cache, before anything is written there.

    The cache owns ``names`` in it and nothing else. A folder without a marker that has all of them
    is the cache of an earlier version.

    Raises:
        StorageError: some of the names exist, and are not ke_ray's.
    """
    root = os.fspath(folder)
    if _kind(root, MARK) == kind:
        return
    present = set(storage.list_dir(root)) & set(names)
    if present and present != set(names) and _kind(root, MARK) != kind:  # still unmarked
        shown = ", ".join(f"'{name}'" for name in sorted(present))
        raise StorageError(
            f"'{root}' cannot be a {kind}: it holds {shown}, but no marker of ke-ray. Give a new "
            "or an empty folder."
        )
    storage.write_json(storage.join(root, MARK), {"ke_ray": "cache", "kind": kind})


def _foreign_names(folder: str) -> list[str]:
    """Names in a folder, without marker, lock, progress and temporary files of ke_ray."""
    if storage.is_local(folder) and storage.local_path(folder).is_file():
        raise StorageError(
            f"Cannot write '{folder}': it is a file, and a folder is needed; choose another folder."
        )
    with storage.explained(folder, "read"):
        names = storage.list_dir(folder)
    own = {LOCK, PROGRESS, ""}
    if MARK in names and _kind(folder, MARK) is not None:
        own.add(MARK)
    return [name for name in names if name not in own and not storage.is_temporary(name)]


def _kind(folder: str, file: str) -> str | None:
    """The kind of results that a manifest or a marker names; None where there is none."""
    path = storage.join(folder, file)
    try:
        values: Any = storage.read_json(path)
    except (OSError, StorageError):
        return None
    if not isinstance(values, dict) or not ({"schema_version", "ke_ray"} & set(values)):
        return None
    kind = values.get("kind")
    return kind if isinstance(kind, str) else None


def _missing_folders(folder: str) -> list[Path]:
    """The folder and its parents that do not exist, innermost first; none where it is remote."""
    if not storage.is_local(folder):
        return []
    path = storage.local_path(folder).absolute()
    return [parent for parent in (path, *path.parents) if not parent.exists()]
