"""Arrays in ``.npy`` and safetensors files, read by ranges of rows through fsspec.

Nothing is unpickled: the type in an object array's header is refused, and a safetensors header is
JSON.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ke_ray.data.sources import SourceFile, reading
from ke_ray.errors import DataError
from ke_ray.storage import parse_json

_NPY_HEADER_BYTES = 12 + (1 << 16)  # magic, version, length, and the longest header of version 1
_MAX_DIMENSIONS = 64
_MAX_HEADER_BYTES = 100 << 20  # what the safetensors format allows
_SAFETENSORS_TYPES = {
    "BOOL": "?",
    "U8": "u1",
    "I8": "i1",
    "U16": "<u2",
    "I16": "<i2",
    "U32": "<u4",
    "I32": "<i4",
    "U64": "<u8",
    "I64": "<i8",
    "F16": "<f2",
    "F32": "<f4",
    "F64": "<f8",
}


@dataclass(frozen=True)
class StoredArray:
    """An array of ``shape`` and ``dtype`` from byte ``start`` of ``file`` on."""

    file: SourceFile
    name: str
    start: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    is_fortran: bool = False

    def read_rows(self, first: int, stop: int) -> NDArray[Any]:
        """Rows [first, stop), no other bytes (a Fortran-ordered array is read whole).

        Raises:
            DataError: the file cannot be read or gives another number of bytes.
        """
        row_bytes = prod(self.shape[1:]) * self.dtype.itemsize
        if self.is_fortran:
            data = _read_range(self.file, self.start, self.start + self.shape[0] * row_bytes)
            whole: NDArray[Any] = np.frombuffer(data, self.dtype).reshape(self.shape[::-1]).T
            return whole[first:stop]
        start, end = self.start + first * row_bytes, self.start + stop * row_bytes
        array: NDArray[Any] = np.frombuffer(_read_range(self.file, start, end), self.dtype)
        return array.reshape((stop - first, *self.shape[1:]))


def _read_range(file: SourceFile, start: int, end: int) -> bytes:
    with reading(file.url):
        data = bytes(file.filesystem.cat_file(file.path, start=start, end=end))
    check_range(data, file, start, end)
    return data


def check_range(data: bytes, file: SourceFile, start: int, end: int) -> None:
    """Raise a DataError unless ``data`` has the length of bytes [start, end) of ``file``."""
    if len(data) != end - start:
        raise DataError(
            f"'{file.url}': {len(data)} bytes came for the {end - start} requested from byte "
            f"{start} on. The file is cut off, or its server does not serve ranges."
        )


def file_size(file: SourceFile) -> int:
    """Bytes of a file.

    Raises:
        DataError: there is no such file, or its server does not give its size.
    """
    with reading(file.url):
        size = file.filesystem.size(file.path)
    if size is None:
        raise DataError(
            f"The server of '{file.url}' does not say how long the file is; download the file and "
            "name the local copy."
        )
    return int(size)


def npy_array(file: SourceFile) -> StoredArray:
    """The array of a ``.npy`` file, from its header.

    Raises:
        DataError: no header (as OLMo's files have none), a damaged one, or a file cut off.
    """
    size = file_size(file)
    head = _read_range(file, 0, min(_NPY_HEADER_BYTES, size))
    if not head.startswith(b"\x93NUMPY"):
        raise DataError(
            f"'{file.url}' has no .npy header. Headerless uint16 files in OLMo's order are "
            "described by a YAML file with the key 'olmo' (see docs/data.md)."
        )
    try:
        prefix = 10 if head[6] == 1 else 12
        start = prefix + int.from_bytes(head[8:prefix], "little")
        header = ast.literal_eval(head[prefix:start].decode("latin-1").strip())
        shape = _sizes(header["shape"])
        dtype, is_fortran = np.dtype(header["descr"]), bool(header["fortran_order"])
    except (ValueError, SyntaxError, LookupError, TypeError, RecursionError, MemoryError) as error:
        raise DataError(f"'{file.url}' has a damaged .npy header: {error}.") from error
    if dtype.hasobject:
        raise DataError(f"'{file.url}' has shape {list(shape)} and type {dtype}: not token ids.")
    if start + prod(shape) * dtype.itemsize > size:
        raise DataError(f"'{file.url}' is cut off: shorter than its header says.")
    return StoredArray(file, "array", start, shape, dtype, is_fortran and len(shape) == 2)


def _sizes(values: Any) -> tuple[int, ...]:
    """Whole numbers of a header. (The product of a thousand long ones would take a minute.)"""
    if len(values) > _MAX_DIMENSIONS or not all(
        type(value) is int and 0 <= value < 2**63 for value in values
    ):
        raise ValueError(f"{str(values)[:60]} are not sizes")
    return tuple(values)


def safetensors_arrays(file: SourceFile) -> dict[str, StoredArray]:
    """The tensors of a safetensors file whose type numpy has, from its header.

    Raises:
        DataError: the header is damaged, or a tensor lies outside the file.
    """
    size = file_size(file)
    length = int.from_bytes(_read_range(file, 0, min(8, size)), "little")
    if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
        raise DataError(f"'{file.url}' is not a safetensors file, or is cut off.")
    try:
        header = parse_json(_read_range(file, 8, 8 + length).decode("utf-8"))
        arrays = {}
        for name, entry in header.items():
            if name == "__metadata__" or entry["dtype"] not in _SAFETENSORS_TYPES:
                continue
            dtype = np.dtype(_SAFETENSORS_TYPES[entry["dtype"]])
            shape = _sizes(entry["shape"])
            begin, end = _sizes(entry["data_offsets"])
            if (
                not 0 <= begin <= end <= size - 8 - length
                or prod(shape) * dtype.itemsize != end - begin
            ):
                raise ValueError(f"tensor '{name[:60]}' does not fit the file")
            arrays[name] = StoredArray(file, name, 8 + length + begin, shape, dtype)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(f"'{file.url}' is not a readable safetensors file: {error}.") from error
    return arrays
