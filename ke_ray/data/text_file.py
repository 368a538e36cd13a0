"""Small text files that are read whole: facts, schedules, tokenizers and tasks."""

from __future__ import annotations

import os
from typing import Any

from ke_ray import storage
from ke_ray.data.sources import reading
from ke_ray.errors import DataError, StorageError


def read_text(path: str | os.PathLike[str], kind: str, *, max_bytes: int = 256 << 20) -> str:
    """The UTF-8 text of a file.

    Args:
        path: a path or URI.
        kind: names the kind of file in messages, as "a facts file".

    Raises:
        DataError: there is no such file, or it is too large or not UTF-8.
    """
    name = os.fspath(path)
    with reading(name):
        try:
            content = storage.read_bytes(name, max_bytes)
        except StorageError as error:
            raise DataError(f"{kind} has at most {max_bytes >> 20} MiB: {error}") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"'{name}' is not {kind}: byte {error.start} is not UTF-8 text.") from error


def parse_json(text: str, name: str) -> Any:
    """The value of a JSON text; ``name`` says in messages what it is.

    Raises:
        DataError: not JSON, or nested too deeply.
    """
    try:
        return storage.parse_json(text)
    except ValueError as error:
        raise DataError(f"{name} is not JSON: {str(error)[:200]}.") from error
