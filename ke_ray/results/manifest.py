"""``manifest.json``: the command, settings and versions behind a result folder."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from ke_ray import __version__, storage
from ke_ray.errors import KeRayError, ResultsError, StorageError, UserError
from ke_ray.secrets import redact

#: Raised when a column changes its meaning; readers know every version up to this one.
SCHEMA_VERSION = 1

_PACKAGES = ("ray", "torch", "transformers", "tokenizers", "numpy", "pyarrow", "optuna", "mlflow")


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Versions of ke_ray, Python and the packages that a result depends on."""
    installed = {"ke_ray": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            installed[package] = importlib.metadata.version(package)
    return installed


def command_line() -> str:
    """The running command as typed, without secrets."""
    program = sys.argv[0].rsplit("/", 1)[-1]
    words = ["python -m ke_ray" if program == "__main__.py" else program, *sys.argv[1:]]
    return redact(" ".join([words[0], *(shlex.quote(word) for word in words[1:])]))


def new_manifest(kind: str, config: dict[str, Any]) -> dict[str, Any]:
    """The fields that every kind of result has, with ``status: running``."""
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": kind,
        "status": "running",
        "created_at": now(),
        "updated_at": now(),
        "command": command_line(),
        "versions": versions(),
        "config": config,
    }


def write_manifest(folder: str, manifest: dict[str, Any]) -> None:
    """Write ``manifest.json``, stamped with the time, without secrets."""
    values = redact({**manifest, "updated_at": now()})
    storage.write_json(storage.join(folder, "manifest.json"), values)


def read_manifest(folder: str, kind: str | None = None) -> dict[str, Any]:
    """Read and check ``manifest.json``.

    Raises:
        ResultsError: there is none, it is of another kind, or a newer ke_ray wrote it.
    """
    path = storage.join(folder, "manifest.json")
    if not storage.exists(path):
        raise ResultsError(
            f"'{folder}' holds no results (no manifest.json); give a folder that a ke-ray command "
            "wrote, for example with 'ke-ray scan … --output FOLDER'."
        )
    manifest = storage.read_json(path)
    if not isinstance(manifest, dict) or "kind" not in manifest:
        raise ResultsError(f"'{path}' is not a manifest of ke_ray: it has no 'kind'.")
    version = manifest.get("schema_version", 0)
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise ResultsError(
            f"'{folder}' has schema_version {version}, this ke_ray reads up to {SCHEMA_VERSION}; "
            "update ke_ray."
        )
    if kind is not None and manifest["kind"] != kind:
        raise ResultsError(
            f"'{folder}' holds results of kind '{manifest['kind']}', expected '{kind}'."
        )
    return manifest


@contextmanager
def truthful_ending(folder: str) -> Iterator[None]:
    """Within a claimed folder: a manifest does not stay ``running`` where the block raises."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, UserError) and not isinstance(error, StorageError):
            raise  # the request was wrong, and nothing ran
        with suppress(KeRayError, OSError):  # must not hide what happened
            manifest = read_manifest(folder)
            if manifest.get("status") == "running":
                ending = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
                write_manifest(folder, {**manifest, "status": ending})
        raise
