"""Result folders: their contents, and how they are written, read and merged.

A folder is readable without ke_ray: Parquet, safetensors and JSON. See ``docs/results.md``.
"""

from __future__ import annotations

from ke_ray.results.manifest import SCHEMA_VERSION, new_manifest, read_manifest, write_manifest
from ke_ray.results.merge import merge_scans
from ke_ray.results.scan_folder import ScanFolder

__all__ = [
    "SCHEMA_VERSION",
    "ScanFolder",
    "merge_scans",
    "new_manifest",
    "read_manifest",
    "write_manifest",
]
