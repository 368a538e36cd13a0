"""A figure: views that menus choose from, with the rows behind them and where they come from.

A plot holds the very rows that are drawn. The HTML page, the Streamlit page and the PNG draw its
one description; the table beside it, its CSV and the tooltips show the same rows, so they cannot
disagree with the picture.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import altair as alt
import pandas as pd

from ke_ray.report.charts.theme import config
from ke_ray.report.sources import Result

Chart = alt.Chart | alt.LayerChart | alt.FacetChart
SVG_ROWS = 1000  # more are drawn on a canvas, which stays responsive


@dataclass(frozen=True)
class Plot:
    """An altair chart over ``rows``.

    Attributes:
        chart: the description; it reads the columns of the data named "rows".
        rows: one row per drawn value.
        columns: the columns that a reader is shown -> their headings.
        spread: the column whose values become columns of the table of numbers, if any.
        value: the column that is drawn.
    """

    chart: Chart
    rows: pd.DataFrame
    columns: Mapping[str, str]
    spread: str | None = None
    value: str = "value"

    def spec(self) -> dict[str, Any]:
        """Vega-Lite without the rows, which go by the name "rows"."""
        # Tests compile every chart; checking the schema again would double the time of a report.
        spec: dict[str, Any] = self.chart.to_dict(validate=False)
        return spec | {"usermeta": self._usermeta()}

    def over(self, rows: pd.DataFrame) -> Plot:
        """The same chart over other rows, of the same series."""
        return replace(self, rows=rows)

    def themed(self, theme: str) -> Chart:
        """The chart with its rows in the colours of a theme, "light" or "dark"."""
        chart = self.chart.copy(deep=False)
        chart.data = self.rows
        chart.usermeta = self._usermeta()
        chart.config = alt.Config(**config(theme))
        return chart

    def _usermeta(self) -> dict[str, Any]:
        renderer = "svg" if len(self.rows) <= SVG_ROWS else "canvas"
        return {"embedOptions": {"renderer": renderer}}

    @property
    def empty(self) -> bool:
        """Whether no value is finite."""
        return bool(self.rows[self.value].isna().all())


@dataclass(frozen=True)
class TextTable:
    """Rows that are best read as a table alone."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]

    @property
    def empty(self) -> bool:
        return not self.rows


@dataclass(frozen=True)
class Panel:
    """One of the views of a figure; ``key`` has one choice for each of the figure's controls."""

    key: tuple[str, ...]
    view: Plot | TextTable


@dataclass(frozen=True)
class Figure:
    """A titled set of panels that controls choose from, with where the numbers come from."""

    id: str
    title: str
    caption: str
    panels: Sequence[Panel]
    controls: Sequence[str] = ()
    paper: str = ""
    command: str = ""
    source: str = ""
    fingerprints: Sequence[tuple[str, str]] = field(default=())
    wide: bool = False


def figure_of(result: Result, prefix: str, name: str, **parts: Any) -> Figure:
    """A figure of one result, which says where it comes from."""
    parts.setdefault("fingerprints", result.fingerprints)
    return Figure(id=f"{prefix}-{name}", command=result.command, source=result.path, **parts)


def number(value: float | None) -> str:
    """A value for reading, six significant digits; '–' where unknown."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == int(value) and abs(value) < 1e12:
        return f"{int(value):,}".replace("-", "−")
    return f"{value:.6g}".replace("-", "−")
