from __future__ import annotations

import math

import numpy as np
import pytest

from ke_ray.core.acquisition import (
    TaskScore,
    acquisition,
    acquisition_interval,
    bootstrap_weights,
    forgetting,
    forgetting_interval,
    knowledge,
    mean_accuracy,
    paragraph_means,
    percentile_interval,
)


def test_acquisition_is_positive_for_a_gain_of_a_negative_log_probability() -> None:
    """The paper's baseline at 738k: K after training −0.301 and A = 18.8 % mean K_PT ≈ −0.371."""
    before = -0.301 / (1 - 0.188)
    assert acquisition(before, -0.301) == pytest.approx(0.188)
    assert acquisition(-2.0, -1.0) == 0.5
    assert acquisition(-2.0, -3.0) == -0.5
    assert acquisition(-2.0, -2.0) == 0.0
    assert math.isnan(acquisition(0.0, -1.0))


def test_forgetting_is_positive_for_a_loss_of_accuracy() -> None:
    assert forgetting(0.6, 0.54) == pytest.approx(0.1)
    assert forgetting(0.5, 0.55) == pytest.approx(-0.1)
    assert math.isnan(forgetting(0.0, 0.1))


def test_knowledge_is_a_mean_of_paragraph_means_not_of_probes() -> None:
    labels, means = paragraph_means([-1.0, -3.0, -5.0, -7.0, -9.0], ["b", "b", "a", "b", "a"])
    assert labels == ["b", "a"]
    assert means.tolist() == pytest.approx([-11 / 3, -7.0])
    assert knowledge(means) == pytest.approx((-11 / 3 - 7) / 2)


def test_once_and_paraphrase_are_weighted_by_their_count() -> None:
    generator = np.random.default_rng(0)
    once, paraphrase = generator.normal(-3, 1, 60), generator.normal(-2, 1, 70)
    weighted = (60 * once.mean() + 70 * paraphrase.mean()) / 130
    assert knowledge(np.concatenate([once, paraphrase])) == pytest.approx(weighted, rel=1e-14)


def test_bad_paragraphs_are_refused() -> None:
    with pytest.raises(ValueError, match="paragraph labels"):
        paragraph_means([-1.0], ["a", "b"])
    with pytest.raises(ValueError, match="paragraph labels"):
        paragraph_means([], [])
    with pytest.raises(ValueError, match="give at least one"):
        knowledge([])
    with pytest.raises(ValueError, match="give at least one"):
        mean_accuracy([])


def test_bootstrap_weights_are_resamples() -> None:
    weights = bootstrap_weights(7, 500, seed=1)
    assert weights.shape == (500, 7)
    np.testing.assert_allclose(weights.sum(axis=1), 1.0, rtol=1e-14)
    np.testing.assert_allclose(weights * 7, np.round(weights * 7), atol=1e-12)
    np.testing.assert_allclose(weights.mean(axis=0), 1 / 7, atol=0.025)
    assert np.array_equal(weights, bootstrap_weights(7, 500, seed=1))
    assert not np.array_equal(weights, bootstrap_weights(7, 500, seed=2))


def test_strata_keep_their_number_in_every_resample() -> None:
    labels = ["once", "paraphrase", "once", "once", "paraphrase"]
    weights = bootstrap_weights(5, 200, seed=0, strata=labels)
    once = np.array([label == "once" for label in labels])
    np.testing.assert_allclose(weights[:, once].sum(axis=1), 3 / 5, rtol=1e-12)
    with pytest.raises(ValueError, match="label for each"):
        bootstrap_weights(5, 2, seed=0, strata=labels[:4])


def test_acquisition_interval_agrees_with_theory() -> None:
    """For K_PT fixed, A is a mean over |K_PT|: the interval is ± 1.96 SD / sqrt(n)."""
    generator = np.random.default_rng(1)
    before = np.full(400, -2.0)
    after = before + generator.normal(0.5, 0.4, 400)
    result = acquisition_interval(before, after, num_resamples=4000, seed=5)
    gain = (after - before) / 2.0
    half = 1.96 * gain.std() / 20
    assert result.value == pytest.approx(gain.mean(), rel=1e-12)
    assert result.low == pytest.approx(gain.mean() - half, abs=0.1 * half)
    assert result.high == pytest.approx(gain.mean() + half, abs=0.1 * half)


def test_acquisition_interval_is_paired_and_seeded() -> None:
    generator = np.random.default_rng(2)
    before = generator.normal(-3.0, 1.0, 100)
    after = 0.8 * before  # every paragraph gains a fifth: A does not depend on the sample
    result = acquisition_interval(before, after)
    assert result.value == pytest.approx(0.2)
    assert (result.low, result.high) == pytest.approx((0.2, 0.2))
    noisy = after + generator.normal(0, 0.3, 100)
    assert acquisition_interval(before, noisy, seed=1) == acquisition_interval(
        before, noisy, seed=1
    )
    assert acquisition_interval(before, noisy, seed=1) != acquisition_interval(
        before, noisy, seed=2
    )


def test_acquisition_interval_within_settings_is_narrower_when_settings_differ() -> None:
    settings = ["once"] * 50 + ["paraphrase"] * 50
    before = np.full(100, -2.0)
    after = before + np.repeat([0.1, 1.5], 50) + np.random.default_rng(3).normal(0, 0.1, 100)
    pooled = acquisition_interval(before, after)
    within = acquisition_interval(before, after, strata=settings)
    assert within.value == pooled.value
    assert within.high - within.low < 0.4 * (pooled.high - pooled.low)
    assert within.low < within.value < within.high


def test_a_wider_level_gives_a_wider_interval() -> None:
    generator = np.random.default_rng(4)
    before, after = generator.normal(-3, 1, 40), generator.normal(-2, 1, 40)
    narrow = acquisition_interval(before, after, level=0.5)
    wide = acquisition_interval(before, after, level=0.99)
    assert wide.low < narrow.low < narrow.value < narrow.high < wide.high


@pytest.mark.parametrize("count", [1, 2, 3])
def test_up_to_three_paragraphs_have_a_value_but_no_interval(count: int) -> None:
    result = acquisition_interval([-2.0, -4.0, -3.0][:count], [-1.0, -2.5, -2.0][:count])
    assert result.value == pytest.approx([0.5, 2.5 / 6, 3.5 / 9][count - 1])
    assert math.isnan(result.low)
    assert math.isnan(result.high)


def test_a_setting_of_one_paragraph_is_resampled_with_the_others() -> None:
    before, after = [-2.0, -3.0, -4.0, -2.5], [-1.5, -2.0, -3.9, -2.0]
    alone = acquisition_interval(before, after, strata=["once", *["paraphrase"] * 3])
    assert alone == acquisition_interval(before, after)
    assert alone.low < alone.value < alone.high


@pytest.mark.parametrize("sizes", [(4,), (2, 2), (3, 2), (3, 3), (4, 3)])
def test_resamples_without_spread_do_not_widen_the_interval(sizes: tuple[int, ...]) -> None:
    """A resample of one paragraph alone has no error; its rounding once stood for one."""
    rng = np.random.default_rng(0)
    strata = [
        name for name, size in zip(("once", "paraphrase"), sizes, strict=False) for _ in range(size)
    ]
    for _ in range(20):
        before = -3 + 0.5 * rng.standard_normal(sum(sizes))
        interval = acquisition_interval(
            before, before + 1 + 0.3 * rng.standard_normal(sum(sizes)), strata=strata
        )
        assert interval.high - interval.low < 1e3


def test_paragraphs_that_do_not_pair_are_refused() -> None:
    with pytest.raises(ValueError, match="do not pair"):
        acquisition_interval([-2.0, -1.0], [-1.0])


def test_undefined_draws_are_left_out_until_they_are_half() -> None:
    draws = np.array([1.0, 2.0, 3.0, np.nan])
    assert percentile_interval(2.0, draws, 0.5).low == pytest.approx(1.5)
    assert math.isnan(percentile_interval(2.0, [1.0, np.nan], 0.5).low)
    assert math.isnan(percentile_interval(2.0, [], 0.5).high)


def _score(task: str, items: np.ndarray, *, keep: bool) -> TaskScore:
    accuracy = float(items.mean())
    stderr = float(items.std(ddof=1) / math.sqrt(items.size))
    return TaskScore(task, accuracy, stderr, items if keep else None)


def test_forgetting_interval_from_standard_errors_agrees_with_error_propagation() -> None:
    before = [TaskScore("a", 0.8, 0.01), TaskScore("b", 0.4, 0.02)]
    after = [TaskScore("b", 0.3, 0.02), TaskScore("a", 0.7, 0.01)]
    result = forgetting_interval(before, after, num_resamples=20000)
    assert result.value == pytest.approx(1 / 6)
    se_p = math.hypot(0.01, 0.02) / 2
    half = 1.96 * math.hypot(se_p / 0.6, 0.5 / 0.6**2 * se_p)
    assert result.low == pytest.approx(result.value - half, abs=0.05 * half)
    assert result.high == pytest.approx(result.value + half, abs=0.05 * half)


def test_forgetting_interval_from_items_equals_resampling_item_by_item() -> None:
    generator = np.random.default_rng(5)
    start = (generator.random((2, 200)) < 0.7).astype(float)
    end = np.where(generator.random((2, 200)) < 0.15, 0.0, start)
    before = [_score(name, start[k], keep=True) for k, name in enumerate("ab")]
    after = [_score(name, end[k], keep=True) for k, name in enumerate("ab")]
    result = forgetting_interval(before, after, num_resamples=20000)
    draws = []
    for _ in range(4000):
        rows = generator.integers(0, 200, (2, 200))
        p_start = np.mean([start[k][rows[k]].mean() for k in range(2)])
        p_end = np.mean([end[k][rows[k]].mean() for k in range(2)])
        draws.append(-(p_end - p_start) / p_start)
    low, high = np.quantile(draws, [0.025, 0.975])
    width = high - low
    assert result.low == pytest.approx(low, abs=0.08 * width)
    assert result.high == pytest.approx(high, abs=0.08 * width)


def test_pairing_items_narrows_the_interval() -> None:
    generator = np.random.default_rng(6)
    start = (generator.random(500) < 0.6).astype(int)
    end = np.where(generator.random(500) < 0.05, 1 - start, start)
    paired = forgetting_interval([_score("a", start, keep=True)], [_score("a", end, keep=True)])
    unpaired = forgetting_interval([_score("a", start, keep=True)], [_score("a", end, keep=False)])
    assert paired.value == unpaired.value
    assert paired.high - paired.low < 0.6 * (unpaired.high - unpaired.low)


def test_no_change_in_a_few_items_is_no_proof_that_there_is_none() -> None:
    few, many = np.resize([0, 1], 20), np.resize([0, 1], 2000)
    narrow, wide = (
        forgetting_interval([_score("a", items, keep=True)], [_score("a", items, keep=True)])
        for items in (many, few)
    )
    assert narrow.value == wide.value == 0.0
    assert wide.low < -0.1 < narrow.low < 0.0 < narrow.high < 0.1 < wide.high


def test_forgetting_without_a_standard_error_has_no_interval() -> None:
    result = forgetting_interval([TaskScore("a", 0.5, math.nan)], [TaskScore("a", 0.4, 0.1)])
    assert result.value == pytest.approx(0.2)
    assert math.isnan(result.low)


def test_forgetting_interval_is_seeded_and_free_of_the_order_of_tasks() -> None:
    before = [TaskScore("a", 0.8, 0.01), TaskScore("b", 0.4, 0.02)]
    after = [TaskScore("a", 0.7, 0.01), TaskScore("b", 0.3, 0.02)]
    first = forgetting_interval(before, after, seed=3)
    other = forgetting_interval(before[::-1], after[::-1], seed=3)
    assert (first.low, first.high) == pytest.approx((other.low, other.high), rel=1e-12)
    assert first != forgetting_interval(before, after, seed=4)


def test_tasks_that_do_not_pair_are_refused() -> None:
    a, b = TaskScore("a", 0.5, 0.1), TaskScore("b", 0.5, 0.1)
    for before, after in (([a], [b]), ([a, b], [a]), ([a], [a, a])):
        with pytest.raises(ValueError, match="differ or repeat"):
            forgetting_interval(before, after)
    with pytest.raises(ValueError, match="items"):
        forgetting_interval(
            [_score("a", np.ones(3), keep=True)], [_score("a", np.ones(4), keep=True)]
        )
