"""Heat maps as SVG: the cells are one small image, so that thousands cost a few kilobytes."""

from __future__ import annotations

import base64
import html
import math
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from ke_ray.report.charts import HeatMap
from ke_ray.report.scales import diverging, number, sequential

__all__ = ["CHAR_WIDTH", "draw_heat_map", "text"]

CHAR_WIDTH = 6.3  # average width in px of a character at the figures' 11 px


def text(
    x: float, y: float, words: str, *, anchor: str = "start", cls: str = "", turn: int = 0
) -> str:
    """A ``<text>`` element; ``turn`` in degrees about its own anchor."""
    around = f' transform="rotate({turn} {x:.1f} {y:.1f})"' if turn else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{cls}"{around}>'
        f"{html.escape(words)}</text>"
    )


def draw_heat_map(chart: HeatMap, width: int) -> tuple[str, float, dict[str, Any]]:
    """(SVG elements, height in px, where the cells lie: left, right, top, bottom)."""
    rows, columns = chart.values.shape
    finite = chart.values[np.isfinite(chart.values)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    if chart.centre is not None:
        reach = max(high - chart.centre, chart.centre - low) or 1.0
        low, high = chart.centre - reach, chart.centre + reach
    left = 10 + max((len(name) for name in chart.y_names), default=1) * CHAR_WIDTH
    right = width - 12
    top = 46.0
    cell = (right - left) / max(1, columns)
    tall = (
        min(340.0, max(26.0 * min(rows, 8), 9.0 * rows)) if not chart.write_values else 42.0 * rows
    )
    bottom = top + tall
    span = (high - low) or 1.0
    ramp = diverging if chart.centre is not None else sequential
    shares = (chart.values - low) / span
    image = _png([[ramp(s) if math.isfinite(s) else None for s in row] for row in shares[::-1]])
    parts = [
        f'<image class="cells" x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" '
        f'height="{tall:.1f}" preserveAspectRatio="none" style="image-rendering:pixelated" '
        f'href="{image}"/>'
    ]
    parts += _heat_key(chart, low, high, ramp)
    pitch = tall / max(1, rows)
    every = max(1, math.ceil(13 / pitch))
    for place, name in enumerate(chart.y_names):
        if place % every == 0:
            y = bottom - (place + 0.5) * pitch
            parts.append(text(left - 6, y + 4, name, anchor="end", cls="tick"))
    longest = max((len(name) for name in chart.x_names), default=1)
    every = max(1, math.ceil((longest * CHAR_WIDTH + 8) / cell))
    for place, name in enumerate(chart.x_names):
        if place % every == 0:
            x = left + (place + 0.5) * cell
            parts.append(text(x, bottom + 16, name, anchor="middle", cls="tick"))
    if chart.write_values:
        for row in range(rows):
            for column in range(columns):
                value, share = chart.values[row, column], shares[row, column]
                if math.isfinite(value):
                    x, y = left + (column + 0.5) * cell, bottom - (row + 0.5) * pitch
                    dark = share < 0.2 or share > 0.82 if chart.centre is not None else share < 0.45
                    cls = "on-dark" if dark else "on-light"
                    parts.append(text(x, y + 4, f"{value:.3g}", anchor="middle", cls=cls))
    height = bottom + 42
    parts.append(text((left + right) / 2, height - 6, chart.x_title, anchor="middle", cls="title"))
    parts.append(text(4, 38, chart.y_title, cls="title"))
    scale = {"cells": [round(left, 1), round(right, 1), round(top, 1), round(bottom, 1)]}
    return "".join(parts), height, scale


def _heat_key(chart: HeatMap, low: float, high: float, ramp: Callable[[float], str]) -> list[str]:
    first, last = number(float(f"{low:.4g}")), number(float(f"{high:.4g}"))
    x = 4 + len(first) * CHAR_WIDTH + 6
    parts = [text(4, 14, first, cls="key")]
    parts += [
        f'<rect x="{x + 6 * i:.0f}" y="4" width="6" height="12" fill="{ramp(i / 15)}"/>'
        for i in range(16)
    ]
    parts.append(text(x + 102, 14, f"{last} {chart.unit}".strip(), cls="key"))
    return parts


def _png(colours: list[list[str | None]]) -> str:
    """One pixel a cell, as a data URI; unknown cells are transparent."""
    rows = bytearray()
    for row in colours:
        rows.append(0)
        for colour in row:
            rows += bytes.fromhex(colour[1:]) + b"\xff" if colour else b"\x00\x00\x00\x00"
    size = struct.pack(">IIBBBBB", len(colours[0]) if colours else 0, len(colours), 8, 6, 0, 0, 0)

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size)
    data += chunk(b"IDAT", zlib.compress(bytes(rows), 9)) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(data).decode()
