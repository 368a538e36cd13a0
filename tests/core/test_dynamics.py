from __future__ import annotations

import math

import numpy as np
import pytest

from ke_ray.core.dynamics import (
    decay_constant,
    dynamics,
    effectivity_intervals,
)
from ke_ray.core.intervals import hall_interval


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
    assert dynamics([0, 100], [-5.0, -3.0], []) == ()


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


def test_effectivity_has_halls_interval_over_paragraphs() -> None:
    generator = np.random.default_rng(1)
    steps, curve = _decaying_run([20, 80], 140, rise=0.5, decay=0.1)
    gains = 1 + generator.normal(0, 0.3, 6)
    paragraphs = -5.0 + (curve + 5.0)[:, None] * gains
    entries = dynamics(steps, paragraphs.mean(axis=1), [20, 80])
    first, second = effectivity_intervals(steps, paragraphs, entries)
    expected = hall_interval(0.5 * gains)
    assert first.value == pytest.approx(0.5 * gains.mean(), rel=1e-9)
    assert (first.low, first.high) == pytest.approx(expected, rel=1e-9)
    assert second.high - second.low == pytest.approx(first.high - first.low, rel=1e-9)


def test_intervals_are_nan_without_dynamics_and_with_one_paragraph() -> None:
    entries = dynamics([0, 10], [-4.5, -3.5], [10])
    (none,) = effectivity_intervals([0, 10], [[-5.0, -4.0], [-4.0, -3.0]], entries)
    assert math.isnan(none.value)
    assert math.isnan(none.high)
    entries = dynamics([0, 1, 2], [-5.0, -4.0, -4.5], [1])
    (one,) = effectivity_intervals([0, 1, 2], [[-5.0], [-4.0], [-4.5]], entries)
    assert one.value == pytest.approx(1.0)
    assert math.isnan(one.low)


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
        effectivity_intervals([0, 1], [-1.0, -2.0], ())
