"""Shards of tensors as safetensors files under any URI, for ``torch.distributed.checkpoint``.

Each worker writes one file. Its header says where the parts lie in the whole tensors, in the words
of torch's ``HuggingFaceStorageWriter``, whose reader reads these files too. Torch's own pair serves
local folders alone, builds every file a second time in memory, and holds Python's lock while it
does. Here bytes go from the tensors to the store, and a reader asks for the rows that it needs.

    bytes 0–7     length of the header, little-endian
    header        JSON: "<tensor>": {dtype, shape, data_offsets}, and ``__metadata__`` with
                  DCP_SHARDING_INFO: {"<tensor>": {"saved_offsets": [first row, 0, …]}}
    the rest      the tensors' bytes

A file without DCP_SHARDING_INFO holds whole tensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint import StorageReader, StorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from ke_ray import storage
from ke_ray.checkpoints.formats.weights import safetensors_dtype

_SHARDING = "DCP_SHARDING_INFO"
_DTYPE_NAMES = {
    dtype: name
    for name in ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")
    if (dtype := safetensors_dtype(name)) is not None
}
_MAX_HEADER_BYTES, _MAX_DIMENSIONS = 100 * 2**20, 64


class ShardWriter(StorageWriter):
    """Writes each worker's tensors as one file of a folder, which is emptied before.

    Args:
        folder: URI.
        rank: of this worker.
        publish: called on the coordinator once every worker has written, with the files' sizes
            in bytes by name.
    """

    def __init__(self, folder: str, rank: int, publish: Callable[[dict[str, int]], None]) -> None:
        self._folder, self._publish = folder, publish
        self._name = f"shard-{rank + 1:05d}.safetensors"

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing is kept between saves."""

    def set_up_storage_writer(self, is_coordinator: bool, *_: Any) -> None:
        """Remove what a killed attempt, perhaps of another number of workers, left there."""
        if is_coordinator:
            storage.remove(self._folder)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Every worker writes what it has."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Every worker writes what it has."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this worker's file."""
        future: Future[list[WriteResult]] = Future()
        if not plan.items:
            future.set_result([])
            return future
        tensors, offsets = {}, {}
        for item in plan.items:
            assert item.tensor_data is not None, "a state holds tensors alone"
            tensors[item.index.fqn] = planner.resolve_data(item).detach().contiguous()
            offsets[item.index.fqn] = list(item.tensor_data.chunk.offsets)
        parts = [memoryview(_header(tensors, offsets))]
        parts += [memoryview(_bytes_of(tensor).numpy()) for tensor in tensors.values()]
        storage.write_atomic(storage.join(self._folder, self._name), parts)
        size = sum(len(part) for part in parts)
        future.set_result([WriteResult(plan.items[0].index, size, self._name)])
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the coordinator: all workers have written."""
        self._publish({r.storage_data: r.size_in_bytes for part in results for r in part})

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Whether it names a folder: any URI does."""
        return True


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _header(tensors: dict[str, torch.Tensor], offsets: dict[str, list[int]]) -> bytes:
    sharding = {name: {"saved_offsets": value} for name, value in offsets.items()}
    header: dict[str, Any] = {
        "__metadata__": {"format": "pt", "DCP_VERSION": "1.0", _SHARDING: json.dumps(sharding)}
    }
    start = 0
    for name, tensor in tensors.items():
        stop = start + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at multiples of eight, as the format wants
    return len(text).to_bytes(8, "little") + text


@dataclass(frozen=True)
class _Part:
    """Where a part of a tensor lies: ``start`` in bytes of the file."""

    file: str
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class ShardReader(StorageReader):
    """Reads the rows that a worker needs out of a folder's safetensors files.

    Args:
        folder: URI.
        sizes: bytes of each file; other files are none of the state's.

    Raises:
        OSError, ValueError, LookupError, TypeError, RecursionError: a header is malformed, or parts
            of a tensor are missing.
    """

    def __init__(self, folder: str, sizes: dict[str, int]) -> None:
        self._folder = folder
        self._parts: dict[tuple[str, tuple[int, ...]], _Part] = {}
        self.tensors: dict[str, TensorStorageMetadata] = {}
        for name, size in sizes.items():
            if name.endswith(".safetensors"):
                self._read_header(name, size)
        for name, tensor in self.tensors.items():
            if sum(math.prod(part.sizes) for part in tensor.chunks) != math.prod(tensor.size):
                raise ValueError(f"parts of '{name}' are missing")

    def _read_header(self, file_name: str, size: int) -> None:
        with storage.open_read(storage.join(self._folder, file_name)) as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(_MAX_HEADER_BYTES, size - 8):
                raise ValueError(f"{file_name} is no safetensors file")
            header = storage.parse_json(file.read(length))
        offsets = json.loads(header.pop("__metadata__", {}).get(_SHARDING, "null"))
        for name, entry in header.items():
            shape, (start, stop) = tuple(entry["shape"]), entry["data_offsets"]
            offset = tuple(offsets[name]["saved_offsets"]) if offsets else (0,) * len(shape)
            dtype = safetensors_dtype(entry["dtype"])
            is_sane = len(offset) == len(shape) <= _MAX_DIMENSIONS and all(
                type(number) is int and 0 <= number < 2**62 for number in (*shape, *offset, start)
            )
            if not is_sane or dtype is None or stop > size - 8 - length:
                raise ValueError(f"'{name}' in {file_name} is malformed")
            if stop - start != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"'{name}' in {file_name} has another size than its shape says")
            self._parts[name, offset] = _Part(file_name, 8 + length + start, shape, dtype)
            part = ChunkStorageMetadata(torch.Size(offset), torch.Size(shape))
            ends = [first + count for first, count in zip(offset, shape, strict=True)]
            known = self.tensors.get(name)
            chunks = [*known.chunks, part] if known else [part]
            if known:
                ends = [max(pair) for pair in zip(known.size, ends, strict=True)]
            properties = TensorProperties(dtype=dtype)
            self.tensors[name] = TensorStorageMetadata(properties, torch.Size(ends), chunks)

    def reset(self, checkpoint_id: Any = None) -> None:
        """A reader is of one folder."""

    def read_metadata(self) -> Metadata:
        """Names, shapes and parts of all tensors."""
        return Metadata(dict(self.tensors))

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool) -> None:
        """Each worker has read the headers itself."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Every worker reads what it needs."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Every worker reads what it needs."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read this worker's rows into its tensors, one after the other."""
        by_file: dict[str, list[tuple[_Part, Any]]] = {}
        for item in plan.items:
            part = self._parts[_key(item.storage_index)]
            by_file.setdefault(part.file, []).append((part, item))
        for name, wanted in by_file.items():
            uri = storage.join(self._folder, name)
            storage.on_store(uri, lambda uri=uri, wanted=wanted: _read(uri, wanted, planner))  # type: ignore[misc]
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Whether it names a folder: any URI does."""
        return True


def _key(index: MetadataIndex) -> tuple[str, tuple[int, ...]]:
    return index.fqn, tuple(index.offset or ())


def _read(uri: str, wanted: list[tuple[_Part, Any]], planner: LoadPlanner) -> None:
    with storage.open_read(uri) as file:
        for part, item in wanted:
            target = planner.resolve_tensor(item).detach()
            rows = _rows(file, part, tuple(item.storage_offsets), tuple(item.lengths))
            target.copy_(rows.reshape(target.shape))
            planner.commit_tensor(item, target)


def _rows(
    file: Any, part: _Part, offsets: tuple[int, ...], lengths: tuple[int, ...]
) -> torch.Tensor:
    """The box ``lengths`` at ``offsets`` of a part; of the file, only its rows are read."""
    first, count = (offsets[0], lengths[0]) if part.shape else (0, 1)
    row_bytes = math.prod(part.shape[1:]) * part.dtype.itemsize
    buffer = torch.empty(count * row_bytes, dtype=torch.uint8)
    file.seek(part.start + first * row_bytes)
    view = memoryview(buffer.numpy())
    while len(view):
        num_read = file.readinto(view)
        if not num_read:
            raise OSError(f"{part.file} ends early")
        view = view[num_read:]
    rows = buffer.view(part.dtype).reshape(lengths[:1] + part.shape[1:])
    for dim in range(1, len(lengths)):
        rows = rows.narrow(dim, offsets[dim], lengths[dim])
    return rows
