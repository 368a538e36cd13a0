"""What knowledge entropy became by resuscitation: predicted and measured, beside each other.

    before      H of C̄, the mean coefficients that the multipliers came from
    predicted   H of u · C̄, with the inputs of every layer held fixed
    measured    H of the scan of the resuscitated model

A scan of resuscitated checkpoints (``--resuscitate``, or folders that ``ke-ray resuscitate`` wrote)
gets ``resuscitation.parquet``: one row per checkpoint, corpus and layer, null for the total over
layers. ``before`` and ``predicted`` are on the corpus of C̄, which is the scan's where both were
made with the same data; only then the first layer's prediction is exact (gated FFN). What a scorer
knows of it is kept in ``resuscitated/``, so a scan that was resumed has the same table.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ke_ray import storage
from ke_ray.results.columns import to_table
from ke_ray.results.scan_folder import ScanFolder
from ke_ray.resuscitation.export import PROVENANCE
from ke_ray.secrets import redact

TABLE = "resuscitation.parquet"
_MEASURE = "knowledge_entropy"


def write_predictions(output: str) -> list[dict[str, Any]]:
    """Write ``resuscitation.parquet`` of a scan folder where it holds resuscitated checkpoints.

    Returns:
        its rows; none where nothing in the folder was resuscitated or measured.
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
    keys = folder.manifest["identity"].get("resuscitation")
    places = {entry["name"]: entry["location"] for entry in folder.manifest.get("checkpoints", [])}
    told: dict[str, dict[str, Any] | None] = {}
    rows = []
    for row in folder.entropy().to_pylist():
        if row["measure"] != _MEASURE or row["status"] != "ok":
            continue
        name = row["checkpoint"]
        if name not in told:
            if keys is not None:
                told[name] = _in_memory(folder.uri, keys, name)
            else:
                told[name] = _written(places.get(name))
        known = told[name]
        if known is None:
            continue
        layer = row["layer"]
        rows.append(
            {
                **{key: row[key] for key in ("checkpoint", "corpus", "step", "layer")},
                "measured_nats": row["value"],
                "before_nats": _at(known["before"], layer),
                "predicted_nats": _at(known["predicted"], layer),
                **known["about"],
            }
        )
    return rows


def _at(values: list[float], layer: int | None) -> float | None:
    if not values:
        return None
    return sum(values) if layer is None else values[layer]


def _in_memory(output: str, keys: Mapping[str, Any], name: str) -> dict[str, Any]:
    """For a scan that resuscitated after load: what its scorer told."""
    path = _revived_path(output, name)
    known = storage.read_json(path) if storage.exists(path) else {}
    notes = known.get("notes", {})
    about = {
        **{key: keys[key] for key in ("ratio", "factor", "control")},
        "coefficients": notes.get("coefficients"),
        # What was measured on the model itself is of its weights.
        "coefficients_verified": notes.get("coefficients_verified") != "False" if notes else None,
    }
    before, predicted = (known.get(key, []) for key in ("before_nats", "predicted_nats"))
    return {"before": before, "predicted": predicted, "about": about}


def write_revived(output: str, name: str, told: str) -> None:
    """Keep what a scorer told of a checkpoint (JSON) until the table is written."""
    storage.write_atomic(_revived_path(output, name), redact(told))


def _revived_path(output: str, name: str) -> str:
    return storage.join(output, "resuscitated", f"{storage.slug(name)}.json")


def _written(location: str | None) -> dict[str, Any] | None:
    """For a folder that ``ke-ray resuscitate`` wrote: what its record says."""
    if location is None or "://" in location:
        return None
    path = storage.join(location, PROVENANCE)
    if not storage.exists(path):
        return None
    record = storage.read_json(path)
    about = {
        key: record.get(key)
        for key in ("ratio", "factor", "control", "coefficients", "coefficients_verified")
    }
    return {
        "before": record.get("entropy_nats") or [],
        "predicted": record.get("predicted_entropy_nats") or [],
        "about": about,
    }
