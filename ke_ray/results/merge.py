"""Joining the results of several scans."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow.compute as pc

from ke_ray import storage
from ke_ray.errors import ResultsError
from ke_ray.results.scan_folder import ScanFolder, check_identity

__all__ = ["merge_scans"]


def merge_scans(uris: Sequence[str], output: str) -> ScanFolder:
    """Join compatible scan folders into a new one.

    Raises:
        ResultsError: an identity differs, or ``output`` already holds results.
    """
    folders = [ScanFolder.open(uri) for uri in uris]
    if storage.exists(storage.join(output, "manifest.json")):
        raise ResultsError(f"'{output}' already holds results; give a new folder to --merge.")
    first = folders[0]
    identity = {**first.manifest["identity"], "corpora": {}}
    corpora: dict[str, Any] = {}
    checkpoints: dict[str, Any] = {}
    for folder in folders:
        check_identity(folder.uri, identity, folder.manifest["identity"])
        identity["corpora"] |= folder.manifest["identity"]["corpora"]
        corpora |= folder.manifest["corpora"]
        for entry in folder.manifest.get("checkpoints", []):
            known = checkpoints.setdefault(entry["name"], entry)
            if known["location"] != entry["location"] or known["revision"] != entry["revision"]:
                raise ResultsError(
                    f"'{folder.uri}' and an earlier folder both have a checkpoint "
                    f"'{entry['name']}', from {entry['location']} and {known['location']}: they "
                    "cannot be told apart. Merge folders of one series."
                )
    manifest = {
        **first.manifest,
        "identity": identity,
        "corpora": corpora,
        "checkpoints": list(checkpoints.values()),
        "measures": sorted({m for f in folders for m in f.manifest["measures"]}),
        "merged_from": list(uris),
    }
    merged = ScanFolder(output, manifest)
    storage.make_dirs(output)
    for folder in folders:
        rows = folder.entropy().to_pylist()
        replicates = folder.replicates()
        for name in dict.fromkeys(row["checkpoint"] for row in rows):
            own = [row for row in rows if row["checkpoint"] == name]
            mask = pc.equal(replicates["checkpoint"], name)
            merged.write_part(
                name, own, replicates.filter(mask), _coefficients_of(folder, name, own)
            )
    merged.consolidate(final=True)
    return merged


def _coefficients_of(
    folder: ScanFolder, checkpoint: str, rows: Iterable[Mapping[str, Any]]
) -> dict[str, np.ndarray]:
    there = set(folder.list_coefficients())
    corpora = {row["corpus"] for row in rows if row["corpus"]}
    return {
        corpus: folder.mean_coefficients(checkpoint, corpus)
        for corpus in sorted(corpora)
        if folder.coefficients_name(checkpoint, corpus) in there
    }
