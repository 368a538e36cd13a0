"""Folders of ``torch.distributed.checkpoint`` (DCP), read without executing a pickle.

A folder holds ``.metadata`` and ``*.distcp`` files. ``.metadata`` is a pickle of a few dataclasses:
which tensors there are, in which pieces, and where each piece lies. It is read by an unpickler that
imports nothing: it knows the names of those classes, makes records of plain data of them, and
refuses every other name. A piece is a tensor as ``torch.save`` writes it, and read with
``weights_only``. Optimizer, scheduler and data loader beside the model are passed over.
"""

from __future__ import annotations

import io
import math
import pickle
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from ke_ray.errors import CheckpointError

if TYPE_CHECKING:
    import torch

METADATA = ".metadata"
_LIMIT = 256 * 2**20  # bytes of a .metadata; OLMo-core's of a 32B model has about 10 MiB
_OTHERS = re.compile(r"(optim|optimizers?|lr_schedulers?|schedulers?|dataloader|train_state)\..*")
# torch's dtypes by the names under which safetensors has them.
DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}


class _Record:
    """What stands for an instance of a known class: its attributes, or the tuple of its state."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def get(self, name: str) -> Any:
        return self.state[name]


def _plain(value: object) -> object:
    return value


def _joined(*parts: str) -> str:
    return "/".join(parts)


_CLASSES: dict[tuple[str, str], Any] = {
    **{
        ("torch.distributed.checkpoint.metadata", name): _Record
        for name in (
            *("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"),
            *("TensorProperties", "MetadataIndex", "StorageMeta"),
        )
    },
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"): _plain,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _Record,
    ("olmo_core.distributed.checkpoint.filesystem", "_StorageInfo"): _Record,
    ("torch.serialization", "_get_layout"): _plain,
    ("torch", "Size"): tuple,
    **{("torch", name): name for name in DTYPES},
    ("collections", "OrderedDict"): dict,
    **{
        (module, name): _joined
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")
    },
}


# In Python, because the unpickler in C allocates as much memory as an index in the file says.
class _Reader(pickle._Unpickler):
    """An unpickler that imports nothing and calls only what ``_CLASSES`` names."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _CLASSES[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}") from None


@dataclass(frozen=True)
class TensorPiece:
    """A part of a tensor: its offsets and sizes in it, and its bytes in a file."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    num_bytes: int


@dataclass(frozen=True)
class StoredTensor:
    """Shape, safetensors' name of the dtype, and pieces of a tensor."""

    shape: tuple[int, ...]
    dtype: str
    pieces: tuple[TensorPiece, ...]

    def get_shape(self) -> tuple[int, ...]:
        """As a slice of safetensors has it."""
        return self.shape

    def get_dtype(self) -> str:
        """As a slice of safetensors has it."""
        return self.dtype


class DcpFile:
    """The model's tensors of a DCP folder, with the methods of an open safetensors file.

    Raises:
        CheckpointError: ``.metadata`` is missing, malformed or holds anything but metadata.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tensors = dict(_model_tensors(folder / METADATA))

    def keys(self) -> list[str]:
        """Names as they were stored."""
        return list(self._tensors)

    def spans(self) -> list[tuple[Path, int, int]]:
        """File, first byte and bytes of every piece, in the order of names and offsets."""
        pieces = [
            piece
            for name in sorted(self._tensors)
            for piece in sorted(self._tensors[name].pieces, key=lambda piece: piece.offsets)
        ]
        return [(self._folder / piece.file, piece.start, piece.num_bytes) for piece in pieces]

    def get_slice(self, name: str) -> StoredTensor:
        """Shape and dtype of a tensor."""
        return self._tensors[name]

    def get_tensor(self, name: str) -> torch.Tensor:
        """A tensor put together from its pieces."""
        import torch

        stored = self._tensors[name]
        result = None
        for piece in stored.pieces:
            values = self._read(piece)
            if piece.sizes == stored.shape:
                return values
            if result is None:
                result = torch.empty(stored.shape, dtype=values.dtype)
            region = zip(piece.offsets, piece.sizes, strict=True)
            result[tuple(slice(start, start + size) for start, size in region)] = values
        assert result is not None  # pieces were counted when the metadata was read
        return result

    def _read(self, piece: TensorPiece) -> torch.Tensor:
        import torch

        path = self._folder / piece.file
        if not path.is_file():
            raise CheckpointError(f"The file '{path}' is missing; copy the checkpoint again.")
        with path.open("rb") as file:
            file.seek(piece.start)
            content = io.BytesIO(file.read(piece.num_bytes))
        values = torch.load(content, map_location="cpu", weights_only=True)
        if not isinstance(values, torch.Tensor) or tuple(values.shape) != piece.sizes:
            raise CheckpointError(f"'{path}' holds another piece than {METADATA} says.")
        return values.detach()


def _model_tensors(path: Path) -> Iterator[tuple[str, StoredTensor]]:
    convert = (
        "If you trust it, convert it with `python -m torch.distributed.checkpoint.format_utils "
        "dcp_to_torch FOLDER model.pt`."
    )
    if path.stat().st_size > _LIMIT:
        raise CheckpointError(f"'{path}' has more than {_LIMIT:,} bytes. {convert}")
    try:
        metadata = _Reader(io.BytesIO(path.read_bytes())).load()
        tensors = metadata.get("state_dict_metadata")
        pieces: dict[str, list[tuple[_Record, _Record]]] = {}
        for index, info in metadata.get("storage_data").items():
            pieces.setdefault(index.get("fqn"), []).append((index, info))
        found = [
            (name, _stored(entry, pieces[name]))
            for name, entry in tensors.items()
            if not _OTHERS.fullmatch(name) and "properties" in (entry.state or ())
        ]
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"'{path}' is a pickle with more than the metadata of tensors ({error}). It was "
            f"refused and nothing of it was executed. {convert}"
        ) from error
    except Exception as error:  # whatever bytes of another kind cause
        raise CheckpointError(
            f"'{path}' is truncated or not the metadata of a distributed checkpoint "
            f"({type(error).__name__}: {error}). Copy it again. {convert}"
        ) from error
    yield from found


def _stored(entry: _Record, pieces: list[tuple[_Record, _Record]]) -> StoredTensor:
    shape = tuple(entry.get("size"))
    sizes = {
        tuple(chunk.get("offsets")): tuple(chunk.get("sizes")) for chunk in entry.get("chunks")
    }
    result = []
    for index, info in pieces:
        offsets = tuple(index.get("offset") or (0,) * len(shape))
        if info.state.get("transform_descriptors"):
            raise ValueError("its files are compressed")
        file = info.get("relative_path")
        if file != PurePosixPath(file).name:
            raise ValueError(f"'{file}' is not a file of its folder")
        own = sizes[offsets]
        if not all(
            0 <= o <= o + s <= whole for o, s, whole in zip(offsets, own, shape, strict=True)
        ):
            raise ValueError("a piece does not lie in its tensor")
        result.append(TensorPiece(offsets, own, file, info.get("offset"), info.get("length")))
    unique = {piece.offsets: piece for piece in result}
    if sum(math.prod(piece.sizes) for piece in unique.values()) != math.prod(shape):
        raise ValueError("a tensor is not whole")
    # State of TensorProperties: dtype, layout, requires_grad, memory format, pinned.
    properties = entry.get("properties").state
    dtype = properties["dtype"] if isinstance(properties, dict) else properties[0]
    return StoredTensor(shape, DTYPES[dtype], tuple(unique.values()))
