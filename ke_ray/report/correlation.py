"""Correlation of knowledge entropy with acquisition and forgetting, with honest intervals.

Pearson's r over starting points. Its 95 % interval is Fisher's, tanh(atanh r ± 1.96 / √(n − 3)),
which needs n ≥ 4; with three points there is none, and a straight line through three points is
common by chance (|r| must reach 0.997 to be significant at 5 %). It is about r of values as they
are measured, whose errors make r smaller (docs/science.md#coverage).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import special  # scipy.stats takes half a second to import

from ke_ray.core.intervals import fisher_interval


@dataclass(frozen=True)
class Correlation:
    """r over n points; unknown ends are NaN."""

    r: float
    n: int
    low: float
    high: float

    def __str__(self) -> str:
        if not math.isfinite(self.r):
            return f"r undefined (n = {self.n})"
        text = f"r = {self.r:+.2f} (n = {self.n}"
        if math.isfinite(self.low):
            text += f"; 95 % interval {self.low:+.2f} to {self.high:+.2f}"
        else:
            text += "; too few points for an interval"
            if self.n >= 3:
                text += f", |r| must reach {critical_r(self.n):.3f} to be significant at 5 %"
        return text.replace("-", "−") + ")"


def correlate(x: np.ndarray, y: np.ndarray) -> Correlation:
    """Pearson's r of float arrays [n], pairs with an unknown value left out."""
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    keep = np.isfinite(x) & np.isfinite(y)
    x, y = x[keep], y[keep]
    n = len(x)
    r = _pearson(x, y) if n >= 2 else math.nan
    return Correlation(r, n, *fisher_interval(r, n - 2))


def _pearson(x: np.ndarray, y: np.ndarray) -> float:
    """r of x [n] with y [n]; NaN where either has no spread."""
    dx, dy = x - x.mean(), y - y.mean()
    below = math.sqrt(float((dx**2).sum() * (dy**2).sum()))
    return float(np.clip((dx * dy).sum() / below, -1, 1)) if below > 0 else math.nan


def p_value(r: float, n: int) -> float:
    """Two-sided p-value of Pearson's r over n ≥ 3 points, by the t test with n − 2 degrees."""
    return float(2 * special.stdtr(n - 2, -abs(r) * math.sqrt((n - 2) / (1 - r * r))))


def critical_r(n: int) -> float:
    """Smallest |r| of n points that a two-sided 5 % test calls significant (n ≥ 3)."""
    t = float(special.stdtrit(n - 2, 0.975))
    return t / math.sqrt(n - 2 + t * t)
