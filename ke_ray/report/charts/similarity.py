"""Checkpoint × checkpoint: how alike the memory use of a scan's checkpoints is."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd

from ke_ray.core.similarity import NAMES, over_layers, widths
from ke_ray.report import axis, series
from ke_ray.report.charts.figure import Figure, Panel
from ke_ray.report.charts.plot import X, heat_map
from ke_ray.report.sources import Result
from ke_ray.results.columns import TABLES

_MOST = 24  # checkpoints of a map: every further one adds cells that nobody can point at


def similarity_figures(scan: Result, figure: Callable[..., Figure]) -> list[Figure]:
    """A map per measure and corpus, of the checkpoints of one curve that have coefficients."""
    columns = {column.name: column for column in TABLES["comparison"]}
    title = axis.TITLES[series.unit(scan)]
    x, y = X("at", title), X("other_at", title)
    shown = {"checkpoint": "checkpoint", "other": "other checkpoint"}
    panels = []
    for number, corpus in enumerate(series.corpora(scan)):
        rows = similarity_rows(scan, None if number == 0 else corpus)
        for name in NAMES if len(rows) else ():
            column = columns[name]
            plot = heat_map(rows, x, y, column.unit, value=name, columns=shown)
            panels.append(Panel((column.title, corpus), plot))
    if not panels:
        return []
    return [
        figure(
            "similarity",
            title="Checkpoint × checkpoint",
            caption="How alike two checkpoints use their memories, mean over layers. At most "
            f"{_MOST} evenly spaced checkpoints are drawn, not to the scale of steps; "
            "'ke-ray compare' has every pair and layer.",
            panels=panels,
            controls=("measure", "corpus"),
        )
    ]


def similarity_rows(scan: Result, corpus: str | None) -> pd.DataFrame:
    """One row per ordered pair of checkpoints, means over layers; empty where nothing compares."""
    order = series.checkpoints(scan)
    if len(order) > _MOST:
        order = order.iloc[np.linspace(0, len(order) - 1, _MOST).round().astype(int)]
    arrays = {name: series.coefficients(scan, name, corpus) for name in order["checkpoint"]}
    kept = {name: array for name, array in arrays.items() if array is not None and array.ndim == 2}
    if len(kept) < 2 or len({widths(array) for array in kept.values()}) > 1:
        return pd.DataFrame()
    layers = list(over_layers(np.stack(list(kept.values()))))
    at = order.set_index("checkpoint")["x"].map("{:g}".format)
    pairs = pd.MultiIndex.from_product([list(kept), list(kept)], names=["checkpoint", "other"])
    rows = pairs.to_frame(index=False)
    rows["at"], rows["other_at"] = rows["checkpoint"].map(at), rows["other"].map(at)
    for name in NAMES:
        values = np.ma.masked_invalid([layer[name] for layer in layers]).mean(axis=0)
        rows[name] = np.ma.filled(values, np.nan).ravel()
    return rows.assign(mark="line")
