"""The stopping rule of a scan with a wanted precision."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from ke_ray.core.jackknife import group_sizes, paired_difference
from ke_ray.core.stopping import CurvePrecision, curve_precision, next_round, round_strides


@pytest.mark.parametrize("most", [1, 63, 64, 127, 128, 2047, 2048, 4096])
def test_rounds_end_with_all_instances_and_hold_those_of_the_rounds_before(most):
    rounds = [set(range(0, most, stride)) for stride in round_strides(most).values()]
    assert [len(chosen) for chosen in rounds] == [*round_strides(most)]
    assert rounds[-1] == set(range(most))
    assert all(one < other for one, other in itertools.pairwise(rounds))
    assert len(rounds[0]) >= min(most, 64)


def test_the_first_round_of_2048_instances_has_64():
    assert round_strides(2048) == {64: 32, 128: 16, 256: 8, 512: 4, 1024: 2, 2048: 1}


def test_the_error_is_the_largest_paired_one_and_the_change_that_between_any_two():
    generator = np.random.default_rng(0)
    instances = generator.normal(size=128) + generator.normal(size=(3, 128)) * [[0.1], [0.2], [0.4]]
    instances[1] += 5
    sizes = group_sizes(128)
    groups = np.repeat(np.arange(64), sizes)
    values = instances.mean(axis=1)
    left_out = np.stack([[row[groups != g].mean() for g in range(64)] for row in instances])
    precision = curve_precision(values, left_out, sizes)
    pairs = [
        paired_difference(values[0], left_out[0], values[c], left_out[c], sizes)[1] for c in (1, 2)
    ]
    assert precision.error == pytest.approx(float(max(pairs)))
    assert precision.change == pytest.approx(np.ptp(values))


def test_the_rule_stops_where_the_error_is_small_enough_and_goes_as_far_as_it_must():
    precision = CurvePrecision(change=10.0, error=0.4)
    assert next_round(64, 2048, precision, wanted_error=0.4) is None
    assert next_round(64, 2048, precision, wanted_error=0.39) == 128
    assert next_round(64, 2048, precision, wanted_error=0.2) == 512  # 256 would just about do
    assert next_round(64, 2048, precision, wanted_error=0.01) == 2048
    assert next_round(2048, 2048, precision, wanted_error=0.01) is None


@pytest.mark.parametrize("error", [math.nan, math.inf])
def test_an_error_that_is_not_known_is_never_small_enough(error):
    assert next_round(64, 2048, CurvePrecision(1.0, error), wanted_error=1.0) == 2048


def test_a_flat_curve_has_no_change_to_take_a_share_of():
    precision = CurvePrecision(change=0.0, error=0.1)
    wanted = precision.wanted_error(share=0.01, absolute=None)
    assert next_round(64, 2048, precision, wanted) == 2048
