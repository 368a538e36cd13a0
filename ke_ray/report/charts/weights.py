"""Geometry of weight matrices over pretraining, from ``weights.parquet``."""

from __future__ import annotations

from collections.abc import Callable

from ke_ray.report import series
from ke_ray.report.charts.figure import Figure, Panel
from ke_ray.report.charts.plot import X, series_plot
from ke_ray.report.sources import Result
from ke_ray.results.columns import TABLES


def weight_figures(scan: Result, x_title: str, figure: Callable[..., Figure]) -> list[Figure]:
    """A view per value, with a line per matrix; empty where nothing was computed."""
    table = scan.table("weights")
    if table.empty:
        return []
    rows = series.checkpoints(scan).merge(table[table["status"] == "ok"], on="checkpoint")
    panels = []
    for column in (column for column in TABLES["weights"] if column.title):
        means = rows.groupby(["matrix", "x", "checkpoint"], sort=False)[column.name].mean()
        values = (means * column.factor).dropna().reset_index(name="value")
        if len(values):
            unit = f" ({column.shown_unit})" if column.shown_unit else ""
            plot = series_plot(
                values.rename(columns={"matrix": "series"}).sort_values(["series", "x"]),
                X("x", x_title),
                f"{column.title}{unit}",
                columns={"checkpoint": "checkpoint"},
            )
            panels.append(Panel((column.title,), plot))
    if not panels:
        return []
    return [
        figure(
            "weights",
            title="Weights over pretraining",
            caption="Every line is the mean over layers of one feed-forward or attention matrix. "
            "No forward pass and no data enter, so there is no error.",
            panels=panels,
            controls=("measure",),
        )
    ]
