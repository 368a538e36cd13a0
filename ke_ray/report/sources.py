"""Result folders as the report reads them: tolerant of age, damage and unfinished work.

A result folder is one that holds ``manifest.json`` (with its ``kind``) or one of the tables a kind
is known by. Nothing here judges: what is missing, old or unreadable is noted in ``Result.notes``
and shown to the reader of the report.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import pyarrow
import pyarrow.compute as pc
from pyarrow import ArrowException

from ke_ray import storage
from ke_ray.errors import KeRayError, StorageError, UserError
from ke_ray.results import SCHEMA_VERSION, ScanFolder
from ke_ray.results.columns import TABLES, with_branch
from ke_ray.secrets import printable

# Kind -> its tables; the first one identifies a folder that has no manifest.
KINDS: dict[str, tuple[str, ...]] = {
    "scan": ("entropy", "replicates", "weights"),
    "continual": (
        "runs",
        "train",
        "probes",
        "injections",
        "downstream",
        "dynamics",
        "retainability",
        "perplexity",
    ),
    "sweep": ("trials", "settings"),
    "pretrain": ("train",),
}

# Never descended into: single files, weights, and what MLflow and Ray keep beside results.
_FILES = (".parquet", ".json", ".safetensors", ".png", ".html", ".db", ".yaml", ".log", ".txt")
_NOT_RESULTS = {"checkpoints", "coefficients", "mlruns", "mlartifacts", "artifacts", "ray"}

# Tables that are given every declared column, filled with "unknown" where a folder lacks it.
_FILLED = ("entropy", "runs", "trials")
# Columns without which figures show less, so that a reader is told when they had to be filled.
_NEEDED = {"checkpoint", "step", "corpus", "layer", "measure", "value", "stderr", "data_sha256"}
_NEEDED |= {"status", "acquisition", "forgetting"}
_CONTROL = r"[\x00-\x08\x0b-\x1f\x7f-\x{9f}]"
_UNKNOWN = {"status": "ok", "corpus": "corpus"}  # of files from before there was such a column


@dataclass(frozen=True)
class Result:
    """One result folder: its manifest, its tables as data frames, and what is odd about it."""

    path: str
    kind: str
    name: str
    manifest: dict[str, Any]
    tables: dict[str, pd.DataFrame]
    notes: tuple[str, ...] = field(default=())

    @property
    def planned(self) -> int | None:
        """Checkpoints that the study is about; None where the manifest does not list them."""
        listed = self.manifest.get("checkpoints")
        return len(listed) if isinstance(listed, list) else None

    @property
    def fingerprints(self) -> list[tuple[str, str]]:
        """(what, hash) of a study as its manifest has them."""
        hashes: list[tuple[str, str]] = []
        for key in ("identity", "fingerprints"):
            value = self.manifest.get(key)
            if isinstance(value, str):
                hashes.append((f"study {key}", value))
            elif isinstance(value, dict):
                hashes += [(str(k), str(v)) for k, v in value.items() if isinstance(v, str | int)]
        return hashes

    @property
    def command(self) -> str:
        """The command that made it, as one shell line; empty where the manifest has none."""
        command = self.manifest.get("command")
        if isinstance(command, list):
            return shlex.join(str(part) for part in command)
        return str(command) if command else ""

    def table(self, name: str) -> pd.DataFrame:
        """A table by name; an empty frame where the folder has none."""
        return self.tables.get(name, pd.DataFrame())


def find_results(paths: Sequence[str | os.PathLike[str]]) -> list[Result]:
    """Every result folder at or below the given paths (three levels down), in a stable order.

    Raises:
        UserError: a path does not exist.
    """
    results: list[Result] = []
    seen: set[str] = set()
    for path_given in paths:
        path = os.fspath(path_given)
        path = path.rstrip("/") or path
        if not path or not storage.exists(path):
            raise UserError(
                f"There is no '{path}'. Give a result folder (of scan, continual, sweep or "
                "pretrain) or a folder that holds some; 'ke-ray demo' makes a set in runs/demo."
            )
        for folder, kind in _walk(path, depth=3):
            if folder not in seen:
                seen.add(folder)
                results.append(read_result(folder, kind))
    order = {kind: rank for rank, kind in enumerate(("pretrain", "scan", "continual", "sweep"))}
    return sorted(results, key=lambda result: (order.get(result.kind, 9), result.path))


def _walk(path: str, depth: int) -> list[tuple[str, str]]:
    names = storage.list_dir(path)
    kind = _kind_of(path, names)
    if kind:
        return [(path, kind)]
    if depth == 0:
        return []
    below: list[tuple[str, str]] = []
    for name in names:
        if not name.startswith(".") and not name.endswith(_FILES) and name not in _NOT_RESULTS:
            with suppress(StorageError):  # no permission, which the folders beside it may have
                below.extend(_walk(storage.join(path, name), depth - 1))
    return below


def _kind_of(path: str, names: Sequence[str]) -> str | None:
    if "manifest.json" in names:
        try:
            manifest = storage.read_json(storage.join(path, "manifest.json"))
        except KeRayError:
            manifest = {}
        kind = manifest.get("kind") if isinstance(manifest, dict) else None
        if isinstance(kind, str) and kind in KINDS:
            return kind
    for kind, tables in KINDS.items():
        if f"{tables[0]}.parquet" in names:
            return kind
    return None


def read_result(path: str, kind: str) -> Result:
    """Read one folder of a known kind. What cannot be read becomes a note, not an exception."""
    notes: list[str] = []
    manifest: dict[str, Any] = {}
    names = storage.list_dir(path)
    if "manifest.json" in names:
        try:
            loaded = storage.read_json(storage.join(path, "manifest.json"))
            manifest = _printable(loaded) if isinstance(loaded, dict) else {}
        except KeRayError as error:
            notes.append(f"manifest.json cannot be read: {error}")
    else:
        notes.append("No manifest.json: the study is unfinished or was made by an older version.")
    notes.extend(_version_note(manifest))
    tables: dict[str, pd.DataFrame] = {}
    live = kind == "scan" and "parts" in names
    for table in KINDS[kind]:
        if f"{table}.parquet" not in names and not (live and table != "weights"):
            continue
        try:
            read = with_branch(_read_table(path, table, live, manifest))
            frame = _flat(read, table, notes).to_pandas()
        except (KeRayError, OSError, ArrowException) as error:
            notes.append(printable(f"{table}.parquet cannot be read: {error}"))
            continue
        tables[table] = _filled(frame, table, notes) if table in _FILLED else frame
    main = KINDS[kind][0]
    if manifest.get("status") == "running":
        notes.append("Unfinished: the manifest still says 'running'; what has finished is shown.")
    if main not in tables:
        notes.append(f"No {main}.parquet yet: nothing of this {kind} has finished.")
    name = path.rstrip("/").rsplit("/", 1)[-1]
    return Result(path, kind, name, manifest, tables, tuple(notes))


def _read_table(path: str, table: str, live: bool, manifest: dict[str, Any]) -> Any:
    """One table; of the replicates only the totals, which are a small part of a large file."""
    if live and table == "entropy":
        return ScanFolder(path, manifest).entropy()
    if live and table == "replicates":
        replicates = ScanFolder(path, manifest).replicates()
        return replicates.filter(pc.field("layer").is_null())
    totals = pc.field("layer").is_null() if table == "replicates" else None
    return storage.read_table(storage.join(path, f"{table}.parquet"), totals)


def _printable(value: Any) -> Any:
    """A manifest whose texts a terminal and a page can show."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {str(key): _printable(item) for key, item in value.items()}
    return [_printable(item) for item in value] if isinstance(value, list) else value


def _flat(table: pyarrow.Table, name: str, notes: list[str]) -> pyarrow.Table:
    """A table of numbers and of texts that a terminal and a page can show."""
    for column in table.column_names:
        values = table[column]
        if pyarrow.types.is_string(values.type) or pyarrow.types.is_large_string(values.type):
            if pc.any(pc.match_substring_regex(values, _CONTROL)).as_py():
                texts = [value and printable(value) for value in values.to_pylist()]
                number = table.column_names.index(column)
                table = table.set_column(number, column, pyarrow.array(texts, values.type))
        elif not _is_scalar(values.type):
            notes.append(f"{name}.parquet: column {printable(column)!r} is left out: {values.type}")
            table = table.drop_columns(column)
    return table


def _is_scalar(kind: pyarrow.DataType) -> bool:
    is_ = pyarrow.types
    return bool(
        is_.is_integer(kind)
        or is_.is_floating(kind)
        or is_.is_boolean(kind)
        or is_.is_null(kind)
        or is_.is_temporal(kind)
    )


def _version_note(manifest: dict[str, Any]) -> list[str]:
    version = manifest.get("schema_version")
    if not manifest or version == SCHEMA_VERSION:
        return []
    if isinstance(version, int) and version > SCHEMA_VERSION:
        return [
            f"Written with schema version {version}, newer than the {SCHEMA_VERSION} known here: "
            "columns unknown to this version are left out. Update ke_ray to see all."
        ]
    return [
        f"Written with schema version {version if version is not None else 'unknown'}, older than "
        f"the {SCHEMA_VERSION} of this version: what it does not hold is shown as unknown."
    ]


def _filled(frame: pd.DataFrame, table: str, notes: list[str]) -> pd.DataFrame:
    """Give every declared column a type; fill and note the ones that a folder lacks."""
    missing = [column for column in TABLES[table] if column.name not in frame.columns]
    if needed := [column.name for column in missing if column.name in _NEEDED]:
        notes.append(f"{table}.parquet has no column {', '.join(needed)}: shown as unknown.")
    frame = frame.assign(**{column.name: _UNKNOWN.get(column.name) for column in missing})
    for column in TABLES[table]:
        if column.type != "string":
            values = pd.to_numeric(frame[column.name], errors="coerce")
            frame[column.name] = values.astype("float64")
    return frame
