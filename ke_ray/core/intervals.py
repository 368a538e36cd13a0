"""Intervals with a formula: Student's and Hall's of a mean, Wilson's of a share, Fisher's of r.

Numpy and scipy only.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt


def student_quantile(degrees: float, level: float = 0.95) -> float:
    """How many standard errors on either side hold the truth with probability ``level``."""
    from scipy import special  # spares commands that need no interval the import

    return float(special.stdtrit(degrees, (1.0 + level) / 2.0))


def student_interval(values: npt.ArrayLike, level: float = 0.95) -> tuple[float, float] | None:
    """The interval of the mean of two or more independent values, else None.

    It holds the mean of a normal population with probability ``level``, however few the values.
    """
    sample = np.asarray(values, dtype=np.float64)
    if sample.size < 2:
        return None
    error = float(sample.std(ddof=1)) / math.sqrt(sample.size)
    half = student_quantile(sample.size - 1, level) * error
    return float(sample.mean()) - half, float(sample.mean()) + half


def hall_interval(values: npt.ArrayLike, level: float = 0.95) -> tuple[float, float] | None:
    """The interval of the mean of values whose population is skewed; None for fewer than two.

    With T = (x̄ − μ)/s and the sample skewness γ, Hall (1992, J. R. Stat. Soc. B 54, 221–228) makes

        g(T) = T + γT²/3 + γ²T³/27 + γ/(6n)

    nearly as symmetric as T is for a normal population, and inverts it at ∓ Student's t / √n.
    Student's interval lies too low where the tail is above. Below four values γ says nothing yet,
    and the interval is Student's.
    """
    sample = np.asarray(values, dtype=np.float64)
    spread = float(sample.std(ddof=1)) if sample.size > 1 else 0.0
    if sample.size < 4 or spread == 0.0:
        return student_interval(sample, level)
    n, mean = sample.size, float(sample.mean())
    skewness = float(((sample - mean) ** 3).sum()) * n / ((n - 1) * (n - 2) * spread**3)
    if abs(skewness) < 1e-6:  # the limit; a third of it divides below
        return student_interval(sample, level)
    half = student_quantile(n - 1, level) / math.sqrt(n)

    def inverse(x: float) -> float:
        return float(np.cbrt(1 + skewness * (x - skewness / (6 * n))) - 1) * 3 / skewness

    return mean - spread * inverse(half), mean - spread * inverse(-half)


def fisher_interval(r: float, degrees: int) -> tuple[float, float]:
    """The ends of Fisher's 95 % interval of a correlation: tanh(atanh r ± 1.96/√(d − 1)).

    Args:
        r: Pearson's, plain or partial.
        degrees: d: points less 2, and less 1 for everything that is held fixed.

    Returns:
        NaN twice where d < 2 or r is ±1.
    """
    if degrees < 2 or not abs(r) < 1:
        return math.nan, math.nan
    half = 1.959964 / math.sqrt(degrees - 1)
    return math.tanh(math.atanh(r) - half), math.tanh(math.atanh(r) + half)


def wilson_interval(
    share: npt.ArrayLike, count: npt.ArrayLike
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The ends of Wilson's 95 % interval of a share of ``count`` items that are right or wrong.

    Unlike share ± 1.96 standard errors it holds near 0 and 1, and its ends lie within them.

    Args:
        share: [...] in [0, 1].
        count: [...] number of items, at least 1.
    """
    p, n = np.asarray(share, dtype=np.float64), np.asarray(count, dtype=np.float64)
    z = 1.959964
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return centre - half, centre + half
