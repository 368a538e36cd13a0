"""Partial correlation: what two quantities have in common beyond what is held fixed.

    r = Pearson's r of x − Z·Z⁺x and y − Z·Z⁺y

Z has a column for each quantity that is held fixed, and a constant, or a constant per series: with
these, every series has an intercept of its own (its values are centred), and differences between
series count for nothing. Of ranks in place of values it is the partial rank correlation.
"""

from __future__ import annotations

import numpy as np

_LEAST = 1e-9  # of the spread before: a smaller rest is rounding


def fixed_columns(series: np.ndarray, *others: np.ndarray) -> np.ndarray:
    """Z [n, num_series + len(others)]: an intercept per label of ``series`` [n], then ``others``.

    The others are scaled, which changes no result and keeps rounding small.
    """
    labels = np.unique(series)
    scaled = [(other - other.mean()) / (np.std(other) or 1.0) for other in others]
    return np.column_stack([*((series == label).astype(float) for label in labels), *scaled])


def partial_correlation(x: np.ndarray, y: np.ndarray, fixed: np.ndarray) -> np.ndarray:
    """r of x [..., n] with y [..., n], holding ``fixed`` Z [..., n, k]; float64 [...].

    NaN where nothing of x or of y is left, as when x is itself held fixed.
    """
    inverse = np.linalg.pinv(fixed)
    one, other = _rest(x, fixed, inverse), _rest(y, fixed, inverse)
    spread = np.sqrt((one**2).sum(axis=-1) * (other**2).sum(axis=-1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.clip((one * other).sum(axis=-1) / spread, -1.0, 1.0)


def _rest(values: np.ndarray, fixed: np.ndarray, inverse: np.ndarray) -> np.ndarray:
    rest = values - (fixed @ (inverse @ values[..., None]))[..., 0]
    before = values - values.mean(axis=-1, keepdims=True)
    is_rounding = (rest**2).sum(axis=-1) <= _LEAST**2 * (before**2).sum(axis=-1)
    return np.where(is_rounding[..., None], np.nan, rest)


def holm(p_values: np.ndarray) -> np.ndarray:
    """p-values adjusted for their number (Holm 1979), which bounds the chance of any false one.

    Unknown ones (NaN) stay so and are not counted.
    """
    adjusted = np.full(len(p_values), np.nan)
    known = np.flatnonzero(np.isfinite(p_values))
    order = known[np.argsort(p_values[known], kind="stable")]
    steps = p_values[order] * (len(order) - np.arange(len(order)))
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0) if len(order) else steps
    return adjusted
