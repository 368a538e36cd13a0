"""Shards of tensors as safetensors files under any URI, for ``torch.distributed.checkpoint``.

Each worker writes one file (``ke_ray.checkpoints.formats.shards``), which torch's own
``HuggingFaceStorageReader`` reads too. Torch's own pair serves local folders alone, builds every
file a second time in memory, and holds Python's lock while it does. Here bytes go from the tensors
to the store, and a reader asks for the rows that it needs.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Size
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
from ke_ray.checkpoints.formats.shards import Part, header_bytes, read_header, whole_shape
from ke_ray.checkpoints.formats.weights import safetensors_dtype
from ke_ray.errors import TrainingError

#: A header that claims to be longer is not read: it is damaged.
_MAX_HEADER_BYTES = 100 * 2**20
_DTYPE_NAMES = {
    dtype: name
    for name in ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")
    if (dtype := safetensors_dtype(name)) is not None
}


class ShardWriter(StorageWriter):
    """Writes each worker's tensors as one file of a folder, which is emptied before.

    Args:
        folder: URI.
        rank: of this worker.
        tensors: what to write, contiguous, in host memory, by name. (The tensors that ``dcp`` is
            given say where these belong; their numbers are not looked at.)
        publish: called on the coordinator once every worker has written, with the files' sizes
            in bytes by name.
    """

    def __init__(
        self,
        folder: str,
        rank: int,
        tensors: dict[str, torch.Tensor],
        publish: Callable[[dict[str, int]], None],
    ) -> None:
        self._folder, self._tensors, self._publish = folder, tensors, publish
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
        offsets = {}
        for item in plan.items:
            assert item.tensor_data is not None, "a state holds tensors alone"
            offsets[item.index.fqn] = list(item.tensor_data.chunk.offsets)
        tensors = {name: self._tensors[name] for name in offsets}
        header = header_bytes(
            {
                name: (_DTYPE_NAMES[t.dtype], list(t.shape), offsets[name], t.nbytes)
                for name, t in tensors.items()
            }
        )
        parts = [memoryview(header)]
        parts += [_bytes_of(tensor).numpy().data for tensor in tensors.values()]
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


def _dtype(part: Part) -> torch.dtype:
    dtype = safetensors_dtype(part.dtype)
    assert dtype is not None, "the header was checked"
    return dtype


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


class ShardReader(StorageReader):
    """Reads the rows that a worker needs out of a folder's safetensors files.

    Args:
        folder: URI.
        sizes: bytes of each file; other files are none of the state's.

    Raises:
        OSError, ValueError, LookupError, TypeError, AttributeError: a header is malformed, or
            parts of a tensor are missing.
        StorageError: the store is out of order, which says nothing about the state.
    """

    def __init__(self, folder: str, sizes: dict[str, int]) -> None:
        self._folder = folder
        self._parts: dict[tuple[str, tuple[int, ...]], tuple[str, Part]] = {}
        self.tensors: dict[str, TensorStorageMetadata] = {}
        by_name: dict[str, list[Part]] = {}
        for file_name, size in sizes.items():
            if not file_name.endswith(".safetensors"):
                continue
            for name, part in read_header(_head(storage.join(folder, file_name)), size).items():
                by_name.setdefault(name, []).append(part)
                self._parts[name, part.offsets] = file_name, part
        for name, parts in by_name.items():
            chunks = [ChunkStorageMetadata(Size(p.offsets), Size(p.shape)) for p in parts]
            properties = TensorProperties(dtype=_dtype(parts[0]))
            shape = Size(whole_shape(name, parts))
            self.tensors[name] = TensorStorageMetadata(properties, shape, chunks)

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
        by_file: dict[str, list[tuple[Part, Any]]] = {}
        for item in plan.items:
            name, part = self._parts[_key(item.storage_index)]
            by_file.setdefault(name, []).append((part, item))
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


def _head(uri: str) -> io.BytesIO:
    """The header of a file, unread."""

    def read() -> bytes:
        with storage.open_read(uri) as file:
            length = file.read(8)
            return length + file.read(min(int.from_bytes(length, "little"), _MAX_HEADER_BYTES))

    return io.BytesIO(storage.on_store(uri, read))


def _read(uri: str, wanted: list[tuple[Part, Any]], planner: LoadPlanner) -> None:
    with storage.open_read(uri) as file:
        for part, item in wanted:
            target = planner.resolve_tensor(item).detach()
            rows = _rows(uri, file, part, tuple(item.storage_offsets), tuple(item.lengths))
            target.copy_(rows.reshape(target.shape))
            planner.commit_tensor(item, target)


def _rows(
    uri: str, file: Any, part: Part, offsets: tuple[int, ...], lengths: tuple[int, ...]
) -> torch.Tensor:
    """The box ``lengths`` at ``offsets`` of a part; of the file, only its rows are read."""
    first, count = (offsets[0], lengths[0]) if part.shape else (0, 1)
    dtype = _dtype(part)
    row_bytes = math.prod(part.shape[1:]) * dtype.itemsize
    buffer = torch.empty(count * row_bytes, dtype=torch.uint8)
    file.seek(part.start + first * row_bytes)
    view = buffer.numpy().data
    while len(view):
        num_read = file.readinto(view)
        if not num_read:
            # No OSError, after which a store would be asked again for minutes.
            raise TrainingError(
                f"The training state's file '{uri}' ends early, at byte {file.tell():,}; remove "
                "its folder, and the state before it is used."
            )
        view = view[num_read:]
    rows = buffer.view(dtype).reshape(lengths[:1] + part.shape[1:])
    for dim in range(1, len(lengths)):
        rows = rows.narrow(dim, offsets[dim], lengths[dim])
    return rows
