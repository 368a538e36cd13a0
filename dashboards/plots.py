"""The report's charts as interactive plotly figures."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from ke_ray.report.charts import Chart, HeatMap, Line
from ke_ray.report.scales import diverging, sequential

__all__ = ["to_plotly"]

# Okabe and Ito's colours as in the report, lighter on dark; lines also differ in dash and marker.
LIGHT = ("#0072B2", "#D55E00", "#009E73", "#B8548F", "#B87A00", "#3795C9")
DARK = ("#56B4E9", "#F08A3C", "#2FC598", "#E39AC4", "#F0E442", "#8FA3FF")
DASHES = ("solid", "dash", "dot", "dashdot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross")


def to_plotly(chart: Chart | HeatMap, *, dark: bool = False) -> go.Figure:
    """An interactive figure with the same lines, errors, marks and units."""
    figure = _heat(chart) if isinstance(chart, HeatMap) else _lines(chart, DARK if dark else LIGHT)
    figure.update_layout(
        margin={"l": 10, "r": 10, "t": 30, "b": 10},
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.02, "x": 0},
        hovermode="closest",
        height=420,
    )
    ink = "#d5d8dd" if dark else "#3c4450"
    words = {"automargin": True, "tickfont_color": ink, "title_font_color": ink}
    figure.update_xaxes(title_text=chart.x_title, **words)
    figure.update_yaxes(title_text=chart.y_title, **words)
    return figure


def _rgba(colour: str, alpha: float) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"


def _lines(chart: Chart, palette: tuple[str, ...]) -> go.Figure:
    figure = go.Figure()
    for line in chart.lines:
        colour = line.colour if isinstance(line.colour, str) else palette[line.colour % 6]
        if line.low is not None and line.band and line.kind == "line":
            _band(figure, line, colour)
        figure.add_trace(_trace(line, colour))
    for mark in chart.marks:
        style = {"line_dash": "dot", "line_color": "gray", "annotation_text": mark.text}
        if mark.axis == "x":
            figure.add_vline(x=mark.value, **style)
        else:
            figure.add_hline(y=mark.value, **style)
    if chart.log_x:
        figure.update_xaxes(type="log")
    if chart.x_names is not None:
        places = list(range(len(chart.x_names)))
        figure.update_xaxes(tickvals=places, ticktext=list(chart.x_names))
    return figure


def _band(figure: go.Figure, line: Line, colour: str) -> None:
    low, high = np.asarray(line.low, dtype=float), np.asarray(line.high, dtype=float)
    known = np.isfinite(low) & np.isfinite(high)
    x = np.asarray(line.x, dtype=float)[known]
    figure.add_trace(
        go.Scatter(
            x=np.concatenate([x, x[::-1]]),
            y=np.concatenate([high[known], low[known][::-1]]),
            fill="toself",
            fillcolor=_rgba(colour, 0.22),
            line={"width": 0},
            hoverinfo="skip",
            showlegend=False,
        )
    )


def _trace(line: Line, colour: str) -> go.Scatter:
    shape = line.colour % 6 if isinstance(line.colour, int) else 0
    many = len(line.x) > 60
    mode = "lines" if many else "lines+markers"
    errors = None
    if line.low is not None and line.high is not None and not (line.band and line.kind == "line"):
        y = np.asarray(line.y, dtype=float)
        errors = {
            "type": "data",
            "array": np.asarray(line.high, dtype=float) - y,
            "arrayminus": y - np.asarray(line.low, dtype=float),
        }
    return go.Scatter(
        x=np.asarray(line.x, dtype=float),
        y=np.asarray(line.y, dtype=float),
        mode=mode if line.kind == "line" else "markers",
        name=line.name,
        text=list(line.labels) if line.labels is not None else None,
        hovertemplate=("%{text}<br>" if line.labels is not None else "")
        + f"%{{x}}: %{{y:.6g}}<extra>{line.name}</extra>",
        line={"color": colour, "dash": DASHES[line.dash % 4], "width": 2},
        marker={
            "color": colour,
            "symbol": SYMBOLS[shape],
            "size": 9 if line.kind == "points" else 6,
            "opacity": 0.55 if line.kind == "dots" else 1,
        },
        error_y=errors,
        showlegend=line.legend,
    )


def _heat(chart: HeatMap) -> go.Figure:
    ramp = sequential if chart.centre is None else diverging
    scale = [[i / 10, ramp(i / 10)] for i in range(11)]
    figure = go.Figure(
        go.Heatmap(
            z=chart.values,
            x=[str(name) for name in chart.x_names],
            y=[str(name) for name in chart.y_names],
            colorscale=scale,
            zmid=chart.centre,
            colorbar={"title": chart.unit},
            texttemplate="%{z:.3g}" if chart.write_values else None,
            hovertemplate=f"{chart.x_title} %{{x}}<br>{chart.y_title} %{{y}}<br>%{{z:.6g}} "
            f"{chart.unit}<extra></extra>",
        )
    )
    figure.update_xaxes(type="category")
    figure.update_yaxes(type="category")
    return figure
