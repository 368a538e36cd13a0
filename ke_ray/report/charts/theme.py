"""Colours and fonts of all charts, as Vega-Lite configurations in light and dark.

A chart names no colour of a theme: it refers to the ranges that are set here, so that one
description serves both themes. Lines differ in colour, dash and marker, heat maps in lightness, so
that colour-blind readers can tell them apart (Okabe and Ito's colours, lighter on dark).
"""

from __future__ import annotations

from typing import Any

PALETTES = {
    "light": ("#0072b2", "#d55e00", "#009e73", "#b8548f", "#b87a00", "#3795c9"),
    "dark": ("#56b4e9", "#f08a3c", "#2fc598", "#e39ac4", "#f0e442", "#8fa3ff"),
}
DASHES = ((1, 0), (6, 4), (2, 3), (9, 3, 2, 3))
SHAPES = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross")

# Ramps run from blue to yellow or vermilion. Every step of ORDERED stands out on white and on
# near-black; the middle of DIVERGING is pale.
ORDERED = ("#3b6fc0", "#6a7f9c", "#8a8780", "#a5864f", "#bd8420")
_SEQUENTIAL = ("#2c4a7c", "#4a5f85", "#65738a", "#82888a", "#a09d80", "#bfb16f", "#ddc456")
DIVERGING = ("#0a4f8a", "#4a86b8", "#a3c4dd", "#f2f0ec", "#f0b48a", "#d9733a", "#a53f05")

_INKS = {  # background, text, secondary text, grid
    "light": ("#ffffff", "#1b1f24", "#57606a", "#e7eaee"),
    "dark": ("#1b1f25", "#e8ebef", "#a4adb8", "#2b3139"),
}
_FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif'


def config(theme: str) -> dict[str, Any]:
    """The Vega-Lite ``config`` of a theme, "light" or "dark"."""
    background, ink, muted, grid = _INKS[theme]
    axis = {
        "labelColor": muted,
        "titleColor": ink,
        "gridColor": grid,
        "domainColor": muted,
        "tickColor": muted,
        "titleFontWeight": "normal",
        "labelOverlap": "greedy",
        "labelFontSize": 11,
        "titleFontSize": 11,
        "titleLimit": 600,
        "labelLimit": 150,
    }
    # The title of the y axis stands above it, so that it is read without turning the head.
    y_axis = {"titleAngle": 0, "titleAlign": "left", "titleX": 0, "titleY": -8}
    return {
        "background": background,
        "font": _FONT,
        "axis": axis,
        "axisY": {**y_axis, "titleBaseline": "bottom", "domain": False, "ticks": False},
        "axisX": {"grid": False, "labelSeparation": 8},
        "view": {"stroke": None},
        "legend": {
            "orient": "top",
            "labelColor": ink,
            "titleColor": ink,
            "titleFontWeight": "normal",
            "labelFontSize": 11,
            "titleFontSize": 11,
            "labelLimit": 300,
            "symbolStrokeWidth": 2,
            "offset": 26,  # above the title of the y axis
        },
        "title": {"color": ink, "anchor": "start", "fontSize": 13, "subtitleColor": muted},
        "text": {"color": muted},
        "rule": {"color": muted},
        "range": {
            "category": list(PALETTES[theme]),
            "ordinal": list(ORDERED),
            "ramp": list(_SEQUENTIAL),
            "heatmap": list(_SEQUENTIAL),
            "diverging": list(DIVERGING),
        },
    }
