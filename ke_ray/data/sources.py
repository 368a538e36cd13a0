"""The files that a SOURCE names, and how to open them.

A source is a path, a folder, a glob or any fsspec URL; ``#part`` at its end names a column or
tensors inside the file. Files of a folder or a glob come in sorted order.
"""

from __future__ import annotations

import gzip
import io
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import zstandard

from ke_ray.data.published import how_to_get
from ke_ray.errors import DataError
from ke_ray.storage.drivers import explain_driver_error

CONNECT_TIMEOUT_S = 8  # tried twice (HEAD, then GET): still under 20 seconds
READ_TIMEOUT_S = 60
_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True)
class SourceFile:
    """One file: ``url`` as a user writes it, ``path`` within its file system."""

    url: str
    path: str
    filesystem: Any

    @property
    def is_compressed(self) -> bool:
        """Whether its bytes can be read from the beginning only."""
        return self.path.lower().endswith(tuple(_DECODERS))

    def describe(self) -> dict[str, str | int]:
        """What changes when the file's content does: its name, size and version or time.

        Raises:
            DataError: the file is not there.
        """
        with reading(self.url):
            info = self.filesystem.info(self.path)
        version = next(
            (
                str(info[key])
                for key in ("ETag", "etag", "version", "LastModified", "last_modified", "mtime")
                if info.get(key)
            ),
            "",
        )
        return {"url": self.url, "size": int(info.get("size") or 0), "version": version}


def exists_locally(path: str) -> bool:
    """Whether a local file or folder has this very name; False for what cannot be a name."""
    try:
        return Path(path).exists()
    except (OSError, ValueError):  # too long, or with a null character
        return False


def split_part(source: str) -> tuple[str, str | None]:
    """``file.parquet#column`` into ``file.parquet`` and ``column``; None without a ``#``.

    A ``#`` that belongs to the name of an existing local file is left alone.
    """
    if "#" not in source or exists_locally(source):
        return source, None
    base, _, part = source.rpartition("#")
    return base, part or None


@contextmanager
def reading(source: str) -> Iterator[None]:
    """Turn the errors of file systems, codecs and networks into a DataError about ``source``."""
    try:
        yield
    except FileNotFoundError as error:
        if "://" in source:
            raise DataError(f"'{source}' does not exist or cannot be reached.") from error
        raise DataError(
            f"There is no '{source}'; give an existing file, folder or URL.{how_to_get(source)}"
        ) from error
    except PermissionError as error:
        raise DataError(f"'{source}' may not be read: permission denied.") from error
    except IsADirectoryError as error:
        raise DataError(f"'{source}' is a folder where a file was expected.") from error
    except (EOFError, zlib.error) as error:
        raise DataError(f"'{source}' is cut off or damaged: {error}. Fetch it again.") from error
    except (OSError, ImportError) as error:
        reason = str(error) or type(error).__name__
        raise DataError(f"'{source}' cannot be read: {reason}.") from error
    except Exception as error:
        explained = explain_driver_error(error)
        if explained is None and type(error).__module__.split(".")[0] != "zstandard":
            raise
        reason = explained or str(error) or type(error).__name__
        raise DataError(f"'{source}' cannot be read: {reason}.") from error


def _filesystem(source: str) -> tuple[Any, str]:
    options: dict[str, Any] = {}
    if source.startswith(("http://", "https://")):
        import aiohttp

        timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=READ_TIMEOUT_S
        )
        # aiohttp alone would go past a proxy that HTTPS_PROXY names, unlike the Hub's client.
        options["client_kwargs"] = {"timeout": timeout, "trust_env": True}
    try:
        filesystem, path = fsspec.core.url_to_fs(source, **options)
    except (ValueError, ImportError) as error:
        raise DataError(
            f"'{source}' cannot be opened: {error}. Give a path or a URL whose fsspec driver is "
            "installed (for example s3fs for s3://, gcsfs for gs://)."
        ) from error
    return filesystem, path


def list_files(source: str, suffixes: Sequence[str] | None = None) -> list[SourceFile]:
    """The files of a path, URL, folder or glob, in sorted order.

    Args:
        source: without a ``#part``.
        suffixes: which files of a *folder* count; a file or glob is taken as it is.

    Raises:
        DataError: nothing is there, or nothing with one of the suffixes.
    """
    if not source.strip() or "\0" in source:
        raise DataError(f"The data source is {source!r}; give a file, folder, glob or URL.")
    filesystem, path = _filesystem(source)
    protocol = filesystem.protocol if isinstance(filesystem.protocol, str) else None
    protocol = protocol or filesystem.protocol[0]
    is_local = protocol in ("file", "local")

    def as_source_file(name: str) -> SourceFile:
        url = name if is_local else str(filesystem.unstrip_protocol(name))
        return SourceFile(url, name, filesystem)

    with reading(source):
        # A file whose own name holds *, ? or [ is that file, not a pattern.
        if any(mark in path for mark in "*?[") and not filesystem.exists(path):
            try:
                matches = [
                    name for name in sorted(filesystem.glob(path)) if filesystem.isfile(name)
                ]
            except (ValueError, re.error) as error:
                raise DataError(f"'{source}' is not a valid pattern: {error}.") from error
            if not matches:
                raise DataError(f"The pattern '{source}' matches no file.{how_to_get(source)}")
            return [as_source_file(name) for name in matches]
        if protocol not in ("http", "https") and filesystem.isdir(path):
            names = [
                name
                for name in sorted(filesystem.find(path))
                if not name.rsplit("/", 1)[-1].startswith((".", "_"))
            ]
            matches = [
                name for name in names if suffixes is None or name.lower().endswith(tuple(suffixes))
            ]
            if not matches:
                raise DataError(
                    f"The folder '{source}' holds no file of the expected kinds "
                    f"({', '.join(suffixes or ['any'])}); it has {len(names)} other files."
                )
            return [as_source_file(name) for name in matches]
        filesystem.info(path)
    return [SourceFile(source, path, filesystem)]


@contextmanager
def open_binary(file: SourceFile, block_bytes: int | None = None) -> Iterator[BinaryIO]:
    """A buffered handle on the *uncompressed* bytes; ``.gz`` and ``.zst`` are seen by name.

    Args:
        block_bytes: how much a remote file is fetched at a time; None is fsspec's own.
    """
    options = {} if block_bytes is None else {"block_size": block_bytes}
    with file.filesystem.open(file.path, "rb", **options) as handle:
        name = file.path.lower()
        decoder = next((open_ for end, open_ in _DECODERS.items() if name.endswith(end)), None)
        with io.BufferedReader(decoder(handle) if decoder else handle, _BUFFER_BYTES) as lines:
            yield lines


def _zstandard(handle: BinaryIO) -> Any:
    # Dolma's files are many frames one after the other; the default reader stops at the first.
    return zstandard.ZstdDecompressor().stream_reader(handle, read_across_frames=True)


_DECODERS: dict[str, Callable[[BinaryIO], Any]] = {
    ".gz": lambda handle: gzip.GzipFile(fileobj=handle, mode="rb"),
    ".zst": _zstandard,
    ".zstd": _zstandard,
}
