"""Parquet files under any URI, written whole or not at all."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ke_ray.errors import StorageError
from ke_ray.storage.files import read_bytes, write_atomic

if TYPE_CHECKING:
    import pyarrow

_ROWS_PER_GROUP = 10_000


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


def read_table(uri: str | os.PathLike[str]) -> pyarrow.Table:
    """Read a Parquet file.

    Raises:
        StorageError: the file is not Parquet.
    """
    with _explained_table(uri):
        return open_table(uri).read()


def open_table(uri: str | os.PathLike[str]) -> pyarrow.parquet.ParquetFile:
    """Open a Parquet file for reading by row groups; its compressed bytes are in memory.

    Raises:
        StorageError: the file is not Parquet.
    """
    import pyarrow.parquet as parquet

    with _explained_table(uri):
        return parquet.ParquetFile(io.BytesIO(read_bytes(uri)))


@contextmanager
def _explained_table(uri: str | os.PathLike[str]) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except pyarrow.ArrowException as error:
        raise StorageError(f"'{os.fspath(uri)}' is not a Parquet file: {error}.") from error
