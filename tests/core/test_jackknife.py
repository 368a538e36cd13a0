from __future__ import annotations

import math

import numpy as np
import pytest

from ke_ray.core.jackknife import (
    critical_t,
    cut_document_factor,
    document_groups,
    group_of,
    group_sizes,
    paired_difference,
    standard_error,
)


def _replicates(values: np.ndarray, statistic) -> np.ndarray:  # type: ignore[no-untyped-def]
    """Leave-one-group-out values by really leaving instances out."""
    n = len(values)
    groups = group_of(np.arange(n), n)
    return np.array([statistic(values[groups != g]) for g in range(min(64, n))])


def _brute_force(values: np.ndarray, statistic) -> float:  # type: ignore[no-untyped-def]
    """The weighted jackknife as printed, one loop."""
    n = len(values)
    groups = group_of(np.arange(n), n)
    num_groups = min(64, n)
    left_out, weights = [], []
    for g in range(num_groups):
        left_out.append(statistic(values[groups != g]))
        weights.append(1 - int((groups == g).sum()) / n)
    centre = sum(w * x for w, x in zip(weights, left_out, strict=True)) / sum(weights)
    return math.sqrt(sum(w * (x - centre) ** 2 for w, x in zip(weights, left_out, strict=True)))


def _entropy_of_mean(values: np.ndarray) -> float:
    p = values.mean(axis=0) / values.mean(axis=0).sum()
    return float(-(p * np.log(p)).sum())


@pytest.mark.parametrize("n", [2, 7, 63, 64, 65, 100, 127, 128, 300])
def test_equals_a_brute_force_loop_with_equal_and_unequal_groups(n: int) -> None:
    values = np.random.default_rng(n).random((n, 6)) ** 2
    result = standard_error(
        _entropy_of_mean(values), _replicates(values, _entropy_of_mean), group_sizes(n)
    )
    assert float(result) == pytest.approx(_brute_force(values, _entropy_of_mean), rel=1e-9)


@pytest.mark.parametrize("n", [5, 64])
def test_of_a_mean_with_groups_of_one_is_the_textbook_error(n: int) -> None:
    values = np.random.default_rng(0).normal(size=n)
    result = standard_error(values.mean(), _replicates(values, np.mean), group_sizes(n))
    assert float(result) == pytest.approx(values.std(ddof=1) / math.sqrt(n), rel=1e-12)


def test_of_a_mean_with_equal_groups_is_the_error_of_the_group_means() -> None:
    values = np.random.default_rng(1).normal(size=64 * 5)
    result = standard_error(values.mean(), _replicates(values, np.mean), group_sizes(320))
    means = values.reshape(64, 5).mean(axis=1)
    assert float(result) == pytest.approx(means.std(ddof=1) / 8, rel=1e-12)


def test_is_calibrated_when_group_sizes_differ() -> None:
    """n = 96: half of the groups have two instances. The mean of SE² is the true variance 1/n.

    Its sampling error here is 0.3 %: 3,000 variances of 64 groups each.
    """
    n, trials = 96, 3000
    generator = np.random.default_rng(2)
    groups, sizes = group_of(np.arange(n), n), group_sizes(n)
    assert set(sizes.tolist()) == {1, 2}
    values = generator.normal(size=(trials, n))
    group_sums = np.stack([values[:, groups == g].sum(axis=1) for g in range(64)], axis=-1)
    left_out = (values.sum(axis=1)[:, None] - group_sums) / (n - sizes)
    variance = standard_error(values.mean(axis=1), left_out, sizes) ** 2
    assert variance.mean() == pytest.approx(1 / n, rel=0.015)


def test_shapes_are_kept_and_each_value_has_its_own_error() -> None:
    values = np.random.default_rng(3).random((70, 3))
    left_out = np.stack([_replicates(values[:, k], np.mean) for k in range(3)])
    result = standard_error(values.mean(axis=0), left_out, group_sizes(70))
    assert result.shape == (3,)
    for k in range(3):
        assert result[k] == pytest.approx(_brute_force(values[:, k], np.mean), rel=1e-10)


def test_identical_instances_have_no_error() -> None:
    assert float(standard_error(0.1, np.full(64, 0.1), group_sizes(100))) == 0.0


@pytest.mark.parametrize("sizes", [[1], [5, 0], [0, 0]])
def test_fewer_than_two_groups_give_no_error(sizes: list[int]) -> None:
    assert math.isnan(float(standard_error(1.0, np.full(len(sizes), 1.0), sizes)))


def test_groups_without_instances_are_left_out() -> None:
    values = np.random.default_rng(4).random(3)
    left_out = _replicates(values, np.mean)
    full = standard_error(values.mean(), left_out, [1, 1, 1])
    holed = standard_error(values.mean(), np.insert(left_out, 1, np.nan), [1, 0, 1, 1])
    assert float(full) == float(holed)


def test_a_replicate_that_is_not_finite_gives_nan() -> None:
    assert math.isnan(float(standard_error(1.0, [1.0, np.nan, 1.0], [1, 1, 1])))


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="one per group"):
        standard_error(1.0, np.ones(5), np.ones(4))
    with pytest.raises(ValueError, match="cannot pair"):
        paired_difference(1.0, np.ones(4), np.ones(2), np.ones((2, 4)), np.ones(4))


@pytest.mark.parametrize("n", [64, 96, 200])
def test_paired_difference_is_the_jackknife_of_the_difference(n: int) -> None:
    generator = np.random.default_rng(n)
    shared = generator.random((n, 6))
    a, b = shared**2, (shared + 0.01 * generator.random((n, 6))) ** 2
    both = np.concatenate([a, b], axis=1)

    def difference(values: np.ndarray) -> float:
        return _entropy_of_mean(values[:, 6:]) - _entropy_of_mean(values[:, :6])

    value, error = paired_difference(
        _entropy_of_mean(a),
        _replicates(a, _entropy_of_mean),
        _entropy_of_mean(b),
        _replicates(b, _entropy_of_mean),
        group_sizes(n),
    )
    assert float(value) == pytest.approx(difference(both), abs=1e-14)
    assert float(error) == pytest.approx(_brute_force(both, difference), rel=1e-6)
    unpaired = math.hypot(_brute_force(a, _entropy_of_mean), _brute_force(b, _entropy_of_mean))
    assert float(error) < 0.2 * unpaired


def test_a_checkpoint_does_not_differ_from_itself() -> None:
    values = np.random.default_rng(5).random(80)
    left_out = _replicates(values, np.mean)
    value, error = paired_difference(
        values.mean(), left_out, values.mean(), left_out, group_sizes(80)
    )
    assert (float(value), float(error)) == (0.0, 0.0)


@pytest.mark.parametrize("pieces", [1, 2, 3, 5])
def test_groups_of_whole_documents_are_nearly_equal_and_cut_none(pieces: int) -> None:
    document = np.arange(700) // pieces
    sizes = document_groups(document, document)
    bounds = np.cumsum(sizes)
    assert bounds[-1] == 700
    assert (document[bounds[:-1]] > document[bounds[:-1] - 1]).all()
    assert abs(sizes - 700 / 64).max() <= pieces
    assert cut_document_factor(sizes, document) == 1.0


def test_instances_that_share_a_document_at_their_ends_stay_together() -> None:
    first = np.arange(200)
    last = first + (np.arange(200) % 2 == 0)  # 0 and 1 share document 1, 2 and 3 document 3, …
    sizes = document_groups(first, last)
    assert (np.cumsum(sizes) % 2 == 0).all()
    assert len(sizes) == 64


def test_few_long_documents_are_cut_into_equal_groups_and_the_factor_says_how_often() -> None:
    document = np.arange(640) // 160
    sizes = document_groups(document, document)
    assert sizes.tolist() == [10] * 64
    assert cut_document_factor(sizes, document) == pytest.approx(4.0)  # √16: 16 groups a document
    assert document_groups(np.zeros(100), np.zeros(100)).tolist() == group_sizes(100).tolist()


def test_the_factor_is_what_errors_lack_where_documents_repeat_themselves() -> None:
    rng = np.random.default_rng(0)
    sizes, document = group_sizes(64), np.arange(64) // 4
    values = np.repeat(rng.normal(size=(4000, 16)), 4, axis=1)
    left_out = (values.sum(1, keepdims=True) - values) / 63
    errors = standard_error(values.mean(1), left_out, sizes)
    ratio = values.mean(1).std() / np.sqrt((errors**2).mean())
    assert cut_document_factor(sizes, document) == pytest.approx(2.0)
    assert ratio == pytest.approx(2.0, rel=0.05)


def test_is_calibrated_where_groups_are_documents_of_different_lengths() -> None:
    """64 documents of 1 to 20 instances that repeat themselves; the mean is over instances."""
    rng = np.random.default_rng(0)
    values, errors = [], []
    for _ in range(3000):
        sizes = rng.integers(1, 21, 64)
        content = rng.normal(size=64)
        total = (sizes * content).sum()
        left_out = (total - sizes * content) / (sizes.sum() - sizes)
        values.append(total / sizes.sum())
        errors.append(float(standard_error(values[-1], left_out, sizes)))
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(values), rel=0.05)


def test_an_interval_has_more_errors_the_fewer_and_the_less_equal_groups_are() -> None:
    assert critical_t(np.full(64, 3)) == pytest.approx(1.998, abs=5e-4)
    assert critical_t(np.full(10, 3)) == pytest.approx(2.262, abs=5e-4)
    assert critical_t([50, *[1] * 63]) > critical_t([2] * 64)
    assert math.isnan(critical_t([7]))
    assert math.isnan(critical_t([]))
