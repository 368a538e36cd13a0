"""Correlation of knowledge entropy with acquisition and forgetting, with honest intervals.

Pearson's r over starting points. Its 95 % interval is Fisher's, tanh(atanh r ± 1.96 / √(n − 3)),
which needs n ≥ 4; with three points there is none, and a straight line through three points is
common by chance (|r| must reach 0.997 to be significant at 5 %). Beside it, what the error
of y alone does to r: values redrawn within their intervals, 2.5 % and 97.5 % quantiles of r
(seeded); the error of x is left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import special  # scipy.stats takes half a second to import


@dataclass(frozen=True)
class Correlation:
    """r over n points; unknown ends are NaN."""

    r: float
    n: int
    low: float
    high: float
    redrawn_low: float
    redrawn_high: float

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
        if math.isfinite(self.redrawn_low):
            text += (
                f"; {self.redrawn_low:+.2f} to {self.redrawn_high:+.2f} with y redrawn within its "
                "error"
            )
        return text.replace("-", "−") + ")"


def correlate(
    x: np.ndarray,
    y: np.ndarray,
    y_low: np.ndarray | None = None,
    y_high: np.ndarray | None = None,
    *,
    draws: int = 2000,
    seed: int = 0,
) -> Correlation:
    """Pearson's r of float arrays [n], pairs with an unknown value left out.

    ``y_low`` and ``y_high`` are the ends of 95 % intervals of ``y``, taken as normal for redrawing.
    """
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    keep = np.isfinite(x) & np.isfinite(y)
    x, y = x[keep], y[keep]
    n = len(x)
    r = _pearson(x, y[None, :])[0] if n >= 2 else math.nan
    low = high = redrawn_low = redrawn_high = math.nan
    if n >= 4 and abs(r) < 1:
        half = 1.959964 / math.sqrt(n - 3)
        low, high = math.tanh(math.atanh(r) - half), math.tanh(math.atanh(r) + half)
    if n >= 3 and y_low is not None and y_high is not None:
        sigma = (np.asarray(y_high, dtype=float) - np.asarray(y_low, dtype=float))[keep] / 3.919928
        if np.isfinite(sigma).all():
            drawn = y + np.random.default_rng(seed).normal(size=(draws, n)) * sigma
            spread = _pearson(x, drawn)
            redrawn_low, redrawn_high = (float(v) for v in np.nanquantile(spread, (0.025, 0.975)))
    return Correlation(float(r), n, low, high, redrawn_low, redrawn_high)


def _pearson(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """r of x [n] with each row of y [k, n]; NaN where either has no spread."""
    dx, dy = x - x.mean(), y - y.mean(axis=1, keepdims=True)
    below = np.sqrt((dx**2).sum() * (dy**2).sum(axis=1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.clip(np.where(below > 0, (dx * dy).sum(axis=1) / below, np.nan), -1, 1)


def p_value(r: float, n: int) -> float:
    """Two-sided p-value of Pearson's r over n ≥ 3 points, by the t test with n − 2 degrees."""
    return float(2 * special.stdtr(n - 2, -abs(r) * math.sqrt((n - 2) / (1 - r * r))))


def critical_r(n: int) -> float:
    """Smallest |r| of n points that a two-sided 5 % test calls significant (n ≥ 3)."""
    t = float(special.stdtrit(n - 2, 0.975))
    return t / math.sqrt(n - 2 + t * t)
