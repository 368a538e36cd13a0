"""Charts as SVG that reads well at a given width, in dark and light.

Why not a plotting library: its script alone would be 4.8 MB of a 6 MB page and a second of start.
Here the page carries only the figures (tens of kilobytes), they are there without any script, and
each is drawn anew for narrow and wide windows, so that text never shrinks. Colours are CSS
variables (``--c0`` … ``--c5``), which the page sets for dark and light.
"""

from __future__ import annotations

import html
import json
import math
from typing import Any

import numpy as np

from ke_ray.report.charts import Chart, HeatMap, Line, Mark, Numbers
from ke_ray.report.heat_map import CHAR_WIDTH, draw_heat_map, text
from ke_ray.report.scales import Scale, ordered, short

__all__ = ["draw"]

_DASHES = ("", "6 4", "2 3", "9 3 2 3")
_MAX_MARKERS = 30


def draw(chart: Chart | HeatMap, width: int, label: str) -> str:
    """An ``<svg>`` element ``width`` pixels wide; ``label`` is read out in place of the picture."""
    body, height, scale = (
        draw_heat_map(chart, width) if isinstance(chart, HeatMap) else _lines(chart, width)
    )
    scales = html.escape(json.dumps(scale, separators=(",", ":")), quote=True)
    return (
        f'<svg viewBox="0 0 {width} {height:.0f}" width="{width}" height="{height:.0f}" '
        f'role="img" aria-label="{html.escape(label, quote=True)}" data-scale="{scales}">'
        f"{body}</svg>"
    )


def _colour(colour: int | str) -> str:
    return colour if isinstance(colour, str) else f"var(--c{colour % 6})"


def _extent(values: Numbers, margin: float) -> tuple[float, float]:
    array = np.asarray(values, dtype=float)
    array = array[np.isfinite(array)]
    if not len(array):
        return 0.0, 1.0
    low, high = float(array.min()), float(array.max())
    if high - low <= 1e-12 * max(1.0, abs(high)):
        pad = abs(high) * 0.05 or 0.5
        return low - pad, high + pad
    return low - margin * (high - low), high + margin * (high - low)


def _legend(chart: Chart, width: int) -> tuple[str, float]:
    """Keys of the lines, wrapped to the width; (elements, height)."""
    if chart.ramp is not None:
        return _ramp_legend(chart.ramp), 22
    shown = [line for line in chart.lines if line.legend and line.name]
    if len(shown) < 2:
        return "", 4
    parts, x, y = [], 4.0, 12.0
    for line in shown:
        size = 30 + len(line.name) * CHAR_WIDTH
        if x + size > width and x > 4:
            x, y = 4.0, y + 18
        colour = _colour(line.colour)
        if line.kind == "line":
            parts.append(
                f'<line x1="{x}" y1="{y - 4}" x2="{x + 18}" y2="{y - 4}" style="stroke:{colour}" '
                f'stroke-width="2.2" stroke-dasharray="{_DASHES[line.dash % 4]}"/>'
            )
        shape = 0 if line.kind == "dots" else line.colour
        parts.append(_marker(x + 9, y - 4, shape, colour, 2.6 if line.kind == "dots" else 3.4))
        parts.append(text(x + 23, y, line.name, cls="key"))
        x += size
    return "".join(parts), y + 10


def _ramp_legend(ends: tuple[str, str]) -> str:
    first = 4 + len(ends[0]) * CHAR_WIDTH + 6
    boxes = "".join(
        f'<rect x="{first + 8 * i:.0f}" y="3" width="8" height="10" fill="{ordered(i / 11)}"/>'
        for i in range(12)
    )
    return text(4, 12, ends[0], cls="key") + boxes + text(first + 102, 12, ends[1], cls="key")


def _marker(x: float, y: float, shape: int | str, colour: str, size: float = 3.4) -> str:
    """Shape and colour both tell lines apart, for readers who see colours differently."""
    kind = shape % 6 if isinstance(shape, int) else 0
    style = f'style="fill:{colour}"'
    if kind == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size}" {style}/>'
    if kind == 1:
        return (
            f'<rect x="{x - size:.1f}" y="{y - size:.1f}" width="{2 * size}" '
            f'height="{2 * size}" {style}/>'
        )
    s = size * 1.35
    outline = {
        2: ((0, -s), (s, 0), (0, s), (-s, 0)),
        3: ((0, -s), (s, s * 0.8), (-s, s * 0.8)),
        4: ((0, s), (s, -s * 0.8), (-s, -s * 0.8)),
        5: ((-s, -s * 0.5), (s, -s * 0.5), (s, s * 0.5), (-s, s * 0.5)),
    }[kind]
    points = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in outline)
    return f'<polygon points="{points}" {style}/>'


def _lines(chart: Chart, width: int) -> tuple[str, float, dict[str, Any]]:
    legend, top = _legend(chart, width)
    title_y, top = top + 10, top + 18
    all_x = [v for line in chart.lines for v in line.x]
    all_x += [mark.value for mark in chart.marks if mark.axis == "x"]
    all_y = [
        v
        for line in chart.lines
        for part in (line.y, line.low, line.high)
        if part is not None
        for v in part
    ]
    all_y += [*chart.include_y, *(mark.value for mark in chart.marks if mark.axis == "y")]
    x_low, x_high = _extent(all_x, 0.03)
    if chart.x_names is not None:
        x_low, x_high = -0.5, max(0.5, len(chart.x_names) - 0.5)
    y_low, y_high = _extent(all_y, 0.06)
    plot_height = min(340.0, max(210.0, width * 0.5))
    bottom = top + plot_height
    y_axis = Scale(y_low, y_high, bottom, top + 6)
    y_ticks = y_axis.ticks(5)
    y_step = y_ticks[1] - y_ticks[0] if len(y_ticks) > 1 else None
    y_labels = [short(tick, y_step) for tick in y_ticks]
    left = 10 + max((len(words) for words in y_labels), default=3) * CHAR_WIDTH
    reference = 0.0
    if chart.log_x:
        positive = [v for v in all_x if v > 0]
        reference = min(positive) if positive else 1.0
        x_low, x_high = max(0.0, min(all_x, default=0.0)), max(all_x, default=1.0)
    x_axis = Scale(x_low, x_high, left + 6 * (reference > 0), width - 12, reference)
    parts = [legend]
    for tick, words in zip(y_ticks, y_labels, strict=True):
        y = y_axis.pixel(tick)
        parts.append(
            f'<line class="grid" x1="{left:.1f}" x2="{width - 6}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(text(left - 6, y + 4, words, anchor="end", cls="tick"))
    turned = _x_ticks(parts, chart, x_axis, bottom, width)
    parts.append(
        f'<line class="axis" x1="{left:.1f}" x2="{width - 6}" y1="{bottom:.1f}" y2="{bottom:.1f}"/>'
    )
    for mark in chart.marks:
        parts.append(_mark(mark, x_axis, y_axis, left, width, top, bottom))
    dodge = _dodge(chart)
    for line, shift in zip(chart.lines, dodge, strict=True):
        parts.append(_line(line, x_axis, y_axis, shift))
    height = bottom + 44 + turned
    parts.append(text((left + width) / 2, height - 6, chart.x_title, anchor="middle", cls="title"))
    parts.append(text(4, title_y, chart.y_title, cls="title"))
    scale = {
        "x": [x_axis.low, x_axis.high, round(x_axis.start, 1), x_axis.end, reference],
        "y": [y_low, y_high, round(bottom, 1), round(top + 6, 1), 0],
        "dodge": dodge,
    }
    return "".join(parts), height, scale


def _x_ticks(parts: list[str], chart: Chart, axis: Scale, bottom: float, width: int) -> float:
    """Ticks below the plot; returns the extra height that turned names need."""
    if chart.x_names is None:
        marks = axis.ticks(max(3, width // 75))
        step = marks[1] - marks[0] if len(marks) > 1 and not chart.log_x else None
        last = -1e9
        for tick in marks:
            x, words = axis.pixel(tick), short(tick, step)
            half = len(words) * CHAR_WIDTH / 2 + 3
            parts.append(f'<path class="axis" d="M{x:.1f} {bottom:.1f}v4"/>')
            if x - half > last:
                parts.append(text(x, bottom + 17, words, anchor="middle", cls="tick"))
                last = x + half
        return 0.0
    longest = max((len(name) for name in chart.x_names), default=0)
    room = (axis.end - axis.start) / max(1, len(chart.x_names))
    turn = longest * CHAR_WIDTH > room - 6
    every = max(1, math.ceil(14 / room))
    for place, name in enumerate(chart.x_names):
        if place % every:
            continue
        x = axis.pixel(place)
        if turn:
            shown = name if len(name) <= 24 else name[:23] + "…"
            parts.append(text(x + 3, bottom + 14, shown, anchor="end", cls="tick", turn=-40))
        else:
            parts.append(text(x, bottom + 17, name, anchor="middle", cls="tick"))
    return min(24, longest) * CHAR_WIDTH * 0.66 if turn else 0.0


def _mark(
    mark: Mark, x_axis: Scale, y_axis: Scale, left: float, width: float, top: float, bottom: float
) -> str:
    if mark.axis == "x":
        x = x_axis.pixel(mark.value)
        line = f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{bottom:.1f}"/>'
        triangle = _marker(x, bottom - 4, 3, "var(--muted)", 3.6)
        return line + (triangle if not mark.text else text(x + 4, top + 12, mark.text, cls="hint"))
    y = y_axis.pixel(mark.value)
    line = f'<line class="mark" x1="{left:.1f}" x2="{width - 6}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return line + (text(left + 4, y - 4, mark.text, cls="hint") if mark.text else "")


def _dodge(chart: Chart) -> list[float]:
    """Pixels by which each line is moved aside, so that error bars at the same x do not hide."""
    barred = [line for line in chart.lines if line.low is not None and not line.band]
    if len(barred) < 2 or chart.x_names is not None:
        return [0.0] * len(chart.lines)
    places = iter(range(len(barred)))
    return [
        (next(places) - (len(barred) - 1) / 2) * 5.0 if line.low is not None else 0.0
        for line in chart.lines
    ]


def _line(line: Line, x_axis: Scale, y_axis: Scale, shift: float) -> str:
    colour = _colour(line.colour)
    parts: list[str] = []
    if line.low is not None and line.high is not None:
        parts.append(_errors(line, x_axis, y_axis, colour, shift))
    dots: list[tuple[float, float]] = []
    path: list[str] = []
    pen = "M"
    for x, y in zip(line.x, line.y, strict=True):
        if not (math.isfinite(x) and math.isfinite(y)):
            pen = "M"
            continue
        at = (x_axis.pixel(x) + shift, y_axis.pixel(y))
        dots.append(at)
        path.append(f"{pen}{at[0]:.1f} {at[1]:.1f}")
        pen = "L"
    if line.kind == "line" and path:
        parts.append(
            f'<path class="line" d="{"".join(path)}" style="stroke:{colour}" '
            f'stroke-dasharray="{_DASHES[line.dash % 4]}"/>'
        )
    if line.kind == "dots":
        parts += [_marker(x, y, 0, colour, 2.6) for x, y in dots]
        return f'<g class="series faint">{"".join(parts)}</g>'
    if line.kind == "points" or (len(dots) <= _MAX_MARKERS and isinstance(line.colour, int)):
        size = 4.6 if line.kind == "points" else 3.0
        parts += [_marker(x, y, line.colour, colour, size) for x, y in dots]
    return f'<g class="series">{"".join(parts)}</g>'


def _errors(line: Line, x_axis: Scale, y_axis: Scale, colour: str, shift: float) -> str:
    assert line.low is not None
    assert line.high is not None
    ends = [
        (x_axis.pixel(x) + shift, y_axis.pixel(low), y_axis.pixel(high))
        for x, low, high in zip(line.x, line.low, line.high, strict=True)
        if math.isfinite(x) and math.isfinite(low) and math.isfinite(high)
    ]
    if not ends:
        return ""
    if line.band and line.kind == "line":
        there = "L".join(f"{x:.1f} {high:.1f}" for x, _, high in ends)
        back = "L".join(f"{x:.1f} {low:.1f}" for x, low, _ in reversed(ends))
        return f'<path class="band" d="M{there}L{back}Z" style="fill:{colour}"/>'
    bars = "".join(
        f"M{x:.1f} {low:.1f}V{high:.1f}M{x - 4:.1f} {low:.1f}h8M{x - 4:.1f} {high:.1f}h8"
        for x, low, high in ends
    )
    return f'<path class="bar" d="{bars}" style="stroke:{colour}"/>'
