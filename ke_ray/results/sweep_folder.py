"""Tables of a sweep: its trials, and its settings (points) with repeats aggregated.

``trials.parquet`` has one row per trial: ``trial_id``, ``point``, ``status``, ``error``, the swept
keys under their dotted names, and the columns of ``runs.parquet``. ``settings.parquet`` has one row
per point and objective. Status is ``ok``, ``failed``, or ``stopped`` for a trial that a scheduler
ended early (it has no A or F, only the acquisition of its probes when it stopped).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow

from ke_ray import storage
from ke_ray.core.intervals import student_interval
from ke_ray.results.columns import OBJECTIVES, TRIAL_KEYS, TRIAL_RESULTS, names, schema
from ke_ray.results.manifest import read_manifest


def objective_value(row: Mapping[str, Any], metric: str) -> float | None:
    """An objective of a trial's row; None where the trial did not report it.

    ``…_vs_original`` of a start that was not resuscitated is the plain value, as it is its own
    original. ``knowledge_entropy_change_nats`` is after − before. What is no column is a measure of
    the trained model.
    """
    if metric == "knowledge_entropy_change_nats":
        before = row.get("knowledge_entropy_before_nats")
        after = row.get("knowledge_entropy_after_nats")
        value = None if before is None or after is None else after - before
    elif metric not in OBJECTIVES:
        value = json.loads(row.get("measured") or "{}").get(metric)
    else:
        value = row.get(metric)
        if value is None and metric.endswith("_vs_original"):
            resuscitated = row.get("amplifying_factor") is not None
            value = None if resuscitated else row.get(metric.removesuffix("_vs_original"))
    return value if value is not None and math.isfinite(value) else None


def trials_table(rows: Sequence[Mapping[str, Any]], params: Sequence[str]) -> pyarrow.Table:
    """The table of ``trials.parquet``.

    Args:
        rows: ``trial_id``, ``point``, ``params`` (dotted key → value) and the row of the run.
        params: the swept keys, in order.
    """
    swept = [key for key in params if key not in names("runs")]
    types = {key: _type([row["params"].get(key) for row in rows]) for key in swept}
    table = []
    for row in rows:
        values = {name: row.get(name) for name in names("trials")}
        values["knowledge_entropy_change_nats"] = objective_value(
            row, "knowledge_entropy_change_nats"
        )
        for key in swept:
            value = row["params"].get(key)
            values[key] = _text(value) if types[key] == pyarrow.string() else value
        table.append(values)
    fields = [pyarrow.field(key, kind) for key, kind in types.items()]
    fields = [*schema(TRIAL_KEYS), *fields, *schema(TRIAL_RESULTS)]
    return pyarrow.Table.from_pylist(table, schema=pyarrow.schema(fields))


def _type(values: Sequence[Any]) -> Any:
    values = [value for value in values if value is not None]
    if values and all(isinstance(value, bool) for value in values):
        return pyarrow.bool_()
    if values and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        whole = all(isinstance(value, int) for value in values)
        return pyarrow.int64() if whole else pyarrow.float64()
    return pyarrow.string()


def _text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value)


def settings_rows(
    rows: Sequence[Mapping[str, Any]], objectives: Sequence[tuple[str, str]]
) -> list[dict[str, Any]]:
    """Mean and interval of every point's objectives over its finished trials (seeds).

    The interval is the 95 % Student interval of the mean over seeds; with a single seed, it is
    that trial's own bootstrap interval, where it has one.

    Args:
        rows: as for :func:`trials_table`.
        objectives: (metric, direction).

    Returns:
        [point, params, metric, direction, value, low, high, num_ok, num_failed, on_front].
    """
    points: dict[int, list[Mapping[str, Any]]] = {}
    for row in rows:
        points.setdefault(row["point"], []).append(row)
    settings = []
    for number, trials in points.items():
        for metric, direction in objectives:
            ok = [trial for trial in trials if trial["status"] == "ok"]
            scored = [(v, t) for t in ok if (v := objective_value(t, metric)) is not None]
            values = [value for value, _ in scored]
            low, high = _interval(values, [trial for _, trial in scored], metric)
            settings.append(
                {
                    "point": number,
                    "params": _without_seed(trials[0]["params"]),
                    "metric": metric,
                    "direction": direction,
                    "value": sum(values) / len(values) if values else None,
                    "low": low,
                    "high": high,
                    "num_ok": len(ok),
                    "num_failed": sum(trial["status"] == "failed" for trial in trials),
                }
            )
    front = pareto_points(settings)
    return [{**row, "on_front": row["point"] in front} for row in settings]


def _without_seed(params: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in params.items() if key != "seed"}


def _interval(
    values: Sequence[float], trials: Sequence[Mapping[str, Any]], metric: str
) -> tuple[float | None, float | None]:
    if not values:
        return None, None
    own = trials[0].get(f"{metric}_low"), trials[0].get(f"{metric}_high")
    return student_interval(values) or own


def pareto_points(settings: Sequence[Mapping[str, Any]]) -> set[int]:
    """Points that no other beats in one objective without losing in another.

    With one objective that is the best point. A point that lacks an objective is never on the
    front.
    """
    scores: dict[int, list[float]] = {}
    lacking = set()
    for row in settings:
        if row["value"] is None:
            lacking.add(row["point"])
            continue
        sign = 1.0 if row["direction"] == "maximize" else -1.0
        scores.setdefault(row["point"], []).append(sign * row["value"])
    kept = {point: values for point, values in scores.items() if point not in lacking}

    def beaten(values: list[float]) -> bool:
        return any(
            all(o >= v for o, v in zip(other, values, strict=True)) and other != values
            for other in kept.values()
        )

    return {point for point, values in kept.items() if not beaten(values)}


def settings_table(rows: Sequence[Mapping[str, Any]]) -> pyarrow.Table:
    """The table of ``settings.parquet``; ``params`` as JSON."""
    json_rows = [{**row, "params": json.dumps(row["params"])} for row in rows]
    return pyarrow.Table.from_pylist(json_rows, schema=schema("settings"))


def read_trials(folder: str) -> list[dict[str, Any]]:
    """The rows of ``trials.parquet``.

    Raises:
        ResultsError: the folder is not a sweep's.
    """
    read_manifest(folder, "sweep")
    path = storage.join(folder, "trials.parquet")
    return storage.read_table(path).to_pylist() if storage.exists(path) else []


def sweep_summary(folder: str) -> list[dict[str, Any]]:
    """The ``sweep`` list of ``summary.json``: one entry per trial.

    Returns:
        [trial_id, parameters, seed, status, acquisition, forgetting, mlflow_run_id, error];
        parameters are the swept keys, A and F fractions, None where a trial has none.

    Raises:
        ResultsError: the folder is not a sweep's.
    """
    keys = read_manifest(folder, "sweep").get("parameters", [])
    return [
        {
            "trial_id": row["trial_id"],
            "parameters": {key: row.get(key) for key in keys},
            "seed": row["seed"],
            "status": row["status"],
            "acquisition": row["acquisition"],
            "forgetting": row["forgetting"],
            "mlflow_run_id": row["mlflow_run_id"],
            "error": row["error"],
        }
        for row in read_trials(folder)
    ]
