"""Parquet files under any URI, written whole or not at all, and read within bounds.

A few kilobytes of Parquet can stand for terabytes: a long text in a dictionary, repeated by a
run-length code. So texts are read as dictionaries, a batch at a time, and their length is known
before they are written out.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ke_ray.errors import StorageError
from ke_ray.storage.files import read_bytes, write_atomic

if TYPE_CHECKING:
    import pyarrow

MAX_FILE_BYTES = 4 * 2**30
MAX_TABLE_BYTES = 2**30
_ROWS_PER_GROUP = 10_000
_ROWS_PER_BATCH = 10_000
_MAX_FIXED_BYTES = 4096


def write_table(uri: str | os.PathLike[str], table: pyarrow.Table) -> None:
    """Write a Parquet file (zstd), whole or not at all."""
    import pyarrow.parquet as parquet

    buffer = io.BytesIO()
    parquet.write_table(table, buffer, compression="zstd")
    write_atomic(uri, buffer.getvalue())


def write_tables(
    uri: str | os.PathLike[str], schema: pyarrow.Schema, tables: Iterable[pyarrow.Table]
) -> None:
    """Write a Parquet file (zstd), whole or not at all, from a stream of tables.

    Row groups have ten thousand rows or a few more, so that reading one takes little memory.
    """
    import pyarrow as pa
    import pyarrow.parquet as parquet

    buffer = io.BytesIO()
    with parquet.ParquetWriter(buffer, schema, compression="zstd") as writer:
        group: list[pyarrow.Table] = []
        for table in tables:
            group.append(table)
            if sum(part.num_rows for part in group) >= _ROWS_PER_GROUP:
                writer.write_table(pa.concat_tables(group))
                group = []
        if group:
            writer.write_table(pa.concat_tables(group))
    write_atomic(uri, buffer.getvalue())


def read_table(
    uri: str | os.PathLike[str], where: pyarrow.compute.Expression | None = None
) -> pyarrow.Table:
    """Read a Parquet file, or its rows that match ``where``.

    Raises:
        StorageError: the file is not Parquet, or larger than ``open_table`` allows.
    """
    table = open_table(uri)
    return table.read(range(table.num_row_groups), where=where)


def open_table(uri: str | os.PathLike[str]) -> StoredTable:
    """Open a Parquet file for reading by row groups; its compressed bytes are in memory.

    Raises:
        StorageError: the file is not Parquet, larger than ``MAX_FILE_BYTES``, or one of its
            columns is wider than 4 KiB.
    """
    with _explained_table(uri):
        return StoredTable(os.fspath(uri), read_bytes(uri, MAX_FILE_BYTES))


class StoredTable:
    """An open Parquet file whose row groups are read within ``MAX_TABLE_BYTES``."""

    def __init__(self, uri: str, content: bytes) -> None:
        import pyarrow.parquet as parquet

        columns = parquet.ParquetFile(io.BytesIO(content)).schema
        leaves = [columns.column(number) for number in range(len(columns))]
        for leaf in leaves:
            if leaf.physical_type == "FIXED_LEN_BYTE_ARRAY" and leaf.length > _MAX_FIXED_BYTES:
                raise StorageError(
                    f"'{uri}': values of column '{leaf.path}' have {leaf.length:,} bytes, more "
                    f"than {_MAX_FIXED_BYTES:,}."
                )
        texts = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"]
        self._uri = uri
        self._file = parquet.ParquetFile(io.BytesIO(content), read_dictionary=texts)
        self.names: list[str] = self._file.schema_arrow.names
        self.num_row_groups: int = self._file.num_row_groups

    def read_row_group(self, number: int, columns: Sequence[str] | None = None) -> pyarrow.Table:
        """One row group, of all or some columns.

        Raises:
            StorageError: it is damaged, or takes more than ``MAX_TABLE_BYTES`` in memory.
        """
        return self.read([number], columns)

    def read(
        self,
        row_groups: Iterable[int],
        columns: Sequence[str] | None = None,
        where: pyarrow.compute.Expression | None = None,
    ) -> pyarrow.Table:
        """Row groups as one table.

        Raises:
            StorageError: as ``read_row_group``.
        """
        import pyarrow as pa

        parts: list[pyarrow.Table] = []
        num_bytes = 0
        with _explained_table(self._uri):
            batches = self._file.iter_batches(
                _ROWS_PER_BATCH, row_groups=list(row_groups), columns=columns
            )
            for batch in batches:
                part = pa.Table.from_batches([batch])
                part = part if where is None else part.filter(where)
                num_bytes += sum(_decoded_bytes(column) for column in part.columns)
                if num_bytes > MAX_TABLE_BYTES:
                    raise StorageError(
                        f"'{self._uri}' takes more than {MAX_TABLE_BYTES:,} bytes in memory "
                        f"(of {self._file.metadata.num_rows:,} rows); ke_ray writes no such table."
                    )
                parts.append(_decoded(part))
            return pa.concat_tables(parts) if parts else _decoded(self._empty(columns))

    def _empty(self, columns: Sequence[str] | None) -> pyarrow.Table:
        empty = self._file.schema_arrow.empty_table()
        return empty if columns is None else empty.select(list(columns))


def _decoded_bytes(column: pyarrow.ChunkedArray) -> int:
    """Bytes of a column once its dictionaries are written out."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if not pa.types.is_dictionary(column.type):
        return int(column.nbytes)
    total = 0
    for chunk in column.chunks:
        lengths = pc.binary_length(chunk.dictionary).take(chunk.indices)
        total += (pc.sum(lengths).as_py() or 0) + 4 * len(chunk)
    return total


def _decoded(table: pyarrow.Table) -> pyarrow.Table:
    import pyarrow as pa

    for number, field in enumerate(table.schema):
        if pa.types.is_dictionary(field.type):
            plain = table.column(number).cast(field.type.value_type)
            table = table.set_column(number, field.name, plain)
    return table


@contextmanager
def _explained_table(uri: str | os.PathLike[str]) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except pyarrow.ArrowException as error:
        raise StorageError(f"'{os.fspath(uri)}' is not a Parquet file: {error}.") from error
