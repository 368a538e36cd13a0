"""Knowledge entropy after resuscitation: the predicted beside the measured.

    before      H of C̄, the mean coefficients that the multipliers came from
    predicted   H of u · C̄, with the inputs of every layer held fixed
    measured    H of the scan of the resuscitated model

A scan of resuscitated checkpoints (``--resuscitate``, or folders that ``ke-ray resuscitate`` wrote)
gets ``resuscitation.parquet``: one row per checkpoint, corpus and layer, null for the total over
layers. ``before`` and ``predicted`` are on the corpus of C̄, which is the scan's where both were
made with the same data; only then the first layer's prediction is exact (gated FFN). The records of
checkpoints that were resuscitated in memory are kept in ``resuscitated/``, so that a resumed scan
has the same table.
"""

from __future__ import annotations

import functools
from typing import Any

from ke_ray import storage
from ke_ray.results.columns import to_table
from ke_ray.results.scan_folder import ScanFolder

TABLE = "resuscitation.parquet"
RECORD_NAME = "resuscitation.json"
_MEASURE = "knowledge_entropy"
_SETTINGS = ("ratio", "factor", "control")
_COPIED = (*_SETTINGS, "coefficients", "coefficients_verified")


def write_predictions(output: str) -> list[dict[str, Any]]:
    """Write ``resuscitation.parquet`` of a scan folder where it holds resuscitated checkpoints.

    Returns:
        its rows; none where no checkpoint in the folder was resuscitated and measured.
    """
    rows = _rows(ScanFolder.open(output))
    if rows:
        storage.write_table(storage.join(output, TABLE), to_table("resuscitation", rows))
    return rows


def read_predictions(output: str) -> list[dict[str, Any]]:
    """The rows of a folder's ``resuscitation.parquet``; none where there is no such table."""
    path = storage.join(output, TABLE)
    return storage.read_table(path).to_pylist() if storage.exists(path) else []


def prediction_lines(rows: list[dict[str, Any]]) -> list[str]:
    """The totals for the terminal, nats."""
    totals = [row for row in rows if row["layer"] is None]
    if not totals:
        return []
    width = max(len("checkpoint"), *(len(row["checkpoint"]) for row in totals))
    lines = [
        "  knowledge entropy by resuscitation (nats; predicted with layer inputs held fixed)",
        f"  {'checkpoint':<{width}}  {'before':>9}  {'predicted':>9}  {'measured':>9}  corpus",
    ]
    for row in totals:
        before, predicted = _cell(row["before_nats"]), _cell(row["predicted_nats"])
        lines.append(
            f"  {row['checkpoint']:<{width}}  {before}  {predicted}  {_cell(row['measured_nats'])}"
            f"  {row['corpus']}"
        )
    return lines


def _cell(value: float | None) -> str:
    return f"{'–':>9}" if value is None else f"{value:9.4f}"


def _rows(folder: ScanFolder) -> list[dict[str, Any]]:
    settings = folder.manifest["identity"].get("resuscitation")
    locations = {
        entry["name"]: entry["location"] for entry in folder.manifest.get("checkpoints", [])
    }

    @functools.cache
    def record_of(name: str) -> dict[str, Any] | None:
        if settings is None:
            return _record_beside(locations.get(name))
        return {**_record_in_scan(folder.uri, name), **{key: settings[key] for key in _SETTINGS}}

    rows = []
    for row in folder.entropy().to_pylist():
        if row["measure"] != _MEASURE or row["status"] != "ok" or row["value"] is None:
            continue
        record = record_of(row["checkpoint"])
        if record is None:
            continue
        layer = row["layer"]
        rows.append(
            {
                **{key: row[key] for key in ("checkpoint", "corpus", "step", "layer")},
                "measured_nats": row["value"],
                "before_nats": _at(record.get("entropy_nats"), layer),
                "predicted_nats": _at(record.get("predicted_entropy_nats"), layer),
                **{key: record.get(key) for key in _COPIED},
            }
        )
    return rows


def _at(values: list[float] | None, layer: int | None) -> float | None:
    if not values:
        return None
    return sum(values) if layer is None else values[layer]


def write_record(output: str, checkpoint: str, record: str) -> None:
    """Keep the record (JSON) of a checkpoint that a scorer resuscitated in memory."""
    storage.write_atomic(_record_path(output, checkpoint), record)


def _record_path(output: str, checkpoint: str) -> str:
    return storage.join(output, "resuscitated", f"{storage.slug(checkpoint)}.json")


def _record_in_scan(output: str, checkpoint: str) -> dict[str, Any]:
    """The record of a checkpoint that was resuscitated in memory."""
    path = _record_path(output, checkpoint)
    record = storage.read_json(path) if storage.exists(path) else {}
    if "notes" in record:  # written by an earlier version
        notes = record["notes"]
        return {
            "entropy_nats": record["before_nats"],
            "predicted_entropy_nats": record["predicted_nats"],
            "coefficients": notes.get("coefficients"),
            "coefficients_verified": notes.get("coefficients_verified") != "False"
            if notes
            else None,
        }
    return record


def _record_beside(location: str | None) -> dict[str, Any] | None:
    """The record in a folder that ``ke-ray resuscitate`` wrote; None for any other."""
    if location is None or "://" in location:
        return None
    path = storage.join(location, RECORD_NAME)
    return storage.read_json(path) if storage.exists(path) else None
