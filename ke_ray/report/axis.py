"""The horizontal axis of a scan: how far training had come at each checkpoint.

It counts cumulative tokens where a series has several stages and the tokens of every checkpoint are
known, else steps, else tokens or words. Steps that start again in a later stage follow on from the
end of the stage before. Where nothing is known, checkpoints are placed in their order.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from ke_ray.core.position import (
    POSITION,
    natural_key,
    stage_key,
    stage_name,
    starts_again,
)

#: What an axis counts → its title.
TITLES = {
    "step": "pretraining step",
    "stage step": "pretraining step, stage by stage",
    "tokens": "pretraining tokens",
    "words": "pretraining words",
    "place": "checkpoint (place in the list)",
}


def placed(table: pd.DataFrame, listed: Sequence[str]) -> pd.DataFrame:
    """The checkpoints of a scan in training order, with ``x`` and, in each row, its ``unit``.

    Args:
        table: one row per checkpoint, with ``checkpoint``, ``series`` and the columns of a position
            (``ke_ray.core.position``).
        listed: names of checkpoints in the order of the listing, which stands where a number is
            unknown.
    """
    frame = table.reindex(columns=["checkpoint", "series", *POSITION]).copy()
    stages = [
        (None if number < 0 else int(number), label or None)
        for number, label in zip(
            frame["stage"].astype(float).fillna(-1), frame["stage_label"].fillna(""), strict=True
        )
    ]
    frame["stage_rank"] = _ranks(stages, lambda stage: stage_key(*stage))
    frame["stage_name"] = [stage_name(*stage) for stage in stages]
    for column in ("seed", "branch"):
        frame[f"{column}_rank"] = _ranks(frame[column].fillna("").to_list(), natural_key)
    number = frame["step"].fillna(frame["tokens"]).fillna(frame["words"])
    places = {name: place for place, name in enumerate(listed)}
    frame["listed"] = [places.get(name, len(places)) for name in frame["checkpoint"]]
    order = ["series", "unknown", "seed_rank", "stage_rank", "branch_rank", "number"]
    frame = frame.assign(number=number, unknown=number.isna()).sort_values(
        [*order, "listed", "checkpoint"], na_position="last", ignore_index=True
    )
    frame["x"], frame["unit"] = _axis(frame)
    return frame.drop(columns=["seed_rank", "branch_rank", "listed"])


def borders(frame: pd.DataFrame, column: str = "x") -> dict[float, str]:
    """Where stages end → the name of the one that follows; of checkpoints that are ``placed``."""
    found: dict[float, str] = {}
    for _, run in _runs(frame[~frame["unknown"] | (frame["stage_name"] != "")]):
        ends = run.groupby("stage_rank")[column].max()
        names = run.groupby("stage_rank")["stage_name"].max()
        for end, name in zip(ends.iloc[:-1], names.iloc[1:], strict=True):
            if name and np.isfinite(end):
                found.setdefault(float(end), str(name))
    return found


def _axis(frame: pd.DataFrame) -> tuple[Any, str]:
    known = frame[~frame["unknown"]]
    num_unknown = len(frame) - len(known)
    if num_unknown > len(known):
        return np.arange(len(frame), dtype=float), "place"
    whole = [unit for unit in ("step", "tokens", "words") if known[unit].notna().all()]
    several = any(run["stage_rank"].nunique() > 1 for _, run in _runs(known))
    if "tokens" in whole and (several or "step" not in whole):
        x, unit = known["tokens"], "tokens"
    elif "step" in whole:
        x = _following(known)
        unit = "step" if x.equals(known["step"]) else "stage step"
    elif whole:
        x, unit = known[whole[0]], whole[0]
    else:
        return np.arange(len(frame), dtype=float), "place"
    return _with_unknown(frame, x.astype(float)), unit


def _following(frame: pd.DataFrame) -> pd.Series:
    """Steps; those of a stage that starts again follow on from the stage before."""
    x = frame["step"].astype(float)
    for _, run in _runs(frame):
        end = 0.0
        for _, stage in run.groupby("stage_rank"):
            offset = end if starts_again(stage["step"].min(), end) else 0.0
            x.loc[stage.index] = stage["step"] + offset
            end = offset + float(stage["step"].max())
    return x


def _with_unknown(frame: pd.DataFrame, x: pd.Series) -> pd.Series:
    """``x`` of all checkpoints; those without a number stand one interval apart after the last."""
    x = x.reindex(frame.index)
    for _, run in frame.groupby("series", dropna=False):
        own = np.unique(x.loc[run.index].dropna())
        gap = float(np.median(np.diff(own))) if len(own) > 1 else 1.0
        last = float(own[-1]) if len(own) else 0.0
        rest = run.index[run["unknown"]]
        x.loc[rest] = last + gap * np.arange(1, len(rest) + 1)
    return x


def _runs(frame: pd.DataFrame) -> Any:
    return frame.groupby(["series", "seed"], dropna=False)


def _ranks(values: Sequence[Hashable], key: Callable[[Any], Any]) -> list[int]:
    """The place of each value's sort key among the different ones."""
    keys = {value: key(value) for value in set(values)}
    places: dict[str, int] = {}
    for sort_key in sorted(keys.values()):
        places.setdefault(repr(sort_key), len(places))
    return [places[repr(keys[value])] for value in values]
