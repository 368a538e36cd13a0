from __future__ import annotations

import math

import numpy as np
import pytest

from ke_ray.core.acquisition import bootstrap_weights, percentile_interval
from ke_ray.core.dynamics import (
    decay_constant,
    dynamics,
    dynamics_intervals,
    pooled_decay,
)


def _decaying_run(
    injections: list[int], num_steps: int, rise: float, decay: float, floor: float = -5.0
) -> tuple[np.ndarray, np.ndarray]:
    """A probe after every update. The injecting update and the 9 after it raise ℓ linearly to
    `rise`; afterwards the gain is rise · (1 − decay · ln lag)."""
    steps = np.arange(num_steps + 1)
    values = np.full(num_steps + 1, floor)
    for step in injections:
        base = values[step - 1]
        for s in range(step, num_steps + 1):
            lag = s - (step + 9)
            gain = rise * (1 - decay * math.log(lag)) if lag > 0 else rise * (s - step + 1) / 10
            values[s] = base + gain
    return steps, values


def test_recovers_effectivity_lam_and_decay_of_a_constructed_run() -> None:
    steps, values = _decaying_run([160, 320], 480, rise=0.5, decay=0.12)
    result = dynamics(steps, values, [160, 320])
    for entry, step in zip(result, (160, 320), strict=True):
        assert entry.step == step
        assert entry.baseline_step == step - 1
        # lag 1 after the maximum is as high as the maximum itself (ln 1 = 0): the first is taken
        assert entry.lam_step == step + 9
        assert entry.effectivity == pytest.approx(0.5)
        assert entry.decay == pytest.approx(0.12)
        np.testing.assert_allclose(entry.retainability, 1 - 0.12 * np.log(entry.lags), rtol=1e-12)
    assert result[0].lags.tolist() == list(range(1, 151))  # 170 … 319, before the next injection
    assert result[1].lags.tolist() == list(range(1, 152))  # to the end of the run, 480
    assert pooled_decay(result) == pytest.approx(0.12)


def test_the_probe_at_the_injecting_step_already_holds_the_injection() -> None:
    """Probes every 10 updates: the state after update 160 is not the baseline of injection 160."""
    steps = [140, 150, 160, 170, 180]
    (entry,) = dynamics(steps, [-5.0, -4.9, -4.0, -3.5, -3.8], [160])
    assert (entry.baseline_step, entry.lam_step) == (150, 170)
    assert entry.effectivity == pytest.approx(1.4)
    assert entry.lags.tolist() == [10]
    assert entry.retainability.tolist() == pytest.approx([1.1 / 1.4])
    assert math.isnan(entry.decay)


def test_the_maximum_is_looked_for_within_the_window_only() -> None:
    """t_i = 159 is the state entering step 160; the window holds the 50 states 160 … 209."""
    steps = np.arange(100, 261)
    values = np.where(steps < 160, -5.0, -4.0) + 0.001 * (steps - 160)
    (entry,) = dynamics(steps, values, [160])
    assert entry.lam_step == 209
    (short,) = dynamics(steps, values, [160], window=5)
    assert short.lam_step == 164
    assert short.lags.tolist() == list(range(1, 97))


def test_the_next_injection_ends_the_window_and_the_curve() -> None:
    steps = np.arange(0, 61)
    values = steps * 0.1 - 9.0
    first, second = dynamics(steps, values, [10, 30])
    assert first.lam_step == 29
    assert first.lags.size == 0
    assert second.lam_step == 60
    assert second.baseline_step == 29


def test_an_injection_at_the_last_step_has_no_dynamics() -> None:
    steps = np.arange(0, 1601, 10)
    values = np.linspace(-5, -3, steps.size)
    result = dynamics(steps, values, [160, 1600])
    assert result[0].lam_step is not None
    last = result[1]
    assert last.step == 1600
    assert (last.baseline_step, last.lam_step) == (None, None)
    assert math.isnan(last.effectivity)
    assert math.isnan(last.decay)
    assert last.lags.size == last.retainability.size == 0


def test_without_probes_between_injections_there_are_no_dynamics() -> None:
    result = dynamics([0, 100], [-5.0, -3.0], [10, 20, 30])
    assert [entry.lam_step for entry in result] == [None, None, None]
    assert math.isnan(pooled_decay(result))
    assert dynamics([0, 100], [-5.0, -3.0], []) == ()
    assert math.isnan(pooled_decay(()))


def test_without_a_probe_before_the_injection_there_are_no_dynamics() -> None:
    (entry,) = dynamics([5, 6, 7], [-5.0, -4.0, -4.5], [5])
    assert entry.lam_step is None
    (entry,) = dynamics([0, 1, 2, 3], [-5.0, -4.0, -4.5, -4.6], [1])
    assert (entry.baseline_step, entry.lam_step) == (0, 1)


@pytest.mark.parametrize("rise", [0.0, -0.4])
def test_retainability_is_undefined_where_nothing_was_acquired(rise: float) -> None:
    steps = np.arange(0, 61)
    values = np.where(steps < 20, -5.0, -5.0 + rise)
    (entry,) = dynamics(steps, values, [20])
    assert entry.effectivity == pytest.approx(rise)
    assert entry.lags.size == entry.retainability.size == 0
    assert math.isnan(entry.decay)


def test_decay_constant_equals_numpy_polyfit() -> None:
    generator = np.random.default_rng(0)
    lags = np.array([1, 2, 5, 10, 40, 100])
    kept = 1 - 0.1 * np.log(lags) + generator.normal(0, 0.05, 6)
    slope, _ = np.polyfit(np.log(lags), kept, 1)
    assert decay_constant(lags, kept) == pytest.approx(-slope, rel=1e-10)
    assert math.isnan(decay_constant([3, 3], [0.5, 0.6]))
    assert math.isnan(decay_constant([], []))


def test_intervals_cover_what_paragraphs_vary() -> None:
    generator = np.random.default_rng(1)
    steps, curve = _decaying_run([20, 80], 140, rise=0.5, decay=0.1)
    gains = 1 + generator.normal(0, 0.3, 40)
    paragraphs = -5.0 + (curve + 5.0)[:, None] * gains
    result = dynamics_intervals(steps, paragraphs, [20, 80], num_resamples=300, seed=1)
    half = 1.96 * 0.5 * gains.std() / math.sqrt(40)
    for interval in result.effectivity:
        assert interval.value == pytest.approx(0.5 * gains.mean(), rel=1e-9)
        assert interval.low == pytest.approx(interval.value - half, abs=0.25 * half)
        assert interval.high == pytest.approx(interval.value + half, abs=0.25 * half)
    # Every paragraph keeps the same shares, so the decay does not depend on the sample.
    assert result.decay.low == pytest.approx(0.1, rel=1e-9)
    assert result.decay.high == pytest.approx(0.1, rel=1e-9)
    again = dynamics_intervals(steps, paragraphs, [20, 80], num_resamples=300, seed=1)
    assert again == result


@pytest.mark.parametrize("every", [1, 7])
def test_all_resamples_at_once_equal_one_after_another(every: int) -> None:
    """To the last bit, over resamples with different maxima, none, and nothing acquired."""
    generator = np.random.default_rng(every)
    steps = np.arange(0, 80 * every, every)
    injected = [1, 30, 31, 55 * every, int(steps[-1])]
    drift = generator.normal(0.02, 0.1, (80, 9)).cumsum(axis=0)
    paragraphs = -5.0 + drift + generator.normal(0, 0.3, (80, 9))
    drawn = [
        dynamics(steps, curve, injected) for curve in bootstrap_weights(9, 100, 3) @ paragraphs.T
    ]
    assert len({tuple(entry.lam_step for entry in one) for one in drawn}) > 10
    assert any(entry.effectivity <= 0 for one in drawn for entry in one)
    result = dynamics_intervals(steps, paragraphs, injected, num_resamples=100, seed=3)
    for number, interval in enumerate(result.effectivity):
        each = percentile_interval(
            interval.value, [one[number].effectivity for one in drawn], level=0.95
        )
        np.testing.assert_array_equal([*vars(interval).values()], [*vars(each).values()])
    each = percentile_interval(result.decay.value, [pooled_decay(one) for one in drawn], 0.95)
    assert result.decay == each


def test_intervals_are_nan_without_dynamics_and_with_one_paragraph() -> None:
    none = dynamics_intervals([0, 10], [[-5.0, -4.0], [-4.0, -3.0]], [10], num_resamples=20)
    assert math.isnan(none.effectivity[0].value)
    assert math.isnan(none.decay.high)
    one = dynamics_intervals([0, 1, 2], [[-5.0], [-4.0], [-4.5]], [1], num_resamples=20)
    assert one.effectivity[0].value == pytest.approx(1.0)
    assert math.isnan(one.effectivity[0].low)


def test_malformed_input_is_refused() -> None:
    with pytest.raises(ValueError, match="differ"):
        dynamics([0, 1], [-1.0], [1])
    with pytest.raises(ValueError, match="ascend"):
        dynamics([1, 0], [-1.0, -2.0], [1])
    with pytest.raises(ValueError, match="ascend"):
        dynamics([0, 1], [-1.0, -2.0], [5, 5])
    with pytest.raises(ValueError, match="window"):
        dynamics([0, 1], [-1.0, -2.0], [1], window=0)
    with pytest.raises(ValueError, match="n_paragraphs"):
        dynamics_intervals([0, 1], [-1.0, -2.0], [1])
