"""The forecast of what measuring costs."""

from __future__ import annotations

import pytest

from ke_ray.callbacks.cost import plan_cost
from ke_ray.errors import ConfigError

STEP = {"num_tokens": 4096, "tokens_per_step": 65_536, "max_share": 0.01, "every": None}


def test_the_interval_is_the_smallest_within_the_share() -> None:
    cost = plan_cost(**STEP, trained_share=1.0)
    assert cost.steps == pytest.approx(4096 / 65_536 / 3)  # a forward pass is a third of a step
    assert cost.every == 3
    assert cost.share <= 0.01 < cost.steps / (cost.every - 1)
    # Without gradients of weights a step is two passes, and a measurement half of it.
    assert plan_cost(**STEP, trained_share=0.0).steps == pytest.approx(4096 / 65_536 / 2)


def test_an_interval_that_costs_too_much_is_refused_with_one_that_does_not() -> None:
    with pytest.raises(ConfigError, match=r"every=2 .* 1 % .*every=3 or more"):
        plan_cost(**STEP | {"every": 2}, trained_share=1.0)
    assert plan_cost(**STEP | {"every": 3}, trained_share=1.0).every == 3
    assert plan_cost(**STEP | {"every": 2, "max_share": 0.02}, trained_share=1.0).every == 2


def test_the_cost_cannot_be_told_without_the_tokens_of_a_step() -> None:
    for tokens, message in ((None, "Give the number of tokens of one"), (0, "at least 1")):
        with pytest.raises(ConfigError, match=message):
            plan_cost(**STEP | {"tokens_per_step": tokens}, trained_share=1.0)


def test_the_forecast_says_what_it_is_made_from() -> None:
    text = str(plan_cost(**STEP, trained_share=1.0))
    assert all(part in text for part in ("4,096", "65,536", "every 3 steps", "0.69 %"))
