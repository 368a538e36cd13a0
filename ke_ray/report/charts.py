"""What a figure says, apart from how it is drawn.

A chart holds the very numbers that are drawn; the table beside a figure, its CSV and the tooltips
are made from the same object, so they cannot disagree with the picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Numbers = Sequence[float] | np.ndarray

__all__ = ["Chart", "Figure", "HeatMap", "Line", "Mark", "Numbers", "Panel", "TextTable", "known"]


def known(values: Any) -> list[float | None]:
    """Floats at seven significant digits; None where unknown."""
    array = np.asarray(values, dtype=float).ravel().tolist()
    return [float(f"{value:.7g}") if math.isfinite(value) else None for value in array]


@dataclass(frozen=True)
class Line:
    """A series: values over x, with error ends where there are any.

    ``colour`` is a place in the palette or an explicit "#rrggbb"; ``kind`` is "line", "points" or
    "dots" (small and faint); ``dash`` 0 is solid; ``band`` draws the error as a band, else as bars.
    """

    name: str
    x: Numbers
    y: Numbers
    low: Numbers | None = None
    high: Numbers | None = None
    colour: int | str = 0
    dash: int = 0
    kind: str = "line"
    band: bool = True
    labels: Sequence[str] | None = None
    legend: bool = True


@dataclass(frozen=True)
class Mark:
    """A straight line across the plot at a value of "x" or "y", with a few words."""

    axis: str
    value: float
    text: str = ""


@dataclass(frozen=True)
class Chart:
    """Lines and points over two axes. ``x_names`` replaces numbers on the x axis (categories)."""

    x_title: str
    y_title: str
    lines: Sequence[Line]
    marks: Sequence[Mark] = ()
    log_x: bool = False
    x_names: Sequence[str] | None = None
    include_y: Sequence[float] = ()
    ramp: tuple[str, str] | None = None  # legend of an ordered colour ramp: its two ends

    def data(self) -> dict[str, Any]:
        """The numbers, for tables, CSV and tooltips."""
        return {
            "kind": "xy",
            "x": self.x_title,
            "y": self.y_title,
            "names": list(self.x_names) if self.x_names is not None else None,
            "lines": [
                {
                    "name": line.name,
                    "x": known(line.x),
                    "y": known(line.y),
                    "low": known(line.low) if line.low is not None else None,
                    "high": known(line.high) if line.high is not None else None,
                    "labels": list(line.labels) if line.labels is not None else None,
                }
                for line in self.lines
            ],
        }

    @property
    def empty(self) -> bool:
        return not any(np.isfinite(np.asarray(line.y, dtype=float)).any() for line in self.lines)


@dataclass(frozen=True)
class HeatMap:
    """A matrix of values [rows, columns]; ``centre`` makes the colours diverge from it."""

    x_title: str
    y_title: str
    unit: str
    values: np.ndarray
    x_names: Sequence[str]
    y_names: Sequence[str]
    centre: float | None = None
    write_values: bool = False

    def data(self) -> dict[str, Any]:
        """The numbers, for tables, CSV and tooltips."""
        return {
            "kind": "heat",
            "x": self.x_title,
            "y": self.y_title,
            "unit": self.unit,
            "columns": list(self.x_names),
            "rows": list(self.y_names),
            "values": [known(row) for row in self.values],
        }

    @property
    def empty(self) -> bool:
        return not np.isfinite(self.values).any()


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
    chart: Chart | HeatMap | TextTable


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
