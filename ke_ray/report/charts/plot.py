"""The two kinds of charts, described once with altair: values over an axis, and heat maps.

A row has ``value`` and, where there is an error, ``low`` and ``high``. Pointing anywhere shows the
nearest value with its error or, among many curves, the values of all at the nearest x; Ctrl and the
wheel zoom, dragging moves, a double click resets.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from ke_ray.report.charts.figure import SVG_ROWS, Chart, Plot
from ke_ray.report.charts.theme import DASHES, ORDERED, SHAPES

_HEIGHT = 260
_MOST_MARKED = 30  # a series with more values is drawn without markers
_MOST_NAMED = 12  # more series than this have no legend
_MOST_LISTED = 40  # more series than this are too many for one tooltip
_DODGE_PX = 5  # between error bars of different series at the same x


@dataclass(frozen=True)
class X:
    """The horizontal axis: a column of numbers, or of ``names`` (categories, in order)."""

    field: str
    title: str
    log: bool = False
    names: bool = False


@dataclass(frozen=True)
class Rule:
    """A straight line across the plot at a value of "x" or "y", with a few words."""

    axis: str
    value: float
    text: str = ""


def series_plot(
    rows: pd.DataFrame,
    x: X,
    y_title: str,
    *,
    columns: Mapping[str, str] | None = None,
    colour: str = "series",
    dash: str | None = None,
    bars: bool = False,
    rules: Sequence[Rule] = (),
    y_from: float | None = None,
    spread: str | None = None,
    interactive: bool = True,
) -> Plot:
    """Lines and points over an axis.

    Args:
        rows: ``x.field``, ``value``, ``colour`` and, where there are any, ``low`` and ``high``.
            ``mark`` says how a row is drawn: "line" (as without it), "thin" (a line without
            markers), "point", or "dot" (faint).
        x: the horizontal axis.
        y_title: title of the vertical axis and heading of ``value``, with the unit.
        columns: further columns to show -> their headings.
        colour: column that distinguishes series; a column of numbers is drawn as a ramp.
        dash: column that distinguishes lines of one colour by dash; None: as ``colour``.
        bars: whether errors are bars; else bands.
        rules: lines across the plot.
        y_from: a value that the vertical axis must include.
        spread: see :class:`Plot`.
        interactive: whether pointing and zooming do anything; a still picture needs neither.
    """
    rows = rows if "mark" in rows else rows.assign(mark="line")
    errors = "low" in rows and bool(rows["low"].notna().any())
    ramp = pd.api.types.is_numeric_dtype(rows[colour])
    dodged = bars and not ramp and not x.names and bool(rows[x.field].duplicated().any())
    if dodged:
        number = pd.Series(pd.factorize(rows[colour])[0], rows.index)
        rows = rows.assign(shift=(number - number.max() / 2) * _DODGE_PX)
    shift: dict[str, Any] = {"xOffset": alt.expr("datum.shift")} if dodged else {}
    names = {colour: colour, dash: dash} if dash else {colour: colour}
    shown = {**names, **(columns or {}), x.field: x.title, "value": y_title}
    if errors:
        shown |= {"low": "low (95 %)", "high": "high (95 %)"}
    least = alt.Undefined if y_from is None else y_from
    y = alt.Y("value:Q", title=y_title, scale=alt.Scale(zero=False, domainMin=least))
    base = alt.Chart().encode(x=_x_axis(x, rows), y=y, color=_colour(rows, colour, ramp))
    of_line = base.transform_filter(alt.datum.mark == "line")
    # Side by side, two legends are wider than a phone: that of dashes stands below the chart.
    orient = "bottom" if dash else alt.Undefined
    dashed = _by_name(rows, dash or colour, alt.StrokeDash, [list(d) for d in DASHES], orient)
    layers = [layer for rule in rules for layer in _rule(rule, x.title, y_title)]
    lined = bool((rows["mark"] == "line").any())
    if errors and lined and not bars:
        ends = {"y": alt.Y("low:Q", title=y_title), "y2": alt.Y2("high:Q")}
        layers.append(of_line.mark_area(opacity=0.22, aria=False).encode(**ends))
    elif errors:
        ends = {"y": alt.Y("low:Q", title=y_title), "y2": alt.Y2("high:Q")}
        layers.append(base.mark_rule(strokeWidth=1.4, aria=False, **shift).encode(**ends))
    if (rows["mark"] == "thin").any():
        thin = base.transform_filter(alt.datum.mark == "thin")
        layers.append(thin.mark_line(strokeWidth=1, opacity=0.6))
    if lined:
        line = of_line.mark_line(strokeWidth=2, aria=_aria(rows), **shift)
        layers.append(
            line.encode(detail=alt.Detail(f"{colour}:N"))
            if ramp
            else line.encode(strokeDash=dashed)
        )
    if not ramp:
        shape = _by_name(rows, colour, alt.Shape, list(SHAPES))
        marks = {"line": (35, 1.0), "point": (75, 1.0), "dot": (25, 0.55)}
        for mark, (size, opacity) in marks.items():
            if mark == "line" and _many(rows, colour):
                continue
            if (rows["mark"] == mark).any():
                layers.append(
                    base.transform_filter(alt.datum.mark == mark)
                    .mark_point(filled=True, size=size, opacity=opacity, aria=_aria(rows), **shift)
                    .encode(shape=shape, tooltip=_tooltip(rows, shown))
                )
    if interactive:
        by_x = not (errors or dash or x.names) and _listable(rows, x, colour)
        hover = _values_at_x(rows, x, shown, colour) if by_x else _ring(base, rows, shown, shift)
        layers.append(hover if x.names else hover.add_params(_zoom()))
    chart = layered(*layers, height=_HEIGHT)
    return Plot(chart, rows, shown, spread)


def heat_map(
    rows: pd.DataFrame,
    x: X,
    y: X,
    unit: str,
    *,
    value: str = "value",
    diverging: bool = False,
    write_values: bool = False,
    ends: tuple[float, float] | None = None,
    columns: Mapping[str, str] | None = None,
) -> Plot:
    """A cell per row, in the order of the rows; the first category of ``y`` at the bottom.

    ``value`` is the column of colours; ``diverging`` centres the colours on 0; ``write_values``
    writes the numbers into the cells; ``ends`` of the colours are those of the values by default.
    """
    scale = alt.Scale(interpolate="rgb", domainMid=0 if diverging else alt.Undefined)
    if ends is not None:
        scale.domainMin, scale.domainMax = ends
    colour = alt.Color(
        f"{value}:Q",
        title=unit,
        scale=scale,
        legend=alt.Legend(gradientLength=140, titleOrient="right", titleBaseline="middle"),
    )
    shown = {**(columns or {}), y.field: y.title, x.field: x.title, value: unit or "value"}
    base = alt.Chart().encode(
        x=alt.X(f"{x.field}:O", title=x.title, sort=None, axis=alt.Axis(labelAngle=0)),
        y=alt.Y(f"{y.field}:O", title=y.title, sort="descending"),
        tooltip=_tooltip(rows, shown),
    )
    layers = [base.mark_rect(aria=_aria(rows)).encode(color=colour)]
    if write_values:
        low, high = ends or (rows[value].min(), rows[value].max())
        share = (rows[value] - low) / ((high - low) or 1)
        edge = (share < 0.2) | (share > 0.82) if diverging else share < 0.45
        rows = rows.assign(dark=edge)
        ink = alt.when(alt.datum.dark).then(alt.value("#ffffff")).otherwise(alt.value("#14171b"))
        layers.append(
            base.mark_text(aria=False).encode(text=alt.Text(f"{value}:Q", format=".3~g"), color=ink)
        )
    tall = max(_HEIGHT, 9 * rows[y.field].nunique()) if not write_values else None
    height = tall or 42 * rows[y.field].nunique()
    chart = layered(*layers, height=height)
    return Plot(chart, rows, shown, value=value)


def layered(*layers: alt.Chart, height: int) -> Chart:
    """Layers over the rows of a :class:`Plot`, as wide as the page lets them be."""
    rows = alt.NamedData("rows")
    return alt.layer(*layers, data=rows, width="container", height=height)


def _aria(rows: pd.DataFrame) -> Any:
    """False for rows that a canvas draws: it has no elements for a screen reader to name."""
    return alt.Undefined if len(rows) <= SVG_ROWS else False


def _x_axis(x: X, rows: pd.DataFrame) -> alt.X:
    if x.names:
        return alt.X(f"{x.field}:N", title=x.title, sort=None)
    if not x.log:
        axis = alt.Axis(format="~s") if rows[x.field].abs().max() >= 10_000 else alt.Axis()
        scale = alt.Scale(zero=False, nice=False, padding=8)
        return alt.X(f"{x.field}:Q", title=x.title, scale=scale, axis=axis)
    # Logarithmic with zero allowed: log(1 + x / the smallest positive value).
    positive = rows.loc[rows[x.field] > 0, x.field]
    least, most = float(positive.min()), float(positive.max())
    decades = range(int(np.floor(np.log10(least))), int(np.ceil(np.log10(most))) + 1)
    digits = (1, 3) if len(decades) <= 4 else (1,)
    marks = [0.0, *(digit * 10.0**power for power in decades for digit in digits)]
    low = float(rows[x.field].min())
    scale = alt.Scale(type="symlog", constant=least, domain=[low, most], nice=False, padding=8)
    values = [mark for mark in marks if low <= mark <= most]
    axis = alt.Axis(format="~s", values=values)
    return alt.X(f"{x.field}:Q", title=x.title, scale=scale, axis=axis)


def _colour(rows: pd.DataFrame, field: str, ramp: bool) -> alt.Color:
    if not ramp:
        return _by_name(rows, field, alt.Color)
    scale = alt.Scale(range=list(ORDERED))
    legend = alt.Legend(gradientLength=140, tickCount=3, titleOrient="left", format="d")
    return alt.Color(f"{field}:Q", title=field, scale=scale, legend=legend)


def _by_name(
    rows: pd.DataFrame,
    field: str,
    channel: Any,
    values: Sequence[Any] | None = None,
    orient: Any = alt.Undefined,
) -> Any:
    """An encoding that distinguishes the names in a column, with one legend for all of them."""
    names = list(dict.fromkeys(rows[field]))
    scale = alt.Scale(domain=names)
    if values is not None:
        scale.range = [values[index % len(values)] for index in range(len(names))]
    legend = None
    if 1 < len(names) <= _MOST_NAMED:
        longest = max(len(str(name)) for name in names)
        room = "(isFinite(containerSize()[0]) ? containerSize()[0] - 60 : 340)"
        columns = alt.expr(f"max(1, floor({room} / {40 + 6 * longest}))")
        legend = alt.Legend(title=None, columns=columns, symbolOpacity=1, orient=orient)
        if orient == "bottom" or _many(rows, field):
            legend.symbolType = "stroke"
        else:
            legend.symbolStrokeWidth = 0  # dashed edges would hide the markers
    return channel(f"{field}:N", scale=scale, legend=legend)


def _many(rows: pd.DataFrame, field: str) -> bool:
    """Whether a series has too many values for markers."""
    return bool((rows.groupby(field).size() > _MOST_MARKED).any())


def _tooltip(rows: pd.DataFrame, shown: Mapping[str, str]) -> list[alt.Tooltip]:
    return [
        alt.Tooltip(f"{name}:Q", title=title, format=",.7~g")
        if pd.api.types.is_numeric_dtype(rows[name])
        else alt.Tooltip(f"{name}:N", title=title)
        for name, title in shown.items()
    ]


def _rule(rule: Rule, x_title: str, y_title: str) -> list[alt.Chart]:
    # Channels by their classes: altair takes tens of milliseconds to find the class of a string.
    base = alt.Chart(alt.Data(values=[{"at": rule.value, "text": rule.text}]))
    if rule.axis == "x":
        base = base.encode(x=alt.X("at:Q", title=x_title))
        text = base.mark_text(align="left", dx=4, dy=8).encode(
            y=alt.YValue(0), text=alt.Text("text:N")
        )
    else:
        base = base.encode(y=alt.Y("at:Q", title=y_title))
        text = base.mark_text(align="left", dx=4, dy=-6).encode(
            x=alt.XValue(0), text=alt.Text("text:N")
        )
    line = base.mark_rule(strokeDash=[2, 3], description=rule.text or "a line")
    return [line, text] if rule.text else [line]


def _listable(rows: pd.DataFrame, x: X, colour: str) -> bool:
    """Whether pointing lists the values at one x: many rows, and few of them at any x."""
    few = rows[colour].nunique() <= _MOST_LISTED
    return len(rows) > SVG_ROWS and few and not rows.duplicated([x.field, colour]).any()


def _nearest() -> tuple[alt.Parameter, Any]:
    """(a selection of the mark nearest to the pointer, the opacity that shows that mark alone)"""
    nearest = alt.selection_point(
        "nearest", nearest=True, on="pointermove", clear="pointerout", empty=False
    )
    return nearest, alt.when(nearest).then(alt.value(1)).otherwise(alt.value(0))


def _ring(
    base: alt.Chart, rows: pd.DataFrame, shown: Mapping[str, str], shift: Mapping[str, Any]
) -> alt.Chart:
    """A ring around the nearest value; its tooltip shows that value with its error."""
    nearest, opacity = _nearest()
    ring = base.mark_point(size=110, filled=False, aria=False, **shift)
    return ring.encode(tooltip=_tooltip(rows, shown), opacity=opacity).add_params(nearest)


def _values_at_x(rows: pd.DataFrame, x: X, shown: Mapping[str, str], colour: str) -> alt.Chart:
    """A rule at the nearest x; its tooltip lists the value of every series there.

    It is one mark per x, where rings are one per row: thousands, which a page takes seconds to
    place and to search.
    """
    nearest, opacity = _nearest()
    fields = [name for name in shown if name not in (colour, "value", "low", "high")]
    at_x = rows.groupby(x.field, sort=False)
    of_x = {name: shown[name] for name in fields if at_x[name].nunique().max() <= 1}
    prefix = f"{colour} " if pd.api.types.is_numeric_dtype(rows[colour]) else ""
    values = [
        alt.Tooltip(
            field=re.sub(r"[\\.\[\]]", r"\\\g<0>", str(name)),  # else a path into an object
            type="quantitative",
            title=f"{prefix}{name}",
            format=".7~g",
        )
        for name in dict.fromkeys(rows[colour])
    ]
    return (
        alt.Chart()
        .transform_pivot(colour, value="value", groupby=list(of_x), op="max")
        .mark_rule(aria=False)
        .encode(x=_x_axis(x, rows), tooltip=_tooltip(rows, of_x) + values, opacity=opacity)
        .add_params(nearest)
    )


def _zoom() -> alt.Parameter:
    wheel = "wheel![event.ctrlKey || event.metaKey]"
    return alt.selection_interval("zoom", bind="scales", zoom=wheel)
