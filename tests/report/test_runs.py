"""Aggregation over seeds, the Pareto front, correlations: against direct calculation."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from ke_ray.report import runs
from ke_ray.report.correlation import correlate, critical_r
from ke_ray.report.sources import Result, find_results


def test_one_run_keeps_its_own_interval_and_several_get_students() -> None:
    frame = pd.DataFrame(
        {
            "x": [1.0, 2.0, 2.0, 2.0],
            "acquisition": [0.3, 0.1, 0.2, 0.6],
            "acquisition_low": [0.25, 0.0, 0.0, 0.0],
            "acquisition_high": [0.4, 1.0, 1.0, 1.0],
        }
    )
    found = runs.aggregate(frame, ["x"], "acquisition")
    assert found.loc[0, ["value", "low", "high", "count"]].tolist() == [30, 25, 40, 1]  # in %
    ends = stats.t.interval(0.95, 2, loc=30, scale=stats.sem([10, 20, 60]))
    assert found.loc[1, ["low", "high"]].tolist() == pytest.approx(list(ends))


def test_a_column_nobody_measured_gives_no_rows() -> None:
    frame = pd.DataFrame({"x": [1.0], "acquisition": [np.nan]})
    assert runs.aggregate(frame, ["x"], "acquisition").empty
    assert runs.aggregate(frame, ["x"], "absent").empty


def test_variants_are_named_apart() -> None:
    rows = [
        {"resuscitation_ratio": r, "amplifying_factor": q, "control": c}
        for r, q, c in itertools.product((0.5, None), (2.0, None), ("random", None, "none"))
    ]
    names = [runs.variant(row) for row in rows]
    assert names[0] == "p=0.5 q=2 random"
    assert names[1] == names[2] == "p=0.5 q=2"
    assert names[-1] == "original"
    nan = {"resuscitation_ratio": math.nan, "amplifying_factor": math.nan, "control": math.nan}
    assert runs.variant(nan) == "original"


def test_swept_parameters_leave_out_what_never_changes(demo_folder: Path) -> None:
    sweep = next(result for result in find_results([demo_folder]) if result.kind == "sweep")
    names = runs.swept_parameters(sweep)
    assert names == ["resuscitate.ratio", "resuscitate.factor", "control", "seed"]


def test_fishers_interval_needs_four_points() -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=30)
    y = x + rng.normal(size=30)
    found = correlate(x, y)
    reference = stats.pearsonr(x, y)
    interval = reference.confidence_interval(0.95)
    assert found.r == pytest.approx(reference.statistic)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), abs=1e-6)
    three = correlate(x[:3], y[:3])
    assert math.isnan(three.low)
    assert "too few points for an interval" in str(three)


def test_no_spread_means_no_correlation() -> None:
    assert math.isnan(correlate(np.ones(5), np.arange(5.0)).r)
    assert "undefined" in str(correlate(np.array([]), np.array([])))


def test_the_critical_r_is_that_of_the_t_test() -> None:
    n = 7
    r = critical_r(n)
    t = r * math.sqrt((n - 2) / (1 - r * r))
    assert 2 * stats.t.sf(t, n - 2) == pytest.approx(0.05)


def test_starts_of_several_stages_are_placed_by_their_tokens() -> None:
    rows = [
        ("stage2-step10", 10, 2, 9_000),
        ("stage1-step10", 10, 1, 4_000),
        ("stage1-step20", 20, 1, 8_000),
    ]
    names = ["checkpoint", "step", "stage", "tokens"]
    frame = pd.DataFrame(rows, columns=names).assign(status="ok", seed=0, stage_label=None)
    study = Result("runs/x", "continual", "x", {}, {"runs": frame})
    good = runs.good_runs(study)
    assert good["x"].tolist() == [4_000, 8_000, 9_000]
    assert set(good["unit"]) == {"tokens"}
    bare = Result("runs/x", "continual", "x", {}, {"runs": frame.drop(columns="tokens")})
    assert runs.good_runs(bare)["x"].tolist() == [10, 20, 30]
