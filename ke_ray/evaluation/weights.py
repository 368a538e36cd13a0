"""Geometry of the weights of a scan's checkpoints: ``weights.parquet`` in its folder.

It needs no forward pass and no data. It is not part of hashing, which reads a checkpoint in
seconds: singular values of all matrices take minutes on CPUs, and a scan that was not asked for
them should not pay for them. Three checkpoints are open at a time (this one, the previous and the
first of its run), and one matrix of each is in memory where files can be mapped.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from ke_ray import storage
from ke_ray.checkpoints.fetch.cache import Store
from ke_ray.checkpoints.find.catalog import list_checkpoints
from ke_ray.checkpoints.reference import CheckpointRef, position
from ke_ray.core.spectrum import distance, matrix_geometry
from ke_ray.errors import KeRayError, ResultsError, UserError
from ke_ray.models.weight_matrices import Matrix, weight_matrices
from ke_ray.results import ScanFolder
from ke_ray.results.columns import to_table
from ke_ray.storage.ownership import claimed
from ke_ray.studies.parts import CheckpointSelection

Matrices = dict[Matrix, torch.Tensor]

_LOG = logging.getLogger(__name__)
_BASELINES = ("first_checkpoint", "previous_checkpoint")
_NUM_OPEN = 3  # a checkpoint, the previous one and the first of its run


def measure_weights(
    uri: str,
    on_checkpoint: Callable[[str, str | None], None],
    *,
    cache_dir: str | None = None,
    cache_bytes: int | None = None,
) -> None:
    """Add what is missing to ``weights.parquet`` of a scan folder.

    It is written after every checkpoint, so that a run that was killed goes on. Checkpoints that
    failed are tried again, and so are those whose distances are from other checkpoints than they
    would be from in a run without failures and later additions.

    Args:
        on_checkpoint: called with the name and the error, if any, of each finished checkpoint.

    Raises:
        ResultsError: no scan folder, another command is writing it, or its checkpoints are gone.
        UserError: the cache cannot hold the checkpoints that are open at a time.
    """
    folder = ScanFolder.open(uri)
    with claimed(uri, "scan"), Store(cache_dir, cache_bytes) as store:
        refs = _listed(folder)
        runs = _runs(folder, refs)
        if cache_bytes is not None:
            num_open = min(_NUM_OPEN, max(map(len, runs)))
            _check_cache(cache_bytes, num_open, store.bytes_to_fetch(refs).largest_bytes)
        path = storage.join(uri, "weights.parquet")
        rows = storage.read_table(path).to_pylist() if storage.exists(path) else []
        rows = [row for row in rows if row["status"] == "ok"]
        done = {row["checkpoint"]: [row.get(name) for name in _BASELINES] for row in rows}
        order = {ref.name: number for number, ref in enumerate(refs)}
        opened = _Opened(store)
        for run in runs:
            first: CheckpointRef | None = None
            previous: CheckpointRef | None = None
            for ref in run:
                error = None
                baselines = [first and first.name, previous and previous.name]
                if done.get(ref.name) != baselines:
                    rows = [row for row in rows if row["checkpoint"] != ref.name]
                    try:
                        rows += _rows(ref, opened, first, previous)
                    except KeRayError as problem:
                        error = str(problem)
                        row = {"checkpoint": ref.name, **position(ref)}
                        rows.append({**row, "status": "failed", "error": error})
                    rows.sort(key=lambda row: order.get(row["checkpoint"], len(order)))
                    storage.write_table(path, to_table("weights", rows))
                    on_checkpoint(ref.name, error)
                if error is None:
                    first, previous = first or ref, ref
                opened.keep(first, previous)


def _runs(folder: ScanFolder, refs: Sequence[CheckpointRef]) -> list[list[CheckpointRef]]:
    """Checkpoints of one series and seed; the Hub does not list series, but the results know."""
    table = folder.entropy().select(["checkpoint", "series"])
    series = {name: own for name, own in zip(*table.to_pydict().values(), strict=True) if own}
    runs: dict[tuple[str | None, str | None], list[CheckpointRef]] = {}
    for ref in refs:
        runs.setdefault((series.get(ref.name, ref.series), ref.seed), []).append(ref)
    return list(runs.values())


def _check_cache(cache_bytes: int, num_open: int, largest_bytes: int) -> None:
    needed = num_open * largest_bytes
    if cache_bytes < needed:
        raise UserError(
            f"--cache-bytes is {cache_bytes:,}, but {num_open} checkpoints of up to "
            f"{largest_bytes:,} bytes are open at a time; give at least {needed:,}."
        )


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
    left_out = sorted(entries.keys() - {ref.name for ref in known})
    if left_out:
        _LOG.warning(
            "%d checkpoints of '%s' are not in '%s', which its last scan was of, and are left out; "
            "the first is '%s'.",
            *(len(left_out), folder.uri, selection.spec, left_out[0]),
        )
    return known


class _Opened:
    """Matrices of the checkpoints that are in use."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._matrices: dict[CheckpointRef, Matrices] = {}

    def matrices(self, ref: CheckpointRef) -> Matrices:
        if ref not in self._matrices:
            folder = self._store.fetch(ref)
            try:
                self._matrices[ref] = weight_matrices(folder)
            except BaseException:
                self._store.release(ref)
                raise
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
                "first_checkpoint": first and first.name,
                "previous_checkpoint": previous and previous.name,
                **{name: None if math.isnan(value) else value for name, value in values.items()},
                "status": "ok",
            }
        )
    return rows
