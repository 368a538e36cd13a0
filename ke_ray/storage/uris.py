"""URIs: plain paths and all that fsspec supports (``s3://``, ``gs://``, ``memory://``, …)."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec

from ke_ray.errors import KeRayError, StorageError
from ke_ray.storage.drivers import driver_errors, is_remote

_LOCAL_PREFIXES = ("file://", "local://")


def is_local(uri: str | os.PathLike[str]) -> bool:
    """Whether ``uri`` is on this machine's own file system."""
    return not is_remote(os.fspath(uri))


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
    """A URI that is valid in every process of this node: local paths become absolute."""
    return os.fspath(local_path(uri).absolute()) if is_local(uri) else os.fspath(uri)


def slug(text: str) -> str:
    """A single safe file-name component made of ``[A-Za-z0-9._-]``, never empty or all dots."""
    cleaned = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-")[:150]
    return cleaned if cleaned.strip(".") else "unnamed"


def filesystem(uri: str | os.PathLike[str]) -> tuple[Any, str]:
    """The fsspec file system behind a URI, and the path in it.

    Raises:
        StorageError: no driver for it is installed, it lacks what the driver needs, or no file can
            have this name.
    """
    text = _nameable(uri)
    if is_local(text):
        text = os.fspath(local_path(text).absolute())
    try:
        if text.startswith(("http://", "https://")):
            from yarl import URL  # aiohttp's, which fsspec needs for these

            URL(text)  # as fsspec will at the first request
        return fsspec.core.url_to_fs(text)
    except KeRayError:
        raise
    except Exception as error:  # each driver has its own kinds
        raise StorageError(
            f"'{text}' cannot be opened: {error!s:.300}. Give a path or a URI whose fsspec driver "
            "is installed (for example s3fs for s3://, gcsfs for gs://)."
        ) from error


@contextmanager
def explained(uri: str, verb: str) -> Iterator[None]:
    """Turn what a file system refuses into a StorageError: "Cannot VERB 'URI': …"."""
    try:
        with driver_errors(uri):
            yield
    except RecursionError as error:  # Python makes parents one inside the other
        raise StorageError(f"Cannot {verb} '{uri[:200]}…': the path is too deep.") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason = "no space is left on the device; free some or choose another folder"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            reason = f"permission denied; choose a folder you may {verb.split()[0]} in"
        elif error.errno in (errno.ENOTDIR, errno.EEXIST):
            reason = "a file stands where a folder is needed; choose another folder"
        elif error.errno == errno.ENAMETOOLONG:
            reason = "the name is too long; choose a shorter one"
        elif isinstance(error, FileNotFoundError) and is_remote(uri) and verb != "read":
            bucket = "/".join(uri.split("/")[:3])
            reason = f"the store has no '{bucket}'; create it, or choose another place"
        else:
            raise
        shown = uri if len(uri) <= 400 else f"{uri[:200]}…{uri[-50:]}"
        raise StorageError(f"Cannot {verb} '{shown}': {reason}.") from error
