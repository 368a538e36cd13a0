"""Tables and manifests as the documented schemas want them."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


def write(path: Path, rows: list[dict], schema: pa.Schema | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if schema is None:
        names = list(dict.fromkeys(key for row in rows for key in row))
        table = pa.table({name: [row.get(name) for row in rows] for name in names})
    else:
        table = pa.table({f.name: [row.get(f.name) for row in rows] for f in schema}, schema=schema)
    pq.write_table(table, path, compression="zstd")


def manifest(folder: Path, kind: str, **more) -> None:
    content = {
        "kind": kind,
        "schema_version": 1,
        "config": {},
        "versions": {"ke_ray": "0.1.0"},
        "created_at": "2026-01-01T00:00:00+00:00",
        "command": f"ke-ray {kind} study.yaml",
        **more,
    }
    (folder / "manifest.json").write_text(json.dumps(content))
