"""Stages and seeds of training runs in the figures of a scan."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from ke_ray.report import series
from ke_ray.report.charts.plot import Rule, X
from ke_ray.report.sources import Result

ALL_SEEDS = "all seeds"  # in the place of a checkpoint's name
Curves = Sequence[tuple[str, Result]]


def border_rules(scan: Result, x: X) -> list[Rule]:
    """Where stages of training end, named by the one that follows."""
    return [Rule("x", end, f"{name} →") for end, name in series.borders(scan, x.field).items()]


def with_means(curves: Curves, rows: pd.DataFrame) -> pd.DataFrame:
    """Rows in which the curves of several seeds are thin, beside their mean and its range.

    Args:
        curves: of the scan, see ``series.curves``.
        rows: with ``series`` ("curve: corpus"), ``corpus``, ``x``, ``value``, ``low``, ``high``.
    """
    rows, means = rows.assign(mark="line"), []
    places = [name for name in ("x", "tokens") if name in rows]
    for common, labels in series.seeds(curves).items():
        for corpus in rows["corpus"].unique():
            own = rows["series"].isin([f"{label}: {corpus}" for label in labels])
            rows.loc[own, "mark"] = "thin"
            rows.loc[own, ["low", "high"]] = np.nan
            values = rows[own].groupby(places)["value"].agg(["mean", "min", "max", "count"])
            shared = values[values["count"] == len(labels)].reset_index()
            means.append(
                shared[places].assign(
                    value=shared["mean"],
                    low=shared["min"],
                    high=shared["max"],
                    series=f"mean of {len(labels)} seeds" + (f", {common}" * bool(common)),
                    corpus=corpus,
                    checkpoint=ALL_SEEDS,
                    mark="line",
                )
            )
            means[-1]["series"] += f": {corpus}"
    return pd.concat([rows, *means], ignore_index=True)


def runs_caption(scan: Result, curves: Curves) -> str:
    """Sentences on seeds, stages and checkpoints without a number; empty where there are none."""
    caption = ""
    if series.seeds(curves):
        caption += " Thin lines are single seeds, beside their mean."
    if series.borders(scan):
        caption += " Dotted lines mark where a stage of training ends and the next follows on."
    if unnumbered := series.num_unnumbered(scan):
        caption += (
            f" {unnumbered} checkpoint{'s' if unnumbered > 1 else ''} without a number in the name "
            "stand one interval apart after the last."
        )
    return caption
