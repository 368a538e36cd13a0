"""OLMo's own memory-mapped data and its order: instance ids in, exact tokens out.

Parts are raw little-endian uint16 files without a header (whatever their suffix). Instance i of a
part is tokens [C·i, C·(i+1)) with C = 2048; a last chunk shorter than C is dropped; instances are
numbered through the parts in the order given. The order is a raw uint32 file, or is rebuilt as

    numpy.random.Generator(PCG64(seed + epoch)).shuffle(arange(num_instances, uint32)),  seed 6198

(published code; AI2 says that the published order file may not be the original). Only the bytes of
the instances asked for are read, through fsspec ranges; rebuilding the order of all of OLMo-1B's
data (about 1.5e9 instances) takes 4 bytes of memory an instance, reading an order file takes none.

The YAML that names such data::

    olmo:
      parts: [https://…/part-0-00000.npy, …]   # files, URLs or globs
      order: https://…/global_indices.npy      # null rebuilds it
      seed: 6198
      epoch: 0
      first: 0              # place in the order of the first instance
      chunk: 2048           # C
      instances: null       # or a list of instance ids, instead of the order
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ke_ray.data.sources import SourceFile, list_files, reading
from ke_ray.errors import DataError, nearest
from ke_ray.storage.safe_yaml import parse_yaml

__all__ = [
    "OLMO_SEED",
    "OlmoSource",
    "count_instances",
    "iter_instances",
    "read_instances",
    "read_olmo_source",
    "read_order",
    "rebuild_order",
]

OLMO_SEED = 6198
_TOKEN_BYTES = 2
_ID_BYTES = 4
_RANGES_AT_ONCE = 256
_CONNECTIONS = 16
_PAUSES_S = (0.0, 0.5, 2.0)  # before the first, second and third attempt


@dataclass(frozen=True)
class OlmoSource:
    """What the YAML holds; see the module's docstring for the keys."""

    parts: tuple[str, ...]
    order: str | None = None
    seed: int = OLMO_SEED
    epoch: int = 0
    first: int = 0
    chunk: int = 2048
    instances: tuple[int, ...] | None = None


def read_olmo_source(source: str) -> OlmoSource:
    """Read the YAML that describes OLMo data.

    Raises:
        DataError: not such a file, an unknown key or a wrong type.
        ConfigError: not YAML.
    """
    (file,) = list_files(source)[:1]
    with reading(file.url):
        content = bytes(file.filesystem.cat_file(file.path))
    try:
        data = parse_yaml(content.decode("utf-8"), f"'{source}'")
    except UnicodeDecodeError as error:
        raise DataError(f"'{source}' is not a YAML file: not UTF-8 text.") from error
    if not isinstance(data, dict) or not isinstance(data.get("olmo"), dict) or len(data) != 1:
        raise DataError(
            f"'{source}' does not describe data: expected the one key 'olmo' with 'parts' in it."
        )
    return _check(data["olmo"], source)


def _check(values: dict[Any, Any], where: str) -> OlmoSource:
    known = [field.name for field in fields(OlmoSource)]
    for key in values:
        if key not in known:
            raise DataError(
                f"'{where}': unknown key 'olmo.{str(key)[:60]}'.{nearest(str(key)[:60], known)} "
                f"Valid keys: {', '.join(known)}."
            )
    given = {key: value for key, value in values.items() if value is not None}
    parts = given.get("parts")
    if not isinstance(parts, list) or not parts or not all(isinstance(p, str) for p in parts):
        raise DataError(f"'{where}': 'olmo.parts' must be a list of files, URLs or globs.")
    if not isinstance(given.get("order", ""), str):
        raise DataError(f"'{where}': 'olmo.order' must be a file, a URL or null.")
    for key, least in (("seed", 0), ("epoch", 0), ("first", 0), ("chunk", 1)):
        if not _is_count(given.get(key, least), least):
            raise DataError(
                f"'{where}': 'olmo.{key}' is {str(given[key])[:60]}; expected a whole number of "
                f"at least {least}."
            )
    instances = given.get("instances")
    if instances is not None:
        if not isinstance(instances, list) or not all(_is_count(i, 0) for i in instances):
            raise DataError(f"'{where}': 'olmo.instances' must be a list of instance ids ≥ 0.")
        given["instances"] = tuple(instances)
    return OlmoSource(**{**given, "parts": tuple(parts)})


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 1 << 62


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
    sizes = []
    for file in files:
        with reading(file.url):
            size = file.filesystem.size(file.path)
        if size is None:
            raise DataError(f"'{file.url}': the server does not say how long it is.")
        sizes.append(int(size))
    counts = np.array(sizes, np.int64) // (source.chunk * _TOKEN_BYTES)
    return _Parts(files, np.cumsum(counts), source.chunk)


def count_instances(source: OlmoSource) -> int:
    """Instances in all parts: Σ floor(bytes / (2 C))."""
    return _open_parts(source).num_instances


def read_order(source: OlmoSource, num_instances: int | None) -> NDArray[np.int64]:
    """The ids of N instances from place ``first`` of the order, [N] int64.

    Args:
        num_instances: N; None takes all that follow ``first``.

    Raises:
        DataError: the order has fewer.
    """
    return _read_order(source, _open_parts(source), num_instances)


def _read_order(source: OlmoSource, parts: _Parts, num_instances: int | None) -> NDArray[np.int64]:
    total = parts.num_instances
    if source.instances is not None:
        ids = np.array(source.instances, np.int64)[source.first :]
        where, available = "'olmo.instances'", len(ids)
    elif source.order is None:
        where, available = "the rebuilt order", max(total - source.first, 0)
        if num_instances is None or num_instances <= available:
            order = rebuild_order(total, seed=source.seed, epoch=source.epoch)
            ids = order[source.first :].astype(np.int64)
    else:
        where = f"'{source.order}'"
        (file,) = list_files(source.order)[:1]
        with reading(file.url):
            size = int(file.filesystem.size(file.path) or 0)
        available = max(size // _ID_BYTES - source.first, 0)
        wanted = available if num_instances is None else min(num_instances, available)
        start = source.first * _ID_BYTES
        (data,) = _read_ranges([(file, start, start + wanted * _ID_BYTES)])
        ids = np.frombuffer(data, "<u4").astype(np.int64)
    if available < (num_instances or 1):
        raise DataError(
            f"{where} holds {available} instances from place {source.first} on; "
            f"{num_instances or 1} were asked."
        )
    ids = ids[:num_instances]
    if len(ids) and int(ids.max()) >= total:
        raise DataError(
            f"{where} names instance {int(ids.max())}, but the parts hold {total}; are all parts "
            "listed, in OLMo's order?"
        )
    return ids


def iter_instances(
    source: OlmoSource, *, num_instances: int | None, sequence_length: int | None = None
) -> Iterator[tuple[NDArray[np.int32], NDArray[np.int64]]]:
    """Blocks of tokens [k, T] int32 and instance ids [k] int64, N rows in all.

    Args:
        num_instances: N places of the order from ``first`` on; None takes all.
        sequence_length: T ≤ C: the first T tokens of each instance; None takes C.

    Raises:
        DataError: T > C, too few instances, or a server that does not answer with the range asked.
    """
    length = source.chunk if sequence_length is None else sequence_length
    if not 1 <= length <= source.chunk or (num_instances is not None and num_instances < 1):
        raise DataError(
            f"{num_instances} instances of {length} tokens were asked; OLMo's instances have "
            f"{source.chunk} tokens, so ask for at least 1 instance of 1 to {source.chunk}."
        )
    parts = _open_parts(source)
    ids = _read_order(source, parts, num_instances)
    for start in range(0, len(ids), _RANGES_AT_ONCE):
        block = ids[start : start + _RANGES_AT_ONCE]
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
    """The bytes [start, end) of each file; files of one kind of store are asked together.

    Raises:
        DataError: another number of bytes came back, as from a server that ignores ranges.
    """
    if not ranges:
        return []
    by_store: dict[int, list[int]] = {}
    for index, (file, _, _) in enumerate(ranges):
        by_store.setdefault(id(file.filesystem), []).append(index)
    found: list[bytes] = [b""] * len(ranges)
    for indices in by_store.values():
        filesystem = ranges[indices[0]][0].filesystem
        # The first goes alone: a server that ignores ranges then sends one whole file, not 256.
        for batch in (indices[:1], indices[1:]):
            for index, block in zip(batch, _fetch(filesystem, ranges, batch), strict=True):
                found[index] = block
    return found


def _fetch(
    filesystem: Any, ranges: Sequence[tuple[SourceFile, int, int]], batch: Sequence[int]
) -> list[bytes]:
    chosen = [ranges[index] for index in batch]
    if not chosen:
        return []
    # Left alone, fsspec opens as many connections as there are ranges; servers stall or refuse.
    options = {"batch_size": _CONNECTIONS} if filesystem.async_impl else {}
    with reading(chosen[0][0].url):
        for pause_s in _PAUSES_S:
            time.sleep(pause_s)
            try:
                blocks = filesystem.cat_ranges(
                    [file.path for file, _, _ in chosen],
                    [start for _, start, _ in chosen],
                    [end for _, _, end in chosen],
                    on_error="raise",
                    **options,
                )
                break
            except (FileNotFoundError, PermissionError):
                raise
            except Exception:
                if pause_s == _PAUSES_S[-1]:
                    raise
    for (file, start, end), block in zip(chosen, blocks, strict=True):
        if len(block) != end - start:
            raise DataError(
                f"'{file.url}': {len(block)} bytes came for the {end - start} asked (from "
                f"{start}); the file is cut off, or its server does not serve ranges."
            )
    return [bytes(block) for block in blocks]
