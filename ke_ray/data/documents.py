"""Documents, one at a time, from files, URLs and the Hub.

A source is Dolma documents (JSON lines with a ``text`` field; plain, ``.gz`` or ``.zst``), Parquet
with a text column, a folder or glob of those, any fsspec URL, or ``hf:name[:config][:split]`` for a
dataset of the Hugging Face Hub. ``#column`` at the end names another column than ``text``.

Memory holds one document at a time (Parquet: a batch of 256 rows).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow
import pyarrow.parquet as parquet

from ke_ray.data.document import check_text, field_names, parse_document
from ke_ray.data.hub_dataset import iter_hub_documents
from ke_ray.data.sources import SourceFile, list_files, open_binary, reading, split_part
from ke_ray.errors import DataError

JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
DOCUMENT_SUFFIXES = (
    *(name + packed for name in JSON_SUFFIXES for packed in ("", ".gz", ".zst", ".zstd")),
    ".parquet",
)
MAX_LINE_BYTES = 64 << 20  # a longer line is not a document but a damaged or hostile file
_PARQUET_ROWS = 256
_WINDOW_BLOCK_BYTES = 256 << 10  # a window is not much longer; fsspec would fetch 5 MiB
_TEXT_PER_COMPRESSED = 3  # about as many bytes of JSON come of one compressed byte


def iter_documents(source: str | Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield ``(text, where)``; ``origin`` names file and line (or row) for messages.

    Args:
        source: one source, or several that are read one after the other.

    Raises:
        DataError: nothing is there; a file is damaged; a document is empty or malformed (file and
            line are named); a file holds no document at all.
    """
    for one in [source] if isinstance(source, str) else source:
        if one.startswith("hf:"):
            yield from iter_hub_documents(one)
            continue
        base, column = split_part(one)
        for file in list_files(base, DOCUMENT_SUFFIXES):
            yield from iter_file(file, column)


def iter_file(
    file: SourceFile, column: str | None = None, start: float = 0.0, stop: float = 1.0
) -> Iterator[tuple[str, str]]:
    """The documents of one file, or those that begin in a part of it; each of them is whole.

    Parts that touch share no document and leave none out.

    Args:
        column: the field or column with the text; None is ``text``.
        start, stop: the part, as fractions of the rows of a Parquet file and of the bytes of a
            plain one, and of the first bytes only (``start`` 0) of a compressed one, since nothing
            in there can be reached without all that comes before.
    """
    if file.path.lower().endswith(".parquet"):
        return _iter_parquet(file, column or "text", start, stop)
    return _iter_json_lines(file, column or "text", start, stop)


def _iter_json_lines(
    file: SourceFile, column: str, start: float, stop: float
) -> Iterator[tuple[str, str]]:
    number, num_documents, blank = 0, 0, ""
    first_byte, last_byte, block_bytes = 0, None, None
    if (start, stop) != (0.0, 1.0):
        block_bytes = _WINDOW_BLOCK_BYTES
        size = int(file.describe()["size"])
        first_byte, last_byte = round(start * size), round(stop * size)
        if file.is_compressed:
            last_byte *= _TEXT_PER_COMPRESSED
    with reading(file.url), open_binary(file, block_bytes) as handle:
        position = first_byte
        if first_byte:  # the line that holds the byte before belongs to the part before
            handle.seek(first_byte - 1)
            position -= 1
            line = b"-"
            while line and not line.endswith(b"\n"):
                line = handle.readline(MAX_LINE_BYTES)
                position += len(line)
        while (last_byte is None or position < last_byte) and (
            line := handle.readline(MAX_LINE_BYTES)
        ):
            number += 1
            origin = f"{file.url}, " + (f"byte {position}" if first_byte else f"line {number}")
            if len(line) >= MAX_LINE_BYTES:
                raise DataError(f"{origin}: longer than {MAX_LINE_BYTES >> 20} MiB.")
            position += len(line)
            if line.isspace():  # allowed at the end of a file only
                blank = blank or origin
                continue
            if blank:
                raise DataError(f"{blank}: blank where a document was expected.")
            yield parse_document(line, origin, column), origin
            num_documents += 1
    if not num_documents and last_byte is None:
        raise DataError(f"'{file.url}' holds no documents.")


def _iter_parquet(
    file: SourceFile, column: str, start: float, stop: float
) -> Iterator[tuple[str, str]]:
    number = 0
    try:
        with reading(file.url), file.filesystem.open(file.path, "rb") as handle:
            table = parquet.ParquetFile(handle)
            names = table.schema_arrow.names
            if column not in names:
                raise DataError(
                    f"'{file.url}' has no column '{column}' (it has: {field_names(names)}); "
                    f"name one with '{file.url}#COLUMN'."
                )
            if pyarrow.types.is_string(table.schema_arrow.field(column).type):
                # A text in a dictionary may stand in every row: it is not written out for all.
                table = parquet.ParquetFile(
                    handle, metadata=table.metadata, read_dictionary=[column]
                )
            num_rows = table.metadata.num_rows
            first, last = round(start * num_rows), round(stop * num_rows)
            for group in range(table.metadata.num_row_groups):
                end = number + table.metadata.row_group(group).num_rows
                if end <= first or number >= last:
                    number = end
                    continue
                for batch in table.iter_batches(
                    batch_size=_PARQUET_ROWS, row_groups=[group], columns=[column]
                ):
                    if number + len(batch) <= first:
                        number += len(batch)
                        continue
                    for value in batch.column(0):
                        number += 1
                        if first < number <= last:
                            origin = f"{file.url}, row {number}"
                            yield check_text(_text(value, origin), origin, column), origin
                    if number >= last:
                        break
    except (pyarrow.ArrowException, UnicodeDecodeError, IndexError) as error:
        raise DataError(f"'{file.url}' is not a readable Parquet file: {error}.") from error
    if not number:
        raise DataError(f"'{file.url}' holds no documents.")


def _text(value: Any, origin: str) -> object:
    """The Python value of a cell, whose length is looked at first."""
    if isinstance(value, pyarrow.DictionaryScalar) and value.is_valid:
        value = value.dictionary[value.index.as_py()]
    is_text = isinstance(value, pyarrow.StringScalar) and value.is_valid
    if is_text and value.as_buffer().size >= MAX_LINE_BYTES:
        raise DataError(f"{origin}: longer than {MAX_LINE_BYTES >> 20} MiB.")
    return value.as_py()
