"""Merging of several scans' results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ke_ray import storage
from ke_ray.errors import ResultsError
from ke_ray.results.scan_folder import ScanFolder
from ke_ray.results.scan_identity import check_identity, merge_identities
from ke_ray.storage.ownership import claimed

Row = dict[str, Any]


def merge_scans(uris: Sequence[str], output: str) -> ScanFolder:
    """Join compatible scan folders into a new one.

    Where several folders have the same results, those of the first are taken. A failure is kept
    only where no folder has the values that failed.

    Raises:
        ResultsError: an identity differs, one name has different weights, or ``output`` has
            results already or is not ke_ray's. Nothing is written then.
    """
    # Another kind than a scan's: existing results are never merged into.
    with claimed(output, "merged scan"):
        return _merge(uris, output)


def _merge(uris: Sequence[str], output: str) -> ScanFolder:
    folders = [ScanFolder.open(uri) for uri in uris]
    first = folders[0]
    identity = first.manifest["identity"]
    corpora: dict[str, Any] = {}
    for folder in folders:
        check_identity(folder.uri, identity, folder.manifest["identity"])
        identity = merge_identities(identity, folder.manifest["identity"])
        corpora |= folder.manifest["corpora"]
    tables = [folder.entropy().to_pylist() for folder in folders]
    checkpoints = _same_checkpoints(folders, tables)
    manifest = {
        **first.manifest,
        "identity": identity,
        "corpora": corpora,
        "checkpoints": list(checkpoints.values()),
        "measures": list(dict.fromkeys(m for f in folders for m in f.manifest["measures"])),
        "merged_from": list(uris),
    }
    merged = ScanFolder(output, manifest)
    files = (f"{stem}.parquet" for stem in ("entropy", "replicates", "experts"))
    for name in ("parts", "coefficients", *files):
        storage.remove(storage.join(output, name))  # of a merge that was killed
    replicates = [folder.replicates() for folder in folders]
    experts = [folder.experts() for folder in folders]
    failed = False
    by_name = [_by_checkpoint(rows) for rows in tables]
    for name in dict.fromkeys(name for groups in by_name for name in groups):
        chosen = _choose(folders, [groups.get(name, []) for groups in by_name])
        failed |= any(row["status"] != "ok" for rows in chosen for row in rows)
        merged.write_part(
            name,
            [row for rows in chosen for row in rows],
            pa.concat_tables(
                _of_rows(table, name, rows) for table, rows in zip(replicates, chosen, strict=True)
            ),
            _coefficients(name, folders, chosen),
            _experts(name, experts, chosen),
        )
    merged.consolidate(final=True)
    if failed:
        merged.manifest["status"] = "failed"
        merged.write_manifest()
    return merged


def _same_checkpoints(
    folders: Sequence[ScanFolder], tables: Sequence[Sequence[Row]]
) -> dict[str, Row]:
    """Manifest entries by name; a name must have the same weights in all folders."""
    entries: dict[str, Row] = {}
    weights: dict[str, str] = {}
    for folder, rows in zip(folders, tables, strict=True):
        own = {row["checkpoint"]: row["weights_sha256"] for row in rows if row["weights_sha256"]}
        for entry in folder.manifest.get("checkpoints", []):
            name = entry["name"]
            earlier = entries.setdefault(name, entry)
            if name in own and name in weights:
                same, what = own[name] == weights[name], "weights_sha256 differs"
            else:
                same = (earlier["location"], earlier["revision"]) == (
                    entry["location"],
                    entry["revision"],
                )
                what = f"from {entry['location']} and {earlier['location']}"
            if not same:
                raise ResultsError(
                    f"'{folder.uri}' and an earlier folder both have a checkpoint '{name}' "
                    f"({what}): they cannot be told apart. Merge folders of one series."
                )
        weights = own | weights
    return entries


def _by_checkpoint(rows: Sequence[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["checkpoint"], []).append(row)
    return groups


def _choose(folders: Sequence[ScanFolder], tables: Sequence[Sequence[Row]]) -> list[list[Row]]:
    """The rows of one checkpoint to take from each folder, every measure from one folder only."""
    taken: set[tuple[str, str]] = set()
    chosen: list[list[Row]] = []
    for rows in tables:
        own = [
            row
            for row in rows
            if row["status"] == "ok" and (row["corpus"], row["measure"]) not in taken
        ]
        taken |= {(row["corpus"], row["measure"]) for row in own}
        chosen.append(own)
    for folder, rows, own in zip(folders, tables, chosen, strict=True):
        own += [
            row
            for row in rows
            if row["status"] != "ok"
            and any((row["corpus"], m) not in taken for m in folder.manifest["measures"])
        ]
    return chosen


def _of_rows(replicates: pa.Table, name: str, rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """The leave-one-out values that belong to ``rows`` of checkpoint ``name``."""
    keys = {(row["corpus"], row["measure"]) for row in rows}
    own = replicates.filter(pc.equal(replicates["checkpoint"], name))
    columns = (own[key].to_pylist() for key in ("corpus", "measure"))
    mask = [key in keys for key in zip(*columns, strict=True)]
    return own.filter(pa.array(mask, pa.bool_()))


def _coefficients(
    name: str, folders: Sequence[ScanFolder], chosen: Sequence[Sequence[Row]]
) -> dict[str, np.ndarray]:
    by_corpus: dict[str, np.ndarray] = {}
    for folder, rows in zip(folders, chosen, strict=True):
        files = set(folder.list_coefficients())
        for corpus in sorted({row["corpus"] for row in rows if row["status"] == "ok"}):
            if corpus not in by_corpus and folder.coefficients_name(name, corpus) in files:
                by_corpus[corpus] = folder.mean_coefficients(name, corpus)
    return by_corpus


def _experts(name: str, tables: Sequence[pa.Table], chosen: Sequence[Sequence[Row]]) -> pa.Table:
    """The experts of checkpoint ``name``; of a corpus that several folders have, of the first."""
    taken: set[str] = set()
    parts = []
    for table, rows in zip(tables, chosen, strict=True):
        corpora = {row["corpus"] for row in rows if row["status"] == "ok"} - taken
        own = table.filter(
            pc.and_(
                pc.equal(table["checkpoint"], name),
                pc.is_in(table["corpus"], pa.array(sorted(corpora), pa.string())),
            )
        )
        taken |= set(own["corpus"].to_pylist())
        parts.append(own)
    return pa.concat_tables(parts)
