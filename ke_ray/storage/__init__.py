"""Files under any fsspec URI, written whole, by one command at a time, in ke_ray's own folders.

``uris`` names them, ``files`` and ``tables`` read and write them, ``temporary`` names files that
are being written, ``ownership`` decides whether a folder is ke_ray's, ``sole_writer`` locks it.
"""

from __future__ import annotations

from ke_ray.storage.files import (
    check_writable,
    create,
    exists,
    file_size,
    json_text,
    list_dir,
    make_dirs,
    open_read,
    read_bytes,
    read_json,
    read_text,
    remove,
    replace,
    write_atomic,
    write_json,
)
from ke_ray.storage.json_text import parse_json
from ke_ray.storage.patience import KNOWN_STORES, forget_store, known_stores, on_store
from ke_ray.storage.tables import open_table, read_table, write_table, write_tables
from ke_ray.storage.temporary import hold, is_temporary, remove_leftovers, temporary_path
from ke_ray.storage.uris import absolute, explained, is_local, join, local_path, slug

__all__ = [
    "KNOWN_STORES",
    "absolute",
    "check_writable",
    "create",
    "exists",
    "explained",
    "file_size",
    "forget_store",
    "hold",
    "is_local",
    "is_temporary",
    "join",
    "json_text",
    "known_stores",
    "list_dir",
    "local_path",
    "make_dirs",
    "on_store",
    "open_read",
    "open_table",
    "parse_json",
    "read_bytes",
    "read_json",
    "read_table",
    "read_text",
    "remove",
    "remove_leftovers",
    "replace",
    "slug",
    "temporary_path",
    "write_atomic",
    "write_json",
    "write_table",
    "write_tables",
]
