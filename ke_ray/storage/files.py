"""Files under any URI, written whole or not at all.

A write goes to a temporary name beside its target and is then renamed, so that no reader
finds and no killed run leaves half a file; the next write of the same file removes the leftovers of
a killed one. Temporary names are ``.ke-ray-<16 hex digits>-<target>``, which no other program uses.
(Object stores have no rename; there a put is atomic itself.)
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from ke_ray.errors import StorageError
from ke_ray.storage.json_text import parse_json
from ke_ray.storage.patience import on_store
from ke_ray.storage.temporary import hold, remove_leftovers, temporary_path
from ke_ray.storage.uris import explained, filesystem, is_local, join, local_path

MAX_JSON_BYTES = 64 * 2**20
#: Bytes of one write of several buffers: drivers of stores copy what they are given.
_PIECE_BYTES = 8 * 2**20


def exists(uri: str | os.PathLike[str]) -> bool:
    """Whether a file or folder exists."""
    fs, path = filesystem(uri)
    return on_store(os.fspath(uri), lambda: bool(fs.exists(path)))


def make_dirs(uri: str | os.PathLike[str]) -> None:
    """Create a folder and its parents, unless they exist."""
    fs, path = filesystem(uri)
    with explained(os.fspath(uri), "create the folder"):
        on_store(os.fspath(uri), lambda: fs.makedirs(path, exist_ok=True))


def list_dir(uri: str | os.PathLike[str]) -> list[str]:
    """The names in a folder, sorted; empty where there is no such folder."""
    fs, path = filesystem(uri)

    def entries() -> list[str]:
        if not fs.isdir(path):
            return []
        fs.invalidate_cache(path)
        return list(fs.ls(path, detail=False))

    with explained(os.fspath(uri), "read"):
        names = [entry.rstrip("/") for entry in on_store(os.fspath(uri), entries)]
    return sorted(name.rsplit("/", 1)[-1] for name in names)


def remove(uri: str | os.PathLike[str]) -> None:
    """Remove a file, or a folder with its contents, if it exists."""
    fs, path = filesystem(uri)
    with suppress(FileNotFoundError):
        on_store(os.fspath(uri), lambda: fs.rm(path, recursive=True))


def file_size(uri: str | os.PathLike[str]) -> int:
    """Bytes of a file.

    Raises:
        FileNotFoundError: there is no such file.
    """
    fs, path = filesystem(uri)
    fs.invalidate_cache(path)
    return on_store(os.fspath(uri), lambda: int(fs.size(path)))


def open_read(uri: str | os.PathLike[str]) -> BinaryIO:
    """Open a file for reading bytes."""
    fs, path = filesystem(uri)
    return on_store(os.fspath(uri), lambda: fs.open(path, "rb"))


def read_bytes(uri: str | os.PathLike[str], max_bytes: int | None = None) -> bytes:
    """Read a whole file.

    Args:
        uri: what is read.
        max_bytes: for files of others: refuse a larger one, and one that has no end (a pipe).

    Raises:
        StorageError: it is larger, or no file.
    """
    fs, path = filesystem(uri)
    text = os.fspath(uri)
    if max_bytes is not None and is_local(text):
        status = local_path(text).stat()
        if not stat.S_ISREG(status.st_mode):
            raise StorageError(f"'{text}' is not a file (but a folder, a pipe or a device).")

    def content_of() -> bytes:
        if max_bytes is None:
            return bytes(fs.cat_file(path))
        with fs.open(path, "rb") as file:
            return bytes(file.read(max_bytes + 1))

    content = on_store(text, content_of)
    if max_bytes is not None and len(content) > max_bytes:
        raise StorageError(f"'{text}' has more than {max_bytes:,} bytes; is it the right file?")
    return content


def read_text(uri: str | os.PathLike[str]) -> str:
    """Read a whole file as UTF-8."""
    return read_bytes(uri).decode("utf-8")


def write_atomic(uri: str | os.PathLike[str], data: bytes | str | Sequence[memoryview]) -> None:
    """Write a file so that it appears complete or not at all.

    Args:
        uri: what is written.
        data: the content; of several buffers, which are not joined in memory, one after the other.

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
                    file.writelines(_pieces(payload))
                    file.flush()
                    os.fsync(file.fileno())
                    os.replace(temporary, target)  # still held, or it would look left over
            except BaseException:
                with suppress(OSError):
                    temporary.unlink()
                raise
            return
        fs, path = filesystem(text)

        def put() -> None:
            try:
                _write_object(fs, path, payload)
            except FileNotFoundError:  # no folder; object stores have none but the bucket
                fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
                _write_object(fs, path, payload)

        on_store(text, put)


def _write_object(fs: Any, path: str, payload: bytes | Sequence[memoryview]) -> None:
    if isinstance(payload, bytes):
        fs.pipe_file(path, payload)
        return
    file = fs.open(path, "wb")  # no ``with``: closing it would commit what was written so far
    try:
        for piece in _pieces(payload):
            file.write(piece)
        file.close()
    except BaseException:
        with suppress(Exception):
            file.closed = True  # or its destructor commits
        with suppress(Exception):
            file.discard()
        raise


def _pieces(payload: bytes | Sequence[memoryview]) -> Iterator[bytes | memoryview]:
    if isinstance(payload, bytes):
        yield payload
        return
    for buffer in payload:
        for start in range(0, len(buffer), _PIECE_BYTES):
            yield buffer[start : start + _PIECE_BYTES]


def create(uri: str | os.PathLike[str], data: bytes) -> bool:
    """Write a new file; return False, and change nothing, where it exists.

    Of two writers at once one succeeds where the store has conditional writes (S3, Google Cloud
    Storage); on others both may, and the later one's bytes stay.
    """
    fs, path = filesystem(uri)

    def put() -> bool:
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

    with explained(os.fspath(uri), "write"):
        return on_store(os.fspath(uri), put)


def replace(uri: str | os.PathLike[str], data: bytes, expected: bytes) -> bool:
    """Write a file in place of one whose content is ``expected``.

    Returns:
        False, and nothing is changed, where it has another content or is gone. On S3 that is the
        store's own decision (a PUT with ``If-Match``); on others a writer in between goes unseen.
    """
    text = os.fspath(uri)
    fs, path = filesystem(text)

    def put() -> bool:
        try:
            fs.invalidate_cache(path.rsplit("/", 1)[0])
            tag = fs.info(path).get("ETag")  # first: what changes afterwards has another one
            present = bytes(fs.cat_file(path))
        except FileNotFoundError:
            return False
        if present != expected:
            return present == data  # by an earlier attempt whose answer was lost
        try:
            fs.pipe_file(path, data, **({"IfMatch": tag} if "s3" in fs.protocol else {}))
        except FileNotFoundError:
            return False
        except OSError as error:  # of s3fs, a "precondition failed" without a kind
            present = bytes(fs.cat_file(path))
            if present != expected:
                return present == data  # written, and the answer was lost
            if "NotImplemented" not in f"{error!r}{error.__cause__!r}":
                raise
            fs.pipe_file(path, data)
        return True

    if is_local(text):
        if read_bytes(text) != expected:
            return False
        write_atomic(text, data)
        return True
    return on_store(text, put)


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
        StorageError: it is not a file of JSON, or too large to be one of ke_ray's.
    """
    content = read_bytes(uri, MAX_JSON_BYTES)
    try:
        return parse_json(content)
    except ValueError as error:
        raise StorageError(f"'{os.fspath(uri)}' is not JSON: {error}.") from error


def check_writable(uri: str | os.PathLike[str]) -> None:
    """Create the folder and prove that a file can be written there.

    Raises:
        StorageError: it cannot.
    """
    make_dirs(uri)
    probe = join(uri, temporary_path(Path("writable")).name)
    write_atomic(probe, b"x" * 4096)
    remove(probe)
