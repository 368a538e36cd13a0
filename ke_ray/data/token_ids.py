"""Ready-made token ids: the first N instances of a file, in file order, without a tokenizer.

Parquet with a list column ``input_ids`` and optional ``attention_mask``; ``.npy`` [N, W];
safetensors with ``input_ids`` and optional ``attention_mask``. ``file#ids`` or ``file#ids,mask``
names other columns or tensors.

Masks of any form (left, right, holes) are compacted: real tokens move to the front and keep their
order, so that padding side and padding id change nothing. T cuts each row to its first T real
tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ke_ray.data.packing import check_vocabulary
from ke_ray.data.sources import SourceFile, list_files, reading, split_part
from ke_ray.data.stored_array import StoredArray, npy_array, safetensors_arrays
from ke_ray.errors import DataError

TOKEN_ID_SUFFIXES = (".npy", ".safetensors", ".parquet")
_ROWS = 1024

Rows = tuple[NDArray[Any], NDArray[Any] | None]  # ids and mask, each [n, W]


def iter_token_ids(
    source: str,
    *,
    num_instances: int | None,
    vocab_size: int | None = None,
) -> Iterator[tuple[NDArray[Any], NDArray[np.int32]]]:
    """Blocks of instances in file order: right-padded ids [k, W] and ``lengths`` [k] int32.

    Blocks have about 1,024 rows; W may differ between blocks of ragged Parquet rows.

    Args:
        source: a file, folder, glob or URL, with an optional ``#ids,mask``.
        num_instances: read at most this many; None reads all.
        vocab_size: of the model; None checks only that ids are not negative.

    Raises:
        DataError: no such file or tensor, not integers, a row without a real token, an id outside
            the vocabulary (instance and position are named).
    """
    base, part = split_part(source)
    names = [name.strip() for name in part.split(",")] if part else []
    if len(names) > 2:
        raise DataError(f"'{source}': '#' takes one name for the ids and one for the mask.")
    count = 0
    for file in list_files(base, TOKEN_ID_SUFFIXES):
        limit = None if num_instances is None else num_instances - count
        for ids, mask in _read_rows(file, names, limit):
            limit = None if num_instances is None else num_instances - count
            compacted, lengths = compact(
                ids[:limit],
                None if mask is None else mask[:limit],
                name=file.url,
                first_instance=count,
            )
            check_vocabulary(compacted, lengths, vocab_size, origin=file.url, first_instance=count)
            count += len(compacted)
            yield compacted, lengths
            if count == num_instances:
                return


def load_token_ids(
    source: str,
    *,
    num_instances: int | None,
    sequence_length: int | None,
    vocab_size: int | None = None,
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """The first N instances as ``input_ids`` [N, T] int32 (right padded with 0) and ``lengths``.

    Args:
        num_instances: N; None takes all.
        sequence_length: T, at most the file's width W; None means W.

    Raises:
        DataError: N or T larger than the file has, and whatever ``iter_token_ids`` refuses.
    """
    if (num_instances is not None and num_instances < 1) or (
        sequence_length is not None and sequence_length < 1
    ):
        raise DataError(
            f"{num_instances} instances of {sequence_length} tokens were requested of '{source}'; "
            "both must be at least 1."
        )
    blocks, width = [], 0
    for ids, lengths in iter_token_ids(source, num_instances=num_instances, vocab_size=vocab_size):
        width = max(width, ids.shape[1])
        cut = lengths if sequence_length is None else np.minimum(lengths, sequence_length)
        blocks.append((ids[:, :sequence_length].astype(np.int32), cut.astype(np.int32)))
    count = sum(len(ids) for ids, _ in blocks)
    if count < (num_instances or 1):
        raise DataError(
            f"{num_instances or 1} instances were requested, but '{source}' holds {count}; request "
            "fewer or give more data."
        )
    if sequence_length is not None and sequence_length > width:
        raise DataError(
            f"A sequence length of {sequence_length} was requested, but the rows of '{source}' "
            f"hold at most {width} tokens; request {width} or less."
        )
    input_ids = np.zeros((count, sequence_length or width), np.int32)
    start = 0
    for ids, _ in blocks:
        input_ids[start : start + len(ids), : ids.shape[1]] = ids
        start += len(ids)
    return input_ids, np.concatenate([lengths for _, lengths in blocks])


def compact(
    input_ids: NDArray[Any],
    attention_mask: NDArray[Any] | None,
    *,
    name: str = "the token ids",
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
                f"{name}: the mask has shape {list(attention_mask.shape)}, the ids "
                f"{list(input_ids.shape)}; they must be the same."
            )
        is_real = attention_mask.astype(bool)
        if not np.array_equal(attention_mask, is_real):
            raise DataError(f"{name}: the mask holds other values than 0 and 1.")
        lengths = is_real.sum(axis=1).astype(np.int32)
        result = input_ids
        if not is_real.all():
            order = np.argsort(~is_real, axis=1, kind="stable")
            result = np.take_along_axis(input_ids, order, axis=1)
            result[np.arange(input_ids.shape[1]) >= lengths[:, None]] = 0
    if len(lengths) and lengths.min() < 1:
        row = first_instance + int(np.argmin(lengths))
        raise DataError(f"{name}: instance {row} has no real token; remove it.")
    return result, lengths


def _read_rows(file: SourceFile, names: list[str], limit: int | None) -> Iterator[Rows]:
    path = file.path.lower()
    if path.endswith(".npy"):
        if names:
            raise DataError(f"'{file.url}#{','.join(names)}': a .npy file has no named parts.")
        yield from _read_stored([npy_array(file)], limit)
    elif path.endswith(".safetensors"):
        arrays = safetensors_arrays(file)
        yield from _read_stored([arrays[name] for name in _pick(arrays, names, file.url)], limit)
    elif path.endswith(".parquet"):
        yield from _read_parquet(file, names, limit)
    else:
        raise DataError(
            f"'{file.url}' holds no token ids: expected {', '.join(TOKEN_ID_SUFFIXES)}."
        )


def _read_stored(arrays: list[StoredArray], limit: int | None) -> Iterator[Rows]:
    for array, kinds in zip(arrays, ("iu", "iub"), strict=False):
        if len(array.shape) != 2 or min(array.shape) < 1 or array.dtype.kind not in kinds:
            raise DataError(
                f"'{array.file.url}': '{array.name}' has shape {list(array.shape)} and type "
                f"{array.dtype}; expected [instances, tokens] of integers."
            )
    count = arrays[0].shape[0]
    if arrays[-1].shape[0] != count:
        raise DataError(f"'{arrays[0].file.url}': the ids and their mask differ in shape.")
    count = count if limit is None else min(limit, count)
    for start in range(0, count, _ROWS):
        stop = min(start + _ROWS, count)
        yield (
            arrays[0].read_rows(start, stop),
            arrays[1].read_rows(start, stop) if len(arrays) == 2 else None,
        )


def _pick(available: Iterable[str], names: list[str], url: str) -> list[str]:
    """The names of the ids and (where there is one) the mask."""
    available = list(available)
    mask_names = ["attention_mask"] if "attention_mask" in available else []
    names = names or ["input_ids", *mask_names]
    for name in names:
        if name not in available:
            raise DataError(
                f"'{url}' has no '{name}' (it has: {', '.join(sorted(available)[:12])}); name the "
                "ids and the mask with '#IDS,MASK'."
            )
    return names


def _read_parquet(file: SourceFile, names: list[str], limit: int | None) -> Iterator[Rows]:
    import pyarrow  # not at the top: slow to import, and other formats do not need it
    import pyarrow.parquet as parquet

    try:
        with reading(file.url), file.filesystem.open(file.path, "rb") as handle:
            table = parquet.ParquetFile(handle)
            columns = _pick(table.schema_arrow.names, names, file.url)
            rows = min(_ROWS, limit or _ROWS)
            for batch in table.iter_batches(batch_size=rows, columns=columns):
                ids, is_filled = _pad(batch.column(columns[0]), file.url)
                if len(columns) == 1:
                    yield ids, is_filled
                    continue
                mask, is_mask_filled = _pad(batch.column(columns[1]), file.url)
                if not np.array_equal(is_mask_filled, is_filled):
                    raise DataError(f"'{file.url}': a mask and its ids differ in length.")
                yield ids, mask * is_filled
    except pyarrow.ArrowException as error:
        raise DataError(f"'{file.url}' is not a readable Parquet file: {error}.") from error


def _pad(column: Any, url: str) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """A list column as [n, W] with zeros behind short rows, and which positions are filled."""
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
        raise DataError(f"'{url}': a column has type {kind}, expected lists of integers.")
    values = column.flatten()
    if column.null_count or values.null_count:
        raise DataError(f"'{url}': a list of token ids has empty (null) positions.")
    lengths = compute.list_value_length(column).to_numpy(zero_copy_only=False)
    width = int(lengths.max()) if len(lengths) else 0
    is_filled = np.arange(width) < lengths[:, None]
    flat = values.to_numpy(zero_copy_only=False)
    padded = np.zeros(is_filled.shape, np.int64 if flat.dtype.kind == "b" else flat.dtype)
    padded[is_filled] = flat
    return padded, is_filled
