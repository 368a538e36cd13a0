"""Checkpoints of one listing that have the same weights.

Published branches can hold the weights of another step, which would put a false point on every
curve. On the Hub the API states the sha256 of each weight file. In folders, sizes are compared
first, then a hash of samples spread over each file (1 MiB a file, whatever its size), and only
files that agree so far are read whole. So are those of a folder that may be a copy of a checkpoint
on the Hub in the same listing, by their size.

Files that ``torch.save`` wrote differ where their names do, and a DCP folder also holds the
optimizer: of these the bytes of the tensors are compared (of the model's alone in a DCP folder).
"""

from __future__ import annotations

import hashlib
import re
import struct
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from ke_ray.checkpoints.formats.dcp import DcpFile
from ke_ray.checkpoints.formats.local import base_folder, local_layout
from ke_ray.checkpoints.formats.shards import StateFile
from ke_ray.checkpoints.hub import lfs_fingerprint
from ke_ray.checkpoints.reference import CheckpointRef
from ke_ray.errors import CheckpointError
from ke_ray.storage import local_path

_SAMPLE = 64 * 2**10  # bytes
_SAMPLES = 16
_CHUNK = 4 * 2**20
_OTHER_FILES = 64 * 2**20  # bytes that tokenizer and configuration of a copy may differ by
_RECORD = re.compile(r"[^/]+/data/[0-9]+")  # a tensor's bytes in a file of torch.save


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
    on_hub = {
        ref.weights_fingerprint: ref.size_bytes or 0 for ref in fingerprinted if not ref.is_local
    }
    groups: dict[str, list[CheckpointRef]] = defaultdict(list)
    for ref in fingerprinted:
        copied = _hub_fingerprint(ref, set(on_hub.values())) if ref.is_local else None
        fingerprint = copied if copied in on_hub else ref.weights_fingerprint
        if fingerprint is not None:
            groups[fingerprint].append(ref)
    originals: dict[str, str] = {}
    for fingerprint, group in groups.items():
        first_by_content: dict[str | None, str] = {}
        for ref in group if len(group) > 1 else ():
            # Samples may agree by chance (mostly equal files); the Hub's hashes are exact.
            is_sampled = ref.is_local and fingerprint not in on_hub
            content = _content(local_path(ref.location)) if is_sampled else None
            original = first_by_content.setdefault(content, ref.name)
            if original != ref.name:
                originals[ref.name] = original
    return [replace(ref, duplicate_of=originals.get(ref.name)) for ref in fingerprinted]


def _hub_fingerprint(ref: CheckpointRef, sizes: set[int]) -> str | None:
    """What the Hub would state of a folder, where its size is near one of ``sizes`` in bytes."""
    layout = local_layout(local_path(ref.location))
    near = any(abs(size - (ref.size_bytes or 0)) <= _OTHER_FILES for size in sizes)
    if layout is None or layout.format != "hf" or not layout.weights or not near:
        return None
    paths = [base_folder(local_path(ref.location)) / name for name in layout.weights]
    stats = [path.stat() for path in paths]
    return lfs_fingerprint(
        f"sha256:{_whole(str(path), stat.st_mtime_ns, 0, stat.st_size, 1).hex()}"
        for path, stat in zip(paths, stats, strict=True)
    )


def folder_fingerprint(folder: Path) -> str | None:
    """``sampled-sha256:…`` over sizes and samples of all weights; None without any."""
    spans = list(_weight_spans(folder))
    if not spans:
        return None
    total = hashlib.sha256()
    for span in spans:
        total.update(_sampled(*span))
    return f"sampled-sha256:{total.hexdigest()}"


def _content(folder: Path) -> str:
    total = hashlib.sha256()
    for span in _weight_spans(folder):
        total.update(_whole(*span))
    return total.hexdigest()


def _weight_spans(folder: Path) -> Iterator[tuple[str, int, int, int, int]]:
    """Path, modification time, first byte, bytes and number of samples of parts with weights."""
    layout = local_layout(folder)
    if layout is None:
        return
    paths = [base_folder(folder) / name for name in layout.weights]
    parts: list[tuple[Path, int, int]] = []
    if layout.format in ("dcp", "state"):
        try:
            opened = (DcpFile if layout.format == "dcp" else StateFile)(paths[0].parent)
            spans = opened.spans()
            parts = [span for span in spans if span[0].is_file()]
        except CheckpointError:
            parts = []  # loading says what is wrong
    elif paths and paths[0].suffix in (".pt", ".bin", ".ckpt"):
        parts = [part for path in paths for part in _records(path)]
    for path, start, num_bytes in parts:
        yield str(path), path.stat().st_mtime_ns, start, num_bytes, 1
    for path in paths if not parts else ():
        status = path.stat()
        yield str(path), status.st_mtime_ns, 0, status.st_size, _SAMPLES


def _records(path: Path) -> list[tuple[Path, int, int]]:
    """The tensors in a file of ``torch.save``; none where it is not one of today's zip archives."""
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            parts = []
            for entry in archive.infolist():
                if _RECORD.fullmatch(entry.filename) and entry.compress_type == zipfile.ZIP_STORED:
                    file.seek(entry.header_offset + 26)
                    lengths = struct.unpack("<HH", file.read(4))  # of the name and extra field
                    parts.append((path, entry.header_offset + 30 + sum(lengths), entry.file_size))
            return parts
    except (zipfile.BadZipFile, struct.error, OSError):
        return []


# Size and modification time are part of the key, so that a changed file is read again.
@lru_cache(maxsize=65_536)
def _sampled(path: str, mtime_ns: int, start: int, num_bytes: int, num_samples: int) -> bytes:
    digest = hashlib.sha256(str(num_bytes).encode())
    with Path(path).open("rb") as file:
        for index in range(num_samples):
            offset = max(0, num_bytes - _SAMPLE) * index // max(1, num_samples - 1)
            file.seek(start + offset)
            digest.update(file.read(min(_SAMPLE, num_bytes)))
    return digest.digest()


@lru_cache(maxsize=65_536)
def _whole(path: str, mtime_ns: int, start: int, num_bytes: int, num_samples: int) -> bytes:
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        file.seek(start)
        while num_bytes > 0 and (chunk := file.read(min(_CHUNK, num_bytes))):
            digest.update(chunk)
            num_bytes -= len(chunk)
    return digest.digest()
