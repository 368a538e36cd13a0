"""Checkpoints of one listing that have the same weights.

Published branches can hold the weights of another step, which would put a false point on every
curve. On the Hub the API states the sha256 of each weight file. In folders, sizes are compared
first, then a hash of samples spread over each file (1 MiB a file, whatever its size), and only
files that agree so far are read whole.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from ke_ray.checkpoints.formats.local import base_folder, local_layout
from ke_ray.checkpoints.reference import CheckpointRef
from ke_ray.storage import local_path

_SAMPLE = 64 * 2**10  # bytes
_SAMPLES = 16
_CHUNK = 4 * 2**20


def flag_duplicates(refs: list[CheckpointRef]) -> list[CheckpointRef]:
    """The same references with ``weights_fingerprint`` and ``duplicate_of`` filled in.

    Args:
        refs: in training order; the first of equal ones is the original.
    """
    fingerprinted = [
        replace(ref, weights_fingerprint=folder_fingerprint(local_path(ref.location)))
        if ref.is_local
        else ref
        for ref in refs
    ]
    groups: dict[str, list[CheckpointRef]] = defaultdict(list)
    for ref in fingerprinted:
        if ref.weights_fingerprint is not None:
            groups[ref.weights_fingerprint].append(ref)
    originals: dict[str, str] = {}
    for group in groups.values():
        first_by_content: dict[str | None, str] = {}
        for ref in group if len(group) > 1 else ():
            # Samples may agree by chance (mostly equal files); the Hub's hashes are exact.
            content = _content(local_path(ref.location)) if ref.is_local else None
            original = first_by_content.setdefault(content, ref.name)
            if original != ref.name:
                originals[ref.name] = original
    return [replace(ref, duplicate_of=originals.get(ref.name)) for ref in fingerprinted]


def folder_fingerprint(folder: Path) -> str | None:
    """``sampled-sha256:…`` over name, size and samples of each weight file; None without any."""
    files = _weight_files(folder)
    if not files:
        return None
    total = hashlib.sha256()
    for path in files:
        status = path.stat()
        total.update(_sampled(str(path), status.st_size, status.st_mtime_ns))
    return f"sampled-sha256:{total.hexdigest()}"


def _weight_files(folder: Path) -> list[Path]:
    layout = local_layout(folder)
    if layout is None:
        return []
    return [base_folder(folder) / name for name in layout.weights]


def _content(folder: Path) -> str:
    total = hashlib.sha256()
    for path in _weight_files(folder):
        status = path.stat()
        total.update(_whole(str(path), status.st_size, status.st_mtime_ns))
    return total.hexdigest()


# Size and modification time are part of the key, so that a changed file is read again.
@lru_cache(maxsize=65_536)
def _sampled(path: str, size: int, mtime_ns: int) -> bytes:
    digest = hashlib.sha256(str(size).encode())
    with Path(path).open("rb") as file:
        for index in range(_SAMPLES):
            file.seek(max(0, size - _SAMPLE) * index // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE))
    return digest.digest()


@lru_cache(maxsize=65_536)
def _whole(path: str, size: int, mtime_ns: int) -> bytes:
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.digest()
