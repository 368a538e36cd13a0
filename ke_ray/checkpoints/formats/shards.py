"""Parts of tensors in safetensors files, as ``torch.distributed.checkpoint`` lays them out.

Each worker of a training run writes one file, whose header says where its parts lie in the whole
tensors, in the words of torch's ``HuggingFaceStorageWriter``::

    bytes 0–7     length of the header, little-endian
    header        JSON: "<tensor>": {dtype, shape, data_offsets}, and ``__metadata__`` with
                  DCP_SHARDING_INFO: {"<tensor>": {"saved_offsets": [first row, 0, …]}}
    the rest      the tensors' bytes

A file without DCP_SHARDING_INFO holds whole tensors. No pickle is involved.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ke_ray.checkpoints.formats.dcp import DTYPES, DcpFile, StoredTensor, TensorPiece
from ke_ray.errors import CheckpointError, StorageError
from ke_ray.storage import parse_json, read_json

if TYPE_CHECKING:
    import torch

STATE = "state.json"
SHARDS = "shard-*.safetensors"
#: The generators of random numbers in a training state, of rank r.
GENERATOR = re.compile(r"rank(\d+)\.(cpu|cuda)")
_SHARDING = "DCP_SHARDING_INFO"
_MAX_HEADER_BYTES, _MAX_DIMENSIONS = 100 * 2**20, 64
#: Bytes of an element, by safetensors' name of its type.
_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1}
_ITEM_BYTES |= {"U8": 1, "BOOL": 1}


@dataclass(frozen=True)
class Part:
    """A part of a tensor: its place there, and in its file (``start`` in bytes)."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: str
    start: int
    num_bytes: int


def header_bytes(parts: Mapping[str, tuple[str, list[int], list[int], int]]) -> bytes:
    """The beginning of a file.

    Args:
        parts: by tensor, in the order of their bytes: safetensors' name of the type, shape,
            offsets in the whole tensor and number of bytes.
    """
    sharding = {name: {"saved_offsets": part[2]} for name, part in parts.items()}
    header: dict[str, Any] = {
        "__metadata__": {"format": "pt", "DCP_VERSION": "1.0", _SHARDING: json.dumps(sharding)}
    }
    start = 0
    for name, (dtype, shape, _, num_bytes) in parts.items():
        stop = start + num_bytes
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at multiples of eight, as the format wants
    return len(text).to_bytes(8, "little") + text


def read_header(file: BinaryIO, size: int) -> dict[str, Part]:
    """The parts in a file of ``size`` bytes, by tensor.

    Raises:
        ValueError, LookupError, TypeError, AttributeError: it is malformed.
    """
    length = int.from_bytes(file.read(8), "little")
    if length > min(_MAX_HEADER_BYTES, size - 8):
        raise ValueError("it is no safetensors file")
    header = parse_json(file.read(length))
    offsets = parse_json(header.pop("__metadata__", {}).get(_SHARDING, "null"))
    parts = {}
    for name, entry in header.items():
        shape, (start, stop) = tuple(entry["shape"]), entry["data_offsets"]
        own = tuple(offsets[name]["saved_offsets"]) if offsets else (0,) * len(shape)
        numbers = (*shape, *own, start, stop)
        is_sane = len(own) == len(shape) <= _MAX_DIMENSIONS and all(
            type(number) is int and 0 <= number < 2**62 for number in numbers
        )
        if not is_sane or stop > size - 8 - length:
            raise ValueError(f"'{name}' is malformed")
        if stop - start != math.prod(shape) * _ITEM_BYTES[entry["dtype"]]:
            raise ValueError(f"'{name}' has another size than its shape says")
        parts[name] = Part(own, shape, entry["dtype"], 8 + length + start, stop - start)
    return parts


def whole_shape(name: str, parts: list[Part]) -> tuple[int, ...]:
    """The shape of a tensor from all its parts.

    Raises:
        ValueError: a part is missing.
    """
    ends = [tuple(o + s for o, s in zip(p.offsets, p.shape, strict=True)) for p in parts]
    shape = tuple(max(sizes) for sizes in zip(*ends, strict=True))
    if sum(math.prod(part.shape) for part in parts) != math.prod(shape):
        raise ValueError(f"parts of '{name}' are missing")
    return shape


class StateFile(DcpFile):
    """The model's tensors of a training state of ke_ray's, put together from the workers' files.

    Raises:
        CheckpointError: a file is missing or malformed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tensors = {}
        self._dtypes: dict[TensorPiece, str] = {}
        parts: dict[str, list[tuple[str, Part]]] = {}
        try:
            for name, size in read_json(folder / STATE)["sizes"].items():
                if not name.endswith(".safetensors") or name != Path(name).name:
                    continue
                if (folder / name).stat().st_size != size:
                    raise ValueError(f"'{name}' has not the {size} bytes that were written")
                with (folder / name).open("rb") as file:
                    for tensor, part in read_header(file, size).items():
                        if "::" not in tensor and not GENERATOR.fullmatch(tensor):
                            parts.setdefault(tensor, []).append((name, part))
            for tensor, own in parts.items():
                self._add(tensor, own)
        except (
            *(OSError, ValueError, LookupError, TypeError, AttributeError, StorageError),
        ) as error:
            raise CheckpointError(
                f"The training state '{folder}' is not whole: {error}. Use another one."
            ) from error

    def _add(self, tensor: str, parts: list[tuple[str, Part]]) -> None:
        shape = whole_shape(tensor, [part for _, part in parts])
        pieces = tuple(
            TensorPiece(part.offsets, part.shape, name, part.start, part.num_bytes)
            for name, part in parts
        )
        self._dtypes |= {piece: part.dtype for piece, (_, part) in zip(pieces, parts, strict=True)}
        self._tensors[tensor] = StoredTensor(shape, parts[0][1].dtype, pieces)

    def _read(self, piece: TensorPiece) -> torch.Tensor:
        import torch

        content = torch.empty(piece.num_bytes, dtype=torch.uint8)
        with (self._folder / piece.file).open("rb") as file:
            file.seek(piece.start)
            if file.readinto(content.numpy().data) != piece.num_bytes:
                raise CheckpointError(f"'{self._folder / piece.file}' ends early.")
        dtype = next(name for name, own in DTYPES.items() if own == self._dtypes[piece])
        return content.view(getattr(torch, dtype)).reshape(piece.sizes)
