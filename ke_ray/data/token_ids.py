"""Ready-made token ids: the first N instances of a file, in file order, without a tokenizer.

Parquet with a list column ``input_ids`` and optional ``attention_mask``; ``.npy`` [N, W];
safetensors with ``input_ids`` and optional ``attention_mask``. ``file#ids`` or ``file#ids,mask``
names other columns or tensors.

Masks of any form (left, right, holes) are compacted: real tokens move to the front in their order,
so that padding side and padding id change nothing. T cuts each row to its first T real tokens.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ke_ray.data.packing import check_vocabulary
from ke_ray.data.sources import SourceFile, list_files, reading, split_part
from ke_ray.errors import DataError

__all__ = ["TOKEN_ID_SUFFIXES", "compact", "load_token_ids"]

TOKEN_ID_SUFFIXES = (".npy", ".safetensors", ".parquet")
_PARQUET_ROWS = 1024
_NPY_HEADER = 12 + (1 << 16)  # magic, version, length and the longest header of version 1

Rows = tuple[NDArray[Any], NDArray[Any] | None]  # ids and mask, each [n, W]


def load_token_ids(
    source: str,
    *,
    num_instances: int | None,
    sequence_length: int | None,
    vocab_size: int | None = None,
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """The first N instances as ``input_ids`` [N, T] int32 (right padded with 0) and ``lengths``.

    Args:
        source: a file, folder, glob or URL, with an optional ``#ids,mask``.
        num_instances: N; None takes all.
        sequence_length: T, at most the file's width W; None means W.
        vocab_size: of the model; None checks only that ids are not negative.

    Raises:
        DataError: no such file or tensor, not integers, N or T larger than the file has, a row
            without a real token, an id outside the vocabulary (instance and position are named).
    """
    if (num_instances is not None and num_instances < 1) or (
        sequence_length is not None and sequence_length < 1
    ):
        raise DataError(
            f"{num_instances} instances of {sequence_length} tokens were asked of '{source}'; both "
            "must be at least 1."
        )
    base, part = split_part(source)
    names = [name.strip() for name in part.split(",")] if part else []
    if len(names) > 2:
        raise DataError(f"'{source}': '#' takes one name for the ids and one for the mask.")
    parts: list[tuple[NDArray[np.int32], NDArray[np.int32]]] = []
    found, width = 0, 0
    for file in list_files(base, TOKEN_ID_SUFFIXES):
        wanted = None if num_instances is None else num_instances - found
        for ids, mask in _read_rows(file, names, wanted):
            _check_integers(ids, mask, file.url)
            ids, mask = ids[:wanted], None if mask is None else mask[:wanted]
            width = max(width, ids.shape[1])
            compacted, lengths = compact(ids, mask, where=file.url, first_instance=found)
            check_vocabulary(compacted, lengths, vocab_size, where=file.url, first_instance=found)
            if sequence_length is not None:
                compacted = compacted[:, :sequence_length]
                lengths = np.minimum(lengths, sequence_length)
            parts.append((compacted.astype(np.int32), lengths))
            found += len(compacted)
            wanted = None if num_instances is None else num_instances - found
            if wanted == 0:
                break
        if wanted == 0:
            break
    if not found or (num_instances is not None and found < num_instances):
        raise DataError(f"'{source}' holds {found} instances; {num_instances or 1} were asked.")
    if sequence_length is not None and sequence_length > width:
        raise DataError(
            f"The rows of '{source}' hold at most {width} tokens; {sequence_length} were asked. "
            f"Ask for a sequence length of {width} or less."
        )
    columns = min(width, sequence_length or width)
    input_ids = np.zeros((found, columns), np.int32)
    start = 0
    for compacted, _ in parts:
        stop = start + len(compacted)
        input_ids[start:stop, : compacted.shape[1]] = compacted
        start = stop
    return input_ids, np.concatenate([lengths for _, lengths in parts])


def compact(
    input_ids: NDArray[Any],
    attention_mask: NDArray[Any] | None,
    *,
    where: str = "the token ids",
    first_instance: int = 0,
) -> tuple[NDArray[Any], NDArray[np.int32]]:
    """Move the real tokens of each row to the front; what follows becomes 0.

    Args:
        input_ids: [n, W] integers.
        attention_mask: [n, W] of 0 and 1 (or booleans), 1 for a real token; None: all are real.

    Returns:
        ids [n, W] of the same dtype, and ``lengths`` [n] int32, each at least 1.

    Raises:
        DataError: a mask of another shape or with other values, or a row without a real token.
    """
    if attention_mask is None:
        lengths = np.full(len(input_ids), input_ids.shape[1], np.int32)
        result = input_ids
    else:
        if attention_mask.shape != input_ids.shape:
            raise DataError(
                f"{where}: the mask has shape {list(attention_mask.shape)}, the ids "
                f"{list(input_ids.shape)}; they must be the same."
            )
        real = attention_mask.astype(bool)
        if not np.array_equal(attention_mask, real):
            raise DataError(f"{where}: the mask holds other values than 0 and 1.")
        lengths = real.sum(axis=1).astype(np.int32)
        result = input_ids
        if not real.all():
            order = np.argsort(~real, axis=1, kind="stable")
            result = np.take_along_axis(input_ids, order, axis=1)
            result[np.arange(input_ids.shape[1]) >= lengths[:, None]] = 0
    if len(lengths) and lengths.min() < 1:
        row = first_instance + int(np.argmin(lengths))
        raise DataError(f"{where}: instance {row} has no real token; remove it.")
    return result, lengths


def _check_integers(ids: NDArray[Any], mask: NDArray[Any] | None, where: str) -> None:
    if ids.ndim != 2 or ids.dtype.kind not in "iu":
        raise DataError(
            f"'{where}': the token ids have shape {list(ids.shape)} and type {ids.dtype}; "
            "expected [instances, tokens] of integers."
        )
    if mask is not None and (mask.ndim != 2 or mask.dtype.kind not in "iub"):
        raise DataError(
            f"'{where}': the mask has shape {list(mask.shape)} and type {mask.dtype}; expected "
            "[instances, tokens] of 0 and 1."
        )


def _read_rows(file: SourceFile, names: list[str], wanted: int | None) -> Iterator[Rows]:
    path = file.path.lower()
    if path.endswith(".npy"):
        if names:
            raise DataError(f"'{file.url}#{','.join(names)}': a .npy file has no named parts.")
        yield _read_npy(file, wanted), None
    elif path.endswith(".safetensors"):
        yield _read_safetensors(file, names)
    elif path.endswith(".parquet"):
        yield from _read_parquet(file, names, wanted)
    else:
        raise DataError(
            f"'{file.url}' holds no token ids: expected {', '.join(TOKEN_ID_SUFFIXES)}."
        )


def _read_npy(file: SourceFile, wanted: int | None) -> NDArray[Any]:
    """Rows of a ``.npy`` file: the header and the bytes of the rows asked, no more."""
    with reading(file.url):
        size = int(file.filesystem.info(file.path)["size"])
        head = bytes(file.filesystem.cat_file(file.path, start=0, end=min(_NPY_HEADER, size)))
    if not head.startswith(b"\x93NUMPY"):
        raise DataError(
            f"'{file.url}' has no .npy header. Headerless uint16 files in OLMo's order are "
            "described in a YAML file with the key 'olmo' (see docs/data.md)."
        )
    try:
        version = head[6]
        prefix = 10 if version == 1 else 12
        start = prefix + int.from_bytes(head[8:prefix], "little")
        header = ast.literal_eval(head[prefix:start].decode("latin-1").strip())
        shape, dtype = tuple(int(n) for n in header["shape"]), np.dtype(header["descr"])
        fortran = bool(header["fortran_order"])
    except (ValueError, SyntaxError, LookupError, TypeError, RecursionError, MemoryError) as error:
        raise DataError(f"'{file.url}' has a damaged .npy header: {error}.") from error
    if dtype.kind not in "iu" or len(shape) != 2 or min(shape) < 1:
        raise DataError(
            f"'{file.url}' has shape {list(shape)} and type {dtype}; expected "
            "[instances, tokens] of integers."
        )
    rows = shape[0] if wanted is None or fortran else min(wanted, shape[0])
    end = start + rows * shape[1] * dtype.itemsize
    if start + shape[0] * shape[1] * dtype.itemsize > size:
        raise DataError(f"'{file.url}' is cut off: shorter than its header says.")
    with reading(file.url):
        data = bytes(file.filesystem.cat_file(file.path, start=start, end=end))
    if len(data) != end - start:
        raise DataError(f"'{file.url}': {len(data)} bytes came for {end - start} asked.")
    array: NDArray[Any] = np.frombuffer(data, dtype)
    return array.reshape(shape[::-1]).T if fortran else array.reshape(rows, shape[1])


def _read_safetensors(file: SourceFile, names: list[str]) -> Rows:
    import safetensors
    import safetensors.numpy

    with reading(file.url):
        data = bytes(file.filesystem.cat_file(file.path))
    try:
        tensors = safetensors.numpy.load(data)
    except (safetensors.SafetensorError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"'{file.url}' is not a readable safetensors file: {error}.") from error
    return _pick(tensors, names, file.url)


def _pick(tensors: dict[str, NDArray[Any]], names: list[str], where: str) -> Rows:
    wanted = names or ["input_ids", *(["attention_mask"] if "attention_mask" in tensors else [])]
    for name in wanted:
        if name not in tensors:
            raise DataError(
                f"'{where}' has no '{name}' (it has: {', '.join(sorted(tensors)[:12])}); name the "
                "ids and the mask with '#IDS,MASK'."
            )
    return tensors[wanted[0]], tensors[wanted[1]] if len(wanted) > 1 else None


def _read_parquet(file: SourceFile, names: list[str], wanted: int | None) -> Iterator[Rows]:
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        with reading(file.url), file.filesystem.open(file.path, "rb") as handle:
            table = parquet.ParquetFile(handle)
            present = dict.fromkeys(table.schema_arrow.names, np.empty((0, 0)))
            _pick(present, names, file.url)
            columns = names or [n for n in ("input_ids", "attention_mask") if n in present]
            rows = min(_PARQUET_ROWS, wanted or _PARQUET_ROWS)
            for batch in table.iter_batches(batch_size=rows, columns=columns):
                ids, real = _pad(batch.column(columns[0]), file.url)
                if len(columns) == 1:
                    yield ids, real
                    continue
                mask, placed = _pad(batch.column(columns[1]), file.url)
                if mask.shape != ids.shape or not np.array_equal(placed, real):
                    raise DataError(f"'{file.url}': a mask and its ids differ in length.")
                yield ids, mask * real
    except pyarrow.ArrowException as error:
        raise DataError(f"'{file.url}' is not a readable Parquet file: {error}.") from error


def _pad(column: Any, where: str) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """A list column as [n, W] with zeros behind short rows, and which places are filled."""
    import pyarrow
    import pyarrow.compute as compute

    kind = column.type
    if not (
        pyarrow.types.is_list(kind)
        or pyarrow.types.is_large_list(kind)
        or pyarrow.types.is_fixed_size_list(kind)
    ) or not (
        pyarrow.types.is_integer(kind.value_type) or pyarrow.types.is_boolean(kind.value_type)
    ):
        raise DataError(f"'{where}': a column has type {kind}, expected lists of integers.")
    values = column.flatten()
    if column.null_count or values.null_count:
        raise DataError(f"'{where}': a list of token ids has empty (null) places.")
    lengths = compute.list_value_length(column).to_numpy(zero_copy_only=False)
    width = int(lengths.max()) if len(lengths) else 0
    filled = np.arange(width) < lengths[:, None]
    flat = values.to_numpy(zero_copy_only=False)
    padded = np.zeros(filled.shape, np.int64 if flat.dtype.kind == "b" else flat.dtype)
    padded[filled] = flat
    return padded, filled
