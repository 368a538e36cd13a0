"""Parallel coordinates of a sweep: one line a trial, through its parameters and its results."""

from __future__ import annotations

import pandas as pd

from ke_ray.report import runs
from ke_ray.report.sources import Result

__all__ = ["parallel_coordinates"]

_RESULTS = ("acquisition", "forgetting", "knowledge_entropy_before_nats", "probe_logprob_after")


def parallel_coordinates(sweep: Result) -> str | None:
    """A self-contained interactive HTML page; None where no two finished trials differ.

    Axes can be dragged, and ranges on them select trials. The colour is A.
    """
    frame = runs.good_runs(sweep)
    names = [name for name in runs.swept_parameters(sweep) if name in frame]
    if len(frame) < 2 or not names:
        return None
    import plotly.graph_objects as go

    axes = [_axis(name, frame[name]) for name in names]
    for column in _RESULTS:
        if column in frame and frame[column].notna().any():
            title, unit, factor = runs.RUN_COLUMNS[column]
            shown = frame[column] * factor
            axes.append({"label": f"{title} ({unit})" if unit else title, "values": shown.tolist()})
    colours = frame["acquisition"].fillna(frame["acquisition"].min())
    line = {"color": colours.tolist(), "colorscale": "Viridis", "showscale": False}
    figure = go.Figure(go.Parcoords(dimensions=axes, line=line if colours.notna().any() else None))
    figure.update_layout(
        title=f"{sweep.name}: {len(frame)} trials",
        margin={"l": 90, "r": 60, "t": 90, "b": 40},
        template="plotly_white",
    )
    return str(figure.to_html(include_plotlyjs=True, full_html=True))


def _axis(name: str, values: pd.Series) -> dict[str, object]:
    numbers = pd.to_numeric(values, errors="coerce")
    if numbers.notna().all():
        return {"label": name, "values": numbers.tolist()}
    texts = values.map(lambda value: "none" if pd.isna(value) else str(value))
    order = sorted(texts.unique())
    return {
        "label": name,
        "values": [order.index(text) for text in texts],
        "tickvals": list(range(len(order))),
        "ticktext": order,
    }
