"""Continual-learning runs and sweep trials, arranged as figures need them."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from ke_ray.core.intervals import student_interval
from ke_ray.report import axis
from ke_ray.report.sources import Result
from ke_ray.results.columns import TABLES

# Column of a run that has a title -> (title, unit on an axis, factor from the stored value to it).
RUN_COLUMNS: dict[str, tuple[str, str, float]] = {
    column.name: (column.title, column.shown_unit, column.factor)
    for column in TABLES["runs"]
    if column.title
}
_DECLARED = {column.name for table in ("runs", "trials") for column in TABLES[table]}
_VARIANT = ("resuscitation_ratio", "amplifying_factor", "control")
_BOOKKEEPING = {"mlflow", "output", "name", "experiment"}


def _frame(result: Result) -> pd.DataFrame:
    return result.table("runs" if result.kind == "continual" else "trials")


def run_key(result: Result) -> str:
    """The column that names a row."""
    return "run" if result.kind == "continual" else "trial_id"


def good_runs(result: Result) -> pd.DataFrame:
    """Rows that finished, ordered by starting step and seed, with ``variant``, ``x`` and ``unit``.

    ``x`` is how far training had come at the start, in the ``unit`` of ``ke_ray.report.axis``.
    """
    frame = _frame(result)
    if frame.empty:
        return pd.DataFrame(columns=[run_key(result), "variant", "x", *RUN_COLUMNS])
    frame = frame[frame["status"] == "ok"].sort_values(["step", "checkpoint", "seed"])
    frame = frame.reset_index(drop=True)
    frame["variant"] = [variant(row) for row in frame.to_dict("records")]
    starts = frame.drop_duplicates("checkpoint").drop(columns="seed", errors="ignore")
    starts = starts.rename(columns={"pretraining_seed": "seed"})
    placed = axis.placed(starts, starts["checkpoint"].to_list()).set_index("checkpoint")
    frame = frame.assign(**{name: frame["checkpoint"].map(placed[name]) for name in ("x", "unit")})
    return frame.sort_values(["x", "checkpoint", "seed"], ignore_index=True)


def failed_runs(result: Result) -> pd.DataFrame:
    """Rows without A and F, failed or stopped by a scheduler: [name, status, error]."""
    frame = _frame(result)
    if frame.empty:
        return pd.DataFrame(columns=[run_key(result), "status", "error"])
    return frame.loc[frame["status"] != "ok", [run_key(result), "status", "error"]]


def variant(row: dict[str, Any]) -> str:
    """``original``, ``p=0.5 q=2``, ``p=0.5 q=2 random``, …"""
    ratio, factor, control = (row.get(name) for name in _VARIANT)
    named = control if isinstance(control, str) and control not in ("", "none") else ""
    if not _known(ratio) and not _known(factor):
        return named or "original"
    parts = [f"p={ratio:g}"] if _known(ratio) else []
    parts += [f"q={factor:g}"] if _known(factor) else []
    return " ".join([*parts, named]).strip()


def _known(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def aggregate(frame: pd.DataFrame, by: list[str], column: str) -> pd.DataFrame:
    """Mean of ``column`` over repeats (seeds), in its unit: [*by, value, low, high, count].

    The interval: with one run, the run's own bootstrap interval (over paragraphs or items) where
    it has one; with several, the 95 % Student interval over the runs, which holds what differs
    between seeds. Unknown ends are NaN.
    """
    rows: list[dict[str, Any]] = []
    measured = frame[frame[column].notna()] if column in frame else frame.iloc[:0]
    factor = RUN_COLUMNS[column][2] if column in RUN_COLUMNS else 1.0
    for key, part in measured.groupby(by, dropna=False, sort=True):
        values = part[column].to_numpy(dtype=float)
        count, mean = len(values), float(values.mean())
        ends = student_interval(values) or tuple(
            float(part[name].iloc[0]) if name in part else math.nan
            for name in (f"{column}_low", f"{column}_high")
        )
        low, high = ends
        names = key if isinstance(key, tuple) else (key,)
        rows.append(
            dict(zip(by, names, strict=True))
            | {"value": mean * factor, "low": low * factor, "high": high * factor, "count": count}
        )
    return pd.DataFrame(rows, columns=[*by, "value", "low", "high", "count"])


def in_unit(frame: pd.DataFrame, column: str) -> pd.Series:
    """A column of runs in the unit that axes show."""
    return frame[column] * RUN_COLUMNS[column][2]


def swept_parameters(result: Result) -> list[str]:
    """Columns of swept keys (and of runs) of a sweep that take more than one value."""
    frame = good_runs(result)
    declared = {*_DECLARED, "variant", "x", "unit"}
    named = [
        name
        for name in frame.columns
        if name not in declared and name.split(".", 1)[0] not in _BOOKKEEPING
    ]
    extra = [name for name in (*_VARIANT, "checkpoint", "corpus", "seed") if name in frame.columns]
    varied = [name for name in named + extra if frame[name].astype(str).nunique() > 1]
    # A swept key and its run column hold the same thing: keep the first.
    kept: list[str] = []
    for name in varied:
        values = frame[name].astype(str).tolist()
        if not any(frame[other].astype(str).tolist() == values for other in kept):
            kept.append(name)
    return kept


def other_parameters(result: Result) -> list[str]:
    """What a sweep varies beside seeds, starts and resuscitation: a mean goes over it as well."""
    resuscitation = ("resuscit", "amplifying", "control", "checkpoint")
    return [
        name
        for name in swept_parameters(result)
        if name.rsplit(".", 1)[-1] != "seed" and not name.startswith(resuscitation)
    ]


def setting_names(result: Result, frame: pd.DataFrame) -> list[str]:
    """A name for each run that is equal for its repeats: what is swept, seeds and starts apart."""
    swept = other_parameters(result) if result.kind == "sweep" else []
    return [
        " ".join([row["variant"], *(f"{name}={_shown(row[name])}" for name in swept)])
        for row in frame.to_dict("records")
    ]


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
