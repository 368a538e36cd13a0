"""Learning-rate factors, checkpoint steps and keys that do not fit together."""

from __future__ import annotations

import math

import pytest

from ke_ray.config import validate
from ke_ray.errors import ConfigError
from ke_ray.studies.training import (
    CheckpointSteps,
    PretrainStudy,
    ScheduleSettings,
    TrainingSettings,
)
from ke_ray.training.schedule import learning_rate_factor


def test_the_papers_schedule_warms_up_over_eighty_of_1600_steps() -> None:
    schedule = ScheduleSettings()
    assert schedule.num_warmup_steps(1600) == 80
    factors = [learning_rate_factor(schedule, step, 1600) for step in range(1, 1601)]
    assert factors[0] == pytest.approx(0.1 + 0.9 / 80)
    assert factors[79] == 1.0
    assert factors[80] < 1.0
    # Half-way down the cosine: the mean of its two ends.
    assert factors[839] == pytest.approx((1 + 0.1) / 2)
    assert factors[-1] == pytest.approx(0.1)
    rising, falling = factors[:80], factors[79:]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)


@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "inverse_sqrt"])
def test_every_schedule_stays_between_its_ends(name: str) -> None:
    schedule = ScheduleSettings(name=name, warmup_steps=5, final_factor=0.25, start_factor=0.0)
    factors = [learning_rate_factor(schedule, step, 100) for step in range(1, 101)]
    assert factors[4] == 1.0
    assert max(factors) == 1.0
    assert min(factors[5:]) >= 0.25
    assert math.isclose(factors[0], 0.2)


def test_no_warmup_starts_at_the_decay() -> None:
    schedule = ScheduleSettings(warmup_steps=0)
    assert learning_rate_factor(schedule, 1, 1) == pytest.approx(0.1)
    assert learning_rate_factor(schedule, 1, 1000) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("step", [0, 11])
def test_a_step_outside_the_run_is_refused(step: int) -> None:
    with pytest.raises(ValueError, match=r"outside 1\.\.10"):
        learning_rate_factor(ScheduleSettings(), step, 10)


@pytest.mark.parametrize("spacing", ["log", "linear"])
@pytest.mark.parametrize(("number", "num_steps"), [(8, 8), (10, 200), (12, 13), (1, 5), (30, 1000)])
def test_spaced_checkpoints_are_as_many_as_asked(spacing: str, number: int, num_steps: int) -> None:
    steps = CheckpointSteps(number=number, spacing=spacing).resolve(num_steps)
    assert len(steps) == len(set(steps)) == number
    assert steps == tuple(sorted(steps))
    assert steps[0] >= 1
    assert steps[-1] == num_steps


def test_log_spacing_is_dense_early() -> None:
    steps = CheckpointSteps(number=6, spacing="log", first=1, include_start=True).resolve(32)
    assert steps == (0, 1, 2, 4, 8, 16, 32)


def test_explicit_steps_always_hold_the_last() -> None:
    assert CheckpointSteps(steps=(4, 0, 2)).resolve(9) == (0, 2, 4, 9)
    with pytest.raises(ValueError, match="outside"):
        CheckpointSteps(steps=(10,)).resolve(9)


def test_a_batch_that_does_not_divide_is_one_clear_message() -> None:
    with pytest.raises(ConfigError, match=r"num_workers 2 x micro_batch_size 3.*has 4 rows"):
        validate(
            TrainingSettings,
            {"output": "o", "global_batch_size": 8, "num_workers": 2, "micro_batch_size": 3},
            "study.yaml",
        )
    with pytest.raises(ConfigError, match="not divisible by num_workers 3"):
        validate(
            TrainingSettings,
            {"output": "o", "global_batch_size": 8, "num_workers": 3},
            "study.yaml",
        )


def test_an_unknown_key_names_the_nearest() -> None:
    study = {
        "kind": "pretrain",
        "output": "o",
        "num_steps": 4,
        "model": {"n_layers": 1, "d_model": 8, "d_mlp": 8, "n_heads": 2},
        "data": {"biographies": {}, "vocab_size": 300},
        "optimizer": {"learning_rat": 1.0},
    }
    with pytest.raises(ConfigError, match="Did you mean 'learning_rate'"):
        validate(PretrainStudy, study, "study.yaml")
    with pytest.raises(ConfigError, match=r"exactly one of data\.tokenizer and data\.vocab_size"):
        validate(PretrainStudy, {**study, "optimizer": {}, "data": {"source": "x"}}, "s.yaml")
