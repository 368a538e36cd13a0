"""OLMo's own memory-mapped data and its order: instance ids in, exact tokens out.

Parts are raw little-endian uint16 files without a header (whatever their suffix). Instance i of a
part is tokens [C·i, C·(i+1)) with C = 2048; a last chunk shorter than C is dropped; instances are
numbered through the parts in the given order. The order is a raw uint32 file, or is rebuilt as

    numpy.random.Generator(PCG64(seed + epoch)).shuffle(arange(num_instances, uint32)),  seed 6198

(published code; AI2 says that the published order file may not be the original). Only the bytes of
the requested instances are read, through fsspec ranges. Rebuilding the order of all of OLMo-1B's
data (about 1.5e9 instances) takes 4 bytes of memory per instance; reading an order file takes none.

The YAML that names such data::

    olmo:
      parts: [https://…/part-0-00000.npy, …]   # files, URLs or globs
      order: https://…/global_indices.npy      # null rebuilds it
      seed: 6198
      epoch: 0
      first: 0              # position in the order of the first instance
      chunk: 2048           # C
      instances: null       # or a list of instance ids, instead of the order
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from ke_ray.config import Strict, validate
from ke_ray.data.sources import SourceFile, list_files, reading
from ke_ray.data.stored_array import check_range, file_size
from ke_ray.errors import DataError
from ke_ray.storage.safe_yaml import parse_yaml

OLMO_SEED = 6198
_TOKEN_BYTES = 2
_ID_BYTES = 4
_MAX_RANGES = 256
_CONNECTIONS = 16
_PAUSES_S = (0.0, 0.5, 2.0)  # before the first, second and third attempt

Count = Annotated[int, Field(ge=0, lt=1 << 62)]


class OlmoSource(Strict, strict=True):
    """The settings under the key 'olmo' of the YAML; see the module's docstring."""

    # YAML has lists only, which strict validation would not take for tuples.
    parts: Annotated[tuple[str, ...], Field(strict=False, min_length=1)]
    order: str | None = None
    seed: Count = OLMO_SEED
    epoch: Count = 0
    first: Count = 0
    chunk: Annotated[Count, Field(ge=1)] = 2048
    instances: Annotated[tuple[Count, ...], Field(strict=False, fail_fast=True)] | None = None


class _OrderFile(Strict):
    olmo: OlmoSource


def read_olmo_source(source: str) -> OlmoSource:
    """Read the YAML that describes OLMo data.

    Raises:
        DataError: no such file, or a key that is unknown, missing or has a wrong value.
        ConfigError: not YAML.
    """
    (file,) = list_files(source)[:1]
    with reading(file.url):
        content = bytes(file.filesystem.cat_file(file.path))
    try:
        values = parse_yaml(content.decode("utf-8"), f"'{source}'")
    except UnicodeDecodeError as error:
        raise DataError(f"'{source}' is not a YAML file: not UTF-8 text.") from error
    return validate(_OrderFile, values, f"'{source}'", DataError).olmo


def rebuild_order(num_instances: int, *, seed: int = OLMO_SEED, epoch: int = 0) -> NDArray[Any]:
    """The order of all instances in one epoch, [num_instances] uint32, as OLMo's code makes it."""
    order = np.arange(num_instances, dtype=np.uint32)
    np.random.Generator(np.random.PCG64(seed=seed + epoch)).shuffle(order)
    return order


@dataclass(frozen=True)
class _Parts:
    files: tuple[SourceFile, ...]
    ends: NDArray[np.int64]  # [parts] instances in all parts up to and with this one
    chunk: int

    @property
    def num_instances(self) -> int:
        return int(self.ends[-1])


def _open_parts(source: OlmoSource) -> _Parts:
    files = tuple(file for part in source.parts for file in list_files(part))
    sizes = np.array([file_size(file) for file in files], np.int64)
    return _Parts(files, np.cumsum(sizes // (source.chunk * _TOKEN_BYTES)), source.chunk)


def _read_order(source: OlmoSource, parts: _Parts, num_instances: int | None) -> NDArray[np.int64]:
    """The ids of N instances from position ``first`` of the order, [N] int64; None takes all."""
    total = parts.num_instances
    if source.instances is not None:
        ids = np.array(source.instances, np.int64)[source.first :]
        name, available = "'olmo.instances'", len(ids)
    elif source.order is None:
        name, available = "the rebuilt order", max(total - source.first, 0)
        if num_instances is None or num_instances <= available:
            order = rebuild_order(total, seed=source.seed, epoch=source.epoch)
            ids = order[source.first :].astype(np.int64)
    else:
        name = f"'{source.order}'"
        (file,) = list_files(source.order)[:1]
        available = max(file_size(file) // _ID_BYTES - source.first, 0)
        count = available if num_instances is None else min(num_instances, available)
        start = source.first * _ID_BYTES
        (data,) = _read_ranges([(file, start, start + count * _ID_BYTES)])
        ids = np.frombuffer(data, "<u4").astype(np.int64)
    if available < (num_instances or 1):
        raise DataError(
            f"{num_instances or 1} instances were requested, but {name} holds {available} from "
            f"position {source.first} on."
        )
    ids = ids[:num_instances]
    if len(ids) and int(ids.max()) >= total:
        raise DataError(
            f"{name} names instance {int(ids.max())}, but the parts hold {total}. List all parts, "
            "in OLMo's order."
        )
    return ids


def iter_instances(
    source: OlmoSource, *, num_instances: int | None, sequence_length: int | None = None
) -> Iterator[tuple[NDArray[np.int32], NDArray[np.int64]]]:
    """Blocks of tokens [k, T] int32 and instance ids [k] int64, N rows in all.

    Args:
        num_instances: N positions of the order from ``first`` on; None takes all.
        sequence_length: T ≤ C: the first T tokens of each instance; None takes C.

    Raises:
        DataError: T > C, too few instances, or a server that answers with another range.
    """
    length = source.chunk if sequence_length is None else sequence_length
    if not 1 <= length <= source.chunk or (num_instances is not None and num_instances < 1):
        raise DataError(
            f"{num_instances} instances of {length} tokens were requested, but OLMo's instances "
            f"have {source.chunk} tokens; request at least 1 instance of 1 to {source.chunk}."
        )
    parts = _open_parts(source)
    ids = _read_order(source, parts, num_instances)
    for start in range(0, len(ids), _MAX_RANGES):
        block = ids[start : start + _MAX_RANGES]
        yield _read_by_id(parts, block, length), block


def read_instances(
    source: OlmoSource, *, num_instances: int | None, sequence_length: int | None = None
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """All blocks of ``iter_instances`` as one: tokens [N, T] and instance ids [N]."""
    blocks = list(
        iter_instances(source, num_instances=num_instances, sequence_length=sequence_length)
    )
    return np.concatenate([ids for ids, _ in blocks]), np.concatenate([n for _, n in blocks])


def _read_by_id(parts: _Parts, ids: NDArray[np.int64], length: int) -> NDArray[np.int32]:
    """The first ``length`` tokens of each instance, [n, length], by range reads alone."""
    part_of = np.searchsorted(parts.ends, ids, side="right")
    before = np.concatenate([[0], parts.ends[:-1]])
    starts = (ids - before[part_of]) * (parts.chunk * _TOKEN_BYTES)
    ranges = [
        (parts.files[part], int(start), int(start) + length * _TOKEN_BYTES)
        for part, start in zip(part_of, starts, strict=True)
    ]
    result = np.empty((len(ids), length), np.int32)
    for row, data in enumerate(_read_ranges(ranges)):
        result[row] = np.frombuffer(data, "<u2")
    return result


def _read_ranges(ranges: Sequence[tuple[SourceFile, int, int]]) -> list[bytes]:
    """The bytes [start, end) of each file; ranges of one file system are read together.

    Raises:
        DataError: another number of bytes came back, as from a server that ignores ranges.
    """
    by_filesystem: dict[int, list[int]] = {}
    for index, (file, _, _) in enumerate(ranges):
        by_filesystem.setdefault(id(file.filesystem), []).append(index)
    result: list[bytes] = [b""] * len(ranges)
    for indices in by_filesystem.values():
        # The first goes alone: a server that ignores ranges then sends one whole file, not 256.
        for batch in (indices[:1], indices[1:]):
            blocks = _fetch([ranges[index] for index in batch])
            for index, block in zip(batch, blocks, strict=True):
                result[index] = block
    return result


def _fetch(ranges: Sequence[tuple[SourceFile, int, int]]) -> list[bytes]:
    """The bytes of ranges of one file system, with more attempts where one fails."""
    if not ranges:
        return []
    filesystem = ranges[0][0].filesystem
    # Left alone, fsspec opens as many connections as there are ranges; servers stall or refuse.
    options = {"batch_size": _CONNECTIONS} if filesystem.async_impl else {}
    with reading(ranges[0][0].url):
        for pause_s in _PAUSES_S:
            time.sleep(pause_s)
            try:
                blocks = filesystem.cat_ranges(
                    [file.path for file, _, _ in ranges],
                    [start for _, start, _ in ranges],
                    [end for _, _, end in ranges],
                    on_error="raise",
                    **options,
                )
                break
            except (FileNotFoundError, PermissionError):
                raise
            except Exception:
                if pause_s == _PAUSES_S[-1]:
                    raise
    for (file, start, end), block in zip(ranges, blocks, strict=True):
        check_range(block, file, start, end)
    return [bytes(block) for block in blocks]
