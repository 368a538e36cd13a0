"""Files under any fsspec URI, written whole or not at all.

A URI is a plain path or anything fsspec knows (``s3://``, ``gs://``, ``memory://``, …). A write
goes to a temporary name beside its target and is then renamed, so that a reader, or a run that is
killed, never meets half a file; the next write of the same file removes what a killed one left.
Temporary names are ``.ke-ray-<16 hex digits>-<target>``, which no other program uses. (Object
stores have no rename; there a put is atomic itself.)
"""

from __future__ import annotations

import errno
import io
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import fsspec

from ke_ray.errors import StorageError
from ke_ray.temporary_files import hold, is_temporary, remove_leftovers, temporary_path

if TYPE_CHECKING:
    import pyarrow

__all__ = [
    "absolute",
    "check_writable",
    "create",
    "exists",
    "explained",
    "hold",
    "is_local",
    "is_temporary",
    "join",
    "json_text",
    "list_dir",
    "local_path",
    "make_dirs",
    "open_read",
    "read_bytes",
    "read_json",
    "read_table",
    "read_text",
    "remove",
    "remove_leftovers",
    "slug",
    "temporary_path",
    "write_atomic",
    "write_json",
    "write_table",
]

_LOCAL_PREFIXES = ("file://", "local://")


def is_local(uri: str | os.PathLike[str]) -> bool:
    """Whether ``uri`` is on this machine's own file system."""
    text = os.fspath(uri)
    return "://" not in text or text.startswith(_LOCAL_PREFIXES)


def local_path(uri: str | os.PathLike[str]) -> Path:
    """The path behind a local URI.

    Raises:
        StorageError: the URI is not local, or no file can have this name.
    """
    text = _nameable(uri)
    if not is_local(text):
        raise StorageError(f"'{text}' is not on the local file system; give a local path here.")
    for prefix in _LOCAL_PREFIXES:
        text = text.removeprefix(prefix)
    return Path(text)


def _nameable(uri: str | os.PathLike[str]) -> str:
    text = os.fspath(uri)
    try:
        if b"\0" not in os.fsencode(text):
            return text
    except UnicodeEncodeError:
        pass
    raise StorageError(f"{text[:200]!a} holds characters that no file name can have.")


def join(base: str | os.PathLike[str], *parts: str) -> str:
    """``base/part/part``; parts must not climb out of ``base``.

    Raises:
        StorageError: a part is absolute, contains ``..`` or cannot be a file name.
    """
    result = os.fspath(base).rstrip("/") or "/"
    for part in parts:
        if _nameable(part).startswith("/") or ".." in part.split("/"):
            raise StorageError(f"'{part}' would leave the folder '{base}'; use a plain name.")
        result = f"{result.rstrip('/')}/{part}"
    return result


def absolute(uri: str | os.PathLike[str]) -> str:
    """A URI that means the same in every process of this node: local paths made absolute."""
    return os.fspath(local_path(uri).absolute()) if is_local(uri) else os.fspath(uri)


def slug(text: str) -> str:
    """A single safe file-name component made of ``[A-Za-z0-9._-]``, never empty or all dots."""
    cleaned = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-")[:150]
    return cleaned if cleaned.strip(".") else "unnamed"


def _filesystem(uri: str | os.PathLike[str]) -> tuple[Any, str]:
    text = _nameable(uri)
    if is_local(text):
        text = os.fspath(local_path(text).absolute())
    try:
        if text.startswith(("http://", "https://")):
            from yarl import URL  # aiohttp's, which fsspec needs for these

            URL(text)  # as fsspec will at the first request
        return fsspec.core.url_to_fs(text)
    except (ValueError, ImportError) as error:
        raise StorageError(
            f"'{text}' cannot be opened: {error}. Give a path or a URI whose fsspec driver is "
            "installed (for example s3fs for s3://, gcsfs for gs://)."
        ) from error


@contextmanager
def explained(uri: str, verb: str) -> Iterator[None]:
    """Turn what a file system refuses into a StorageError: "Cannot VERB 'URI': …"."""
    try:
        yield
    except RecursionError as error:  # Python makes parents one inside the other
        raise StorageError(f"Cannot {verb} '{uri[:200]}…': the path is too deep.") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason = "no space is left on the device; free some or choose another folder"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            reason = "permission denied; choose a folder you may write to"
        elif error.errno in (errno.ENOTDIR, errno.EEXIST):
            reason = "a file stands where a folder is needed; choose another folder"
        elif error.errno == errno.ENAMETOOLONG:
            reason = "the name is too long; choose a shorter one"
        else:
            raise
        shown = uri if len(uri) <= 400 else f"{uri[:200]}…{uri[-50:]}"
        raise StorageError(f"Cannot {verb} '{shown}': {reason}.") from error


def exists(uri: str | os.PathLike[str]) -> bool:
    """Whether a file or folder is there."""
    fs, path = _filesystem(uri)
    return bool(fs.exists(path))


def make_dirs(uri: str | os.PathLike[str]) -> None:
    """Create a folder and its parents; nothing happens where it exists."""
    fs, path = _filesystem(uri)
    with explained(os.fspath(uri), "create the folder"):
        fs.makedirs(path, exist_ok=True)


def list_dir(uri: str | os.PathLike[str]) -> list[str]:
    """The names in a folder, sorted; empty where there is no such folder."""
    fs, path = _filesystem(uri)
    if not fs.isdir(path):
        return []
    fs.invalidate_cache(path)
    entries = (entry.rstrip("/") for entry in fs.ls(path, detail=False))
    return sorted(entry.rsplit("/", 1)[-1] for entry in entries)


def remove(uri: str | os.PathLike[str]) -> None:
    """Remove a file or a folder with all it holds; nothing happens where there is none."""
    fs, path = _filesystem(uri)
    with suppress(FileNotFoundError):
        fs.rm(path, recursive=True)


def open_read(uri: str | os.PathLike[str]) -> BinaryIO:
    """A binary handle for reading."""
    fs, path = _filesystem(uri)
    return fs.open(path, "rb")


def read_bytes(uri: str | os.PathLike[str]) -> bytes:
    """The whole file."""
    fs, path = _filesystem(uri)
    return bytes(fs.cat_file(path))


def read_text(uri: str | os.PathLike[str]) -> str:
    """The whole file as UTF-8."""
    return read_bytes(uri).decode("utf-8")


def write_atomic(uri: str | os.PathLike[str], data: bytes | str) -> None:
    """Write a file so that it appears complete or not at all.

    Raises:
        StorageError: no space, no permission, or a file where a folder is needed.
    """
    payload = data.encode("utf-8") if isinstance(data, str) else data
    text = os.fspath(uri)
    with explained(text, "write"):
        if is_local(text):
            target = local_path(text)
            target.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(target)
            temporary = temporary_path(target)
            try:
                with temporary.open("xb") as file:
                    hold(file.fileno())
                    file.write(payload)
                    file.flush()
                    os.fsync(file.fileno())
                    os.replace(temporary, target)  # still held, or it would look left over
            except BaseException:
                with suppress(OSError):
                    temporary.unlink()
                raise
            return
        fs, path = _filesystem(text)
        fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
        fs.pipe_file(path, payload)


def create(uri: str | os.PathLike[str], data: bytes) -> bool:
    """Write a file where there is none yet; False where there is one, which stays as it is.

    Of two writers at once one succeeds where the store has conditional writes (S3, Google Cloud
    Storage); on others both may, and the later one's bytes stay.
    """
    fs, path = _filesystem(uri)
    with explained(os.fspath(uri), "write"):
        fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
        fs.invalidate_cache(path.rsplit("/", 1)[0])
        try:
            fs.pipe_file(path, data, mode="create")
        except OSError:  # FileExistsError; of s3fs, a "precondition failed" without a kind
            fs.invalidate_cache(path.rsplit("/", 1)[0])
            if not fs.exists(path):
                raise
            return False
    return True


_ROWS_OF_A_GROUP = 10_000


def write_json(uri: str | os.PathLike[str], value: Any) -> None:
    """Write JSON, indented, with a final newline. NaN and infinities become null."""
    write_atomic(uri, json_text(value))


def json_text(value: Any) -> str:
    """The text that :func:`write_json` writes."""
    return json.dumps(_finite(value), indent=2, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def read_json(uri: str | os.PathLike[str]) -> Any:
    """Parse a JSON file.

    Raises:
        StorageError: the file is not JSON.
    """
    try:
        return json.loads(read_bytes(uri))
    except ValueError as error:
        raise StorageError(f"'{os.fspath(uri)}' is not JSON: {error}.") from error


def write_table(uri: str | os.PathLike[str], table: pyarrow.Table) -> None:
    """Write a Parquet file (zstd), whole or not at all."""
    import pyarrow.parquet as parquet

    buffer = io.BytesIO()
    parquet.write_table(table, buffer, compression="zstd")
    write_atomic(uri, buffer.getvalue())


def write_tables(
    uri: str | os.PathLike[str], schema: pyarrow.Schema, tables: Iterable[pyarrow.Table]
) -> None:
    """Write a Parquet file (zstd), whole or not at all, from tables that come one by one.

    Row groups have ten thousand rows or a few more, so that reading one takes little memory.
    """
    import pyarrow as pa
    import pyarrow.parquet as parquet

    buffer = io.BytesIO()
    with parquet.ParquetWriter(buffer, schema, compression="zstd") as writer:
        group: list[pyarrow.Table] = []
        for table in tables:
            group.append(table)
            if sum(part.num_rows for part in group) >= _ROWS_OF_A_GROUP:
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
    """A Parquet file to be read by row groups; its compressed bytes are in memory.

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


def check_writable(uri: str | os.PathLike[str]) -> None:
    """Create the folder and prove that a file can be written there.

    Raises:
        StorageError: it cannot.
    """
    make_dirs(uri)
    probe = join(uri, temporary_path(Path("writable")).name)
    write_atomic(probe, b"x" * 4096)
    remove(probe)
