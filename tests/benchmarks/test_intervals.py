"""The intervals of the report hold the truth about as often as they say, at the sizes in use.

Each of the cases fails with the method that was there before: percentiles of a bootstrap (A,
effectivity, F without pseudo-items), ±1.96 errors (jackknife, accuracy).
"""

from __future__ import annotations

import intervals
import pytest


@pytest.mark.parametrize(
    ("case", "before"),
    [
        (intervals.acquisition(4, 3), 0.79),
        (intervals.forgetting((160,), (0.55,), 0.01, 0.005), 0.59),
        (intervals.effectivity(3), 0.74),
        (intervals.task(50, 0.97), 0.78),
        (intervals.jackknife(4), 0.86),
        (intervals.seeds(3, skewed=False), 0.81),
        (intervals.correlation(4, 0.95), None),
    ],
    ids=["A", "F", "effectivity", "accuracy", "jackknife", "seeds", "r"],
)
def test_a_95_percent_interval_holds_the_truth_about_so_often(
    case: intervals.Case, before: float | None
) -> None:
    held, _, _ = intervals.coverage(case, num_sets=400, seed=11)
    assert held > 0.91
    assert before is None or held > before + 0.03
