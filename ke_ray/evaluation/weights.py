"""Geometry of the weights of a scan's checkpoints: ``weights.parquet`` in its folder.

It needs no forward pass and no data. It is not part of hashing, which reads a checkpoint in
seconds: singular values of all matrices take minutes on CPUs, and a scan that was not asked for
them should not pay for them. Three checkpoints are open at a time (this one, the previous and the
first of its run), and one matrix of each is in memory where files can be mapped.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from ke_ray import storage
from ke_ray.checkpoints.fetch.cache import Store
from ke_ray.checkpoints.find.catalog import list_checkpoints
from ke_ray.checkpoints.reference import CheckpointRef, position
from ke_ray.core.spectrum import distance, matrix_geometry
from ke_ray.errors import KeRayError, ResultsError
from ke_ray.models.weight_matrices import Matrix, weight_matrices
from ke_ray.results import ScanFolder
from ke_ray.results.columns import to_table
from ke_ray.storage.ownership import claimed
from ke_ray.studies.parts import CheckpointSelection

Matrices = dict[Matrix, torch.Tensor]


def measure_weights(
    uri: str,
    on_checkpoint: Callable[[str, str | None], None],
    *,
    cache_dir: str | None = None,
    cache_bytes: int | None = None,
) -> None:
    """Add what is missing to ``weights.parquet`` of a scan folder.

    It is written after every checkpoint, so that a run that was killed goes on. Checkpoints that
    failed are tried again.

    Args:
        on_checkpoint: called with the name and the error, if any, of each finished checkpoint.

    Raises:
        ResultsError: no scan folder, another command is writing it, or its checkpoints are gone.
    """
    folder = ScanFolder.open(uri)
    with claimed(uri, "scan"), Store(cache_dir, cache_bytes) as store:
        refs = _listed(folder)
        path = storage.join(uri, "weights.parquet")
        rows = storage.read_table(path).to_pylist() if storage.exists(path) else []
        rows = [row for row in rows if row["status"] == "ok"]
        done = {row["checkpoint"] for row in rows}
        opened = _Opened(store)
        first = previous = None
        for ref in refs:
            if first is None or first.seed != ref.seed:
                first = previous = None
            error = None
            if ref.name not in done:
                try:
                    rows += _rows(ref, opened, first, previous)
                except KeRayError as problem:
                    error = str(problem)
                    row = {"checkpoint": ref.name, **position(ref)}
                    rows.append({**row, "status": "failed", "error": error})
                storage.write_table(path, to_table("weights", rows))
                on_checkpoint(ref.name, error)
            if error is None:
                first, previous = first or ref, ref
            opened.keep(first, previous)


def _listed(folder: ScanFolder) -> list[CheckpointRef]:
    """The checkpoints of a scan, found again by its SPEC, with the weights that were scanned."""
    entries = {entry["name"]: entry for entry in folder.manifest["checkpoints"]}
    selection = CheckpointSelection.model_validate(folder.manifest["config"]["checkpoints"])
    refs = list_checkpoints(selection.spec, **selection.options())
    prints = {name: entry.get("weights_fingerprint") for name, entry in entries.items()}
    changed = [
        ref.name
        for ref in refs
        if prints.get(ref.name) and ref.weights_fingerprint not in (None, prints[ref.name])
    ]
    if changed:
        raise ResultsError(
            f"The weights of {len(changed)} checkpoints have changed since '{folder.uri}' was "
            f"scanned, the first is '{changed[0]}'. Run the scan again first."
        )
    known = [ref for ref in refs if ref.name in entries]
    if not known:
        raise ResultsError(
            f"None of the {len(entries)} checkpoints of '{folder.uri}' is in "
            f"'{selection.spec}' any more; expected the checkpoints that were scanned."
        )
    return known


class _Opened:
    """Matrices of the checkpoints that are in use."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._matrices: dict[CheckpointRef, Matrices] = {}

    def matrices(self, ref: CheckpointRef) -> Matrices:
        if ref not in self._matrices:
            self._matrices[ref] = weight_matrices(self._store.fetch(ref))
        return self._matrices[ref]

    def keep(self, *refs: CheckpointRef | None) -> None:
        """Let go of all others."""
        for ref in [ref for ref in self._matrices if ref not in refs]:
            del self._matrices[ref]
            self._store.release(ref)


def _rows(
    ref: CheckpointRef,
    opened: _Opened,
    first: CheckpointRef | None,
    previous: CheckpointRef | None,
) -> list[dict[str, Any]]:
    own = opened.matrices(ref)
    others = {
        "distance_from_first": first and opened.matrices(first),
        "distance_from_previous": previous and opened.matrices(previous),
    }
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for matrix, stored in own.items():
        weight = stored.to(device)
        values: dict[str, float] = asdict(matrix_geometry(weight))
        for column, other in others.items():
            if other and matrix in other and other[matrix].shape == stored.shape:
                values[column] = distance(weight, other[matrix].to(device))
        rows.append(
            {
                "checkpoint": ref.name,
                **position(ref),
                "layer": matrix.layer,
                "part": matrix.part,
                "matrix": matrix.name,
                "num_rows": stored.shape[0],
                "num_columns": stored.shape[1],
                **{name: None if math.isnan(value) else value for name, value in values.items()},
                "status": "ok",
            }
        )
    return rows
