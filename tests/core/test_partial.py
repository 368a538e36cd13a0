"""Partial correlation and Holm's adjustment: against their equations and limits."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ke_ray.core.partial import fixed_columns, holm, partial_correlation


def numbers(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    z, x, y = np.random.default_rng(seed).normal(size=(3, n))
    return x + 2 * z, y - z + 0.5 * x, z


def one_series(n: int) -> np.ndarray:
    return np.zeros(n)


def test_one_thing_held_fixed_is_the_textbook_formula():
    x, y, z = numbers(30)
    (xy, xz, yz) = (np.corrcoef(*pair)[0, 1] for pair in ((x, y), (x, z), (y, z)))
    expected = (xy - xz * yz) / math.sqrt((1 - xz**2) * (1 - yz**2))
    r = partial_correlation(x, y, fixed_columns(one_series(30), 1e9 * z))
    assert r == pytest.approx(expected)


def test_nothing_held_fixed_is_pearson():
    x, y, _ = numbers(20)
    r = partial_correlation(x, y, fixed_columns(one_series(20)))
    assert r == pytest.approx(np.corrcoef(x, y)[0, 1])


def test_two_things_held_fixed_are_two_regressions():
    x, y, z = numbers(25)
    w = np.random.default_rng(3).normal(size=25) + z
    others = np.column_stack([np.ones(25), z, w])
    rest = [v - others @ np.linalg.solve(others.T @ others, others.T @ v) for v in (x, y)]
    r = partial_correlation(x, y, fixed_columns(one_series(25), z, w))
    assert r == pytest.approx(np.corrcoef(*rest)[0, 1])


def test_a_series_has_its_own_intercept():
    x, y, _ = numbers(20)
    series = np.repeat(["a", "b"], 10)
    jump = np.where(series == "b", 1000.0, 0.0)
    fixed = fixed_columns(series)
    assert partial_correlation(x + jump, y - jump, fixed) == pytest.approx(
        partial_correlation(x, y, fixed)
    )
    centred = [v - np.repeat([v[:10].mean(), v[10:].mean()], 10) for v in (x, y)]
    assert partial_correlation(x, y, fixed) == pytest.approx(np.corrcoef(*centred)[0, 1])


def test_what_is_held_fixed_has_no_correlation_left():
    x, y, _ = numbers(20)
    assert np.isnan(partial_correlation(x, y, fixed_columns(one_series(20), 3 * x + 1)))
    assert np.isnan(partial_correlation(np.ones(20), y, fixed_columns(one_series(20))))


def test_draws_are_computed_together():
    x, y, z = numbers(12)
    fixed = fixed_columns(one_series(12), z)
    drawn = np.random.default_rng(1).integers(0, 12, (5, 12))
    together = partial_correlation(x[drawn], y[drawn], fixed[drawn])
    alone = [float(partial_correlation(x[i], y[i], fixed[i])) for i in drawn]
    assert together == pytest.approx(alone)


def test_holm_is_the_step_down_of_the_paper_and_leaves_unknown_ones_out():
    adjusted = holm(np.array([0.01, np.nan, 0.04, 0.03, 0.005]))
    # 4·0.005, 3·0.01, 2·0.03, max(1·0.04, 0.06), in ascending order.
    assert adjusted == pytest.approx([0.03, np.nan, 0.06, 0.06, 0.02], nan_ok=True)
    assert holm(np.array([0.9, 0.8])) == pytest.approx([1.0, 1.0])
    assert len(holm(np.array([]))) == 0
