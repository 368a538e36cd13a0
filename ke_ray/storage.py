"""Files under any fsspec URI, written whole or not at all.

A URI is a plain path or anything fsspec knows (``s3://``, ``gs://``, ``memory://``, …). A write
goes to a temporary name beside its target and is then renamed, so that a reader, or a run that is
killed, never meets half a file; the next write of the same file removes what a killed one left.
(Object stores have no rename; there a put is atomic itself.)
"""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import fsspec

from ke_ray.drivers import driver_errors
from ke_ray.errors import StorageError

if TYPE_CHECKING:
    import pyarrow

__all__ = [
    "absolute",
    "check_writable",
    "exists",
    "hold",
    "is_local",
    "join",
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
def _explained(uri: str, verb: str) -> Iterator[None]:
    try:
        with driver_errors(uri):
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
    with driver_errors(os.fspath(uri)):
        return bool(fs.exists(path))


def make_dirs(uri: str | os.PathLike[str]) -> None:
    """Create a folder and its parents; nothing happens where it exists."""
    fs, path = _filesystem(uri)
    with _explained(os.fspath(uri), "create the folder"):
        fs.makedirs(path, exist_ok=True)


def list_dir(uri: str | os.PathLike[str]) -> list[str]:
    """The names in a folder, sorted; empty where there is no such folder."""
    fs, path = _filesystem(uri)
    with driver_errors(os.fspath(uri)):
        if not fs.isdir(path):
            return []
        fs.invalidate_cache(path)
        entries = [entry.rstrip("/") for entry in fs.ls(path, detail=False)]
    return sorted(entry.rsplit("/", 1)[-1] for entry in entries)


def remove(uri: str | os.PathLike[str]) -> None:
    """Remove a file or a folder with all it holds; nothing happens where there is none."""
    fs, path = _filesystem(uri)
    with driver_errors(os.fspath(uri)), suppress(FileNotFoundError):
        fs.rm(path, recursive=True)


def open_read(uri: str | os.PathLike[str]) -> BinaryIO:
    """A binary handle for reading."""
    fs, path = _filesystem(uri)
    with driver_errors(os.fspath(uri)):
        return fs.open(path, "rb")


def read_bytes(uri: str | os.PathLike[str]) -> bytes:
    """The whole file."""
    fs, path = _filesystem(uri)
    with driver_errors(os.fspath(uri)):
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
    with _explained(text, "write"):
        if is_local(text):
            target = local_path(text)
            target.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(target.parent, f".{target.name}.")
            handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
            try:
                with os.fdopen(handle, "wb") as file:
                    hold(file.fileno())
                    file.write(payload)
                    file.flush()
                    os.fsync(file.fileno())
                os.chmod(temporary, 0o666 & ~_UMASK)
                os.replace(temporary, target)
            except BaseException:
                with suppress(OSError):
                    os.unlink(temporary)
                raise
            return
        fs, path = _filesystem(text)
        fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
        fs.pipe_file(path, payload)


def hold(descriptor: int) -> None:
    """Lock an open temporary file or folder, so that others see that its writer lives."""
    with suppress(OSError):  # a file system without locks
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def remove_leftovers(folder: Path, prefix: str, suffixes: tuple[str, ...] = ("",)) -> None:
    """Remove temporary files and folders whose writers were killed.

    Args:
        folder: where they lie, on this machine.
        prefix, suffixes: how their names begin (with a dot) and end.
    """
    for name in _hidden_names(folder):
        if not name.startswith(prefix) or not name.endswith(suffixes):
            continue
        path = folder / name
        with suppress(OSError):  # somebody works on it, or has just removed or renamed it
            if time.time() - path.lstat().st_mtime < _LEFTOVER_AGE_S:
                continue
            descriptor = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink()
            finally:
                os.close(descriptor)


def _hidden_names(folder: Path) -> list[str]:
    """Names that begin with a dot; of a large folder as they were up to half a minute ago.

    Each file that is written asks: looking through all of them every time, n files would take n².
    """
    looked_at, names = _large_folders.get(folder, (0.0, []))
    if looked_at and time.monotonic() - looked_at < _LARGE_FOLDER_S:
        return names
    with os.scandir(folder) as entries:
        every = [entry.name for entry in entries]
    names = [name for name in every if name.startswith(".")]
    if len(every) >= _LARGE_FOLDER:
        _large_folders[folder] = (time.monotonic(), names)
    return names


def _read_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# Read once at import: the mask is process-wide, and reading it means setting it for an instant.
_UMASK = _read_umask()
# Between its creation and its lock a temporary file looks like one whose writer is dead.
_LEFTOVER_AGE_S = 2.0
_LARGE_FOLDER, _LARGE_FOLDER_S = 200, 30.0
_ROWS_OF_A_GROUP = 10_000
_large_folders: dict[Path, tuple[float, list[str]]] = {}


def write_json(uri: str | os.PathLike[str], value: Any) -> None:
    """Write JSON, indented, with a final newline. NaN and infinities become null."""
    write_atomic(uri, json.dumps(_finite(value), indent=2, allow_nan=False) + "\n")


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
    probe = join(uri, f".writable-{os.getpid()}")
    write_atomic(probe, b"x" * 4096)
    remove(probe)
