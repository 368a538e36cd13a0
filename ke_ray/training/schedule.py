"""Learning rate as a factor of its peak.

With S steps, W of them warm-up, start factor a, final factor b and step s = 1 … S (the s-th
update), as OLMo's ``cosine_with_warmup`` counts (docs/science.md#training-recipe)::

    s ≤ W    a + (1 − a) · s / W                                        linear warm-up
    cosine   b + (1 − b) · (1 + cos(π x)) / 2      with x = (s − W) / (S − W)
    linear   b + (1 − b) · (1 − x)
    inverse_sqrt   max(b, sqrt(max(W, 1) / s))
    constant 1
"""

from __future__ import annotations

import math

from ke_ray.studies.training import ScheduleSettings


def learning_rate_factor(schedule: ScheduleSettings, step: int, num_steps: int) -> float:
    """Factor in [0, 1] of the peak learning rate at update ``step`` (1 … ``num_steps``).

    Raises:
        ValueError: ``step`` outside that range.
    """
    if not 1 <= step <= num_steps:
        raise ValueError(f"step {step} is outside 1..{num_steps}")
    warmup = schedule.num_warmup_steps(num_steps)
    if step <= warmup:
        return schedule.start_factor + (1 - schedule.start_factor) * step / warmup
    final = schedule.final_factor
    progress = (step - warmup) / (num_steps - warmup)
    if schedule.name == "cosine":
        return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2
    if schedule.name == "linear":
        return final + (1 - final) * (1 - progress)
    if schedule.name == "inverse_sqrt":
        return max(final, math.sqrt(max(warmup, 1) / step))
    return 1.0
