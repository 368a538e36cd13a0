"""From values to pixels: axis ranges, ticks, number formats and colour ramps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Scale", "diverging", "number", "ordered", "sequential", "short", "ticks"]


@dataclass(frozen=True)
class Scale:
    """``pixel(value)`` for values in [low, high] onto [start, end] pixels.

    ``reference`` > 0 makes it logarithmic with zero allowed: log(1 + value / reference).
    """

    low: float
    high: float
    start: float
    end: float
    reference: float = 0.0

    def pixel(self, value: float) -> float:
        low, high, at = self._t(self.low), self._t(self.high), self._t(value)
        share = (at - low) / (high - low) if high > low else 0.5
        return self.start + share * (self.end - self.start)

    def _t(self, value: float) -> float:
        return math.log1p(value / self.reference) if self.reference > 0 else value

    def ticks(self, count: int) -> list[float]:
        """Round values inside the range, about ``count`` of them."""
        if self.reference <= 0:
            return ticks(self.low, self.high, count)
        first = math.floor(math.log10(self.reference))
        last = math.ceil(math.log10(max(self.high, self.reference)))
        marks = [0.0] if self.low <= 0 else []
        marks += [
            10.0**power * digit
            for power in range(first, last + 1)
            for digit in ((1, 3) if last - first < 3 else (1,))
        ]
        inside = [mark for mark in marks if self.low <= mark <= self.high]
        return inside[:: max(1, math.ceil(len(inside) / max(2, count)))]


def ticks(low: float, high: float, count: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten within [low, high]."""
    if not (math.isfinite(low) and math.isfinite(high)) or high <= low:
        return [low] if math.isfinite(low) else []
    raw = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1.0, 2.0, 5.0, 10.0) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def short(value: float, step: float | None = None) -> str:
    """A tick label: 738k, 1.2M, 0.05, as few digits as tell neighbours ``step`` apart."""
    if value == 0:
        return "0"
    size = abs(value)
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            unit = 1e3 if letter == "k" else limit
            text = f"{value / unit:.{_decimals(step / unit if step else None, value / unit)}f}"
            return (text.rstrip("0").rstrip(".") if "." in text else text) + letter
    if size < 1e-4:
        return f"{value:.0e}"
    text = f"{value:.{_decimals(step, value)}f}"
    return text.replace("-", "−")


def _decimals(step: float | None, value: float) -> int:
    if step is None:
        return max(0, min(6, 2 - math.floor(math.log10(abs(value)))))
    return max(0, min(8, -math.floor(math.log10(step) + 1e-9)))


def number(value: float | None) -> str:
    """A value for reading, six significant digits; '–' where unknown."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == int(value) and abs(value) < 1e12:
        return f"{int(value):,}".replace("-", "−")
    return f"{value:.6g}".replace("-", "−")


# Anchors of ramps that colour-blind readers can follow (they run from blue to yellow or vermilion).
_ORDERED = ("#3b6fc0", "#6a7f9c", "#8a8780", "#a5864f", "#bd8420")
_SEQUENTIAL = ("#2c4a7c", "#4a5f85", "#65738a", "#82888a", "#a09d80", "#bfb16f", "#ddc456")
_DIVERGING = ("#0a4f8a", "#4a86b8", "#a3c4dd", "#f2f0ec", "#f0b48a", "#d9733a", "#a53f05")


def ordered(share: float) -> str:
    """Blue over grey to ochre for 0…1: every step stands out on white and on near-black."""
    return _ramp(_ORDERED, share)


def sequential(share: float) -> str:
    """Blue to yellow for 0…1."""
    return _ramp(_SEQUENTIAL, share)


def diverging(share: float) -> str:
    """Blue (0) over pale (0.5) to vermilion (1)."""
    return _ramp(_DIVERGING, share)


def _ramp(anchors: Sequence[str], share: float) -> str:
    place = min(max(share, 0.0), 1.0) * (len(anchors) - 1)
    index = min(int(place), len(anchors) - 2)
    mix = place - index
    pair = [[int(text[i : i + 2], 16) for i in (1, 3, 5)] for text in anchors[index : index + 2]]
    return "#" + "".join(f"{round(a + (b - a) * mix):02x}" for a, b in zip(*pair, strict=True))
