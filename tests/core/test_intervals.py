"""Hall's interval of a mean: the equation inverted, and what it is for, skewed values."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from ke_ray.core.intervals import hall_interval, student_interval

VALUES = np.array([0.1, 0.2, 0.25, 0.5, 0.9, 2.1])


def test_the_ends_are_where_halls_transformation_is_students_quantile() -> None:
    ends = hall_interval(VALUES)
    assert ends is not None
    n, mean, spread = VALUES.size, VALUES.mean(), VALUES.std(ddof=1)
    # scipy's unbiased third moment over the unbiased variance to the 3/2
    skewness = stats.kstat(VALUES, 3) / spread**3
    half = stats.t.ppf(0.975, n - 1) / math.sqrt(n)
    for end, quantile in zip(ends, (half, -half), strict=True):
        t = (mean - end) / spread
        transformed = t + skewness * t**2 / 3 + skewness**2 * t**3 / 27 + skewness / (6 * n)
        assert transformed == pytest.approx(quantile, rel=1e-9)


def test_the_interval_reaches_further_on_the_side_of_the_tail_and_turns_with_the_sign() -> None:
    low, high = hall_interval(VALUES) or (0.0, 0.0)
    assert high - VALUES.mean() > 1.5 * (VALUES.mean() - low)
    assert hall_interval(-VALUES) == pytest.approx((-high, -low), rel=1e-12)


@pytest.mark.parametrize("values", [[1.0, 2.0, 6.0], [1.0, 2.0], [-2.0, -1.0, 1.0, 2.0], [3.0] * 5])
def test_few_or_symmetric_values_have_students_interval(values: list[float]) -> None:
    assert hall_interval(values) == pytest.approx(student_interval(values), rel=1e-9)


def test_one_value_has_no_interval() -> None:
    assert hall_interval([1.0]) is None


def test_six_skewed_values_are_held_about_as_often_as_said_unlike_by_students() -> None:
    generator = np.random.Generator(np.random.PCG64(3))
    sets = generator.gamma(1.5, 0.4, (3000, 6))  # gains of the paper's six once paragraphs

    def held(interval) -> float:
        ends = np.array([interval(values) for values in sets])
        return float(((ends[:, 0] <= 0.6) & (ends[:, 1] >= 0.6)).mean())

    assert held(hall_interval) > 0.92 > held(student_interval)
