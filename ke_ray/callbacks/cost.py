"""What measuring costs, beside training: found out before the run, from numbers of tokens.

    symbol   meaning
    d        tokens of D in one measurement
    b        tokens of one training step, over all workers
    t        share of the parameters that are trained

Each token costs one forward pass to measure. To train on, it costs that pass, another for the
gradients of what layers read, and t of another for the gradients of weights. So one measurement
takes the time of

    d / (b · (2 + t))

training steps: a third of d / b where all parameters are trained. What this leaves out: knowledge
entropy ends before the last projection, and gradient checkpointing makes steps longer, so that the
true share is smaller; measures of the logits go through the LM head in float32, and a batch much
smaller than the training's uses a GPU less well, so that it is larger. What it really took stands
in the manifest (``cost``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ke_ray.errors import ConfigError


@dataclass(frozen=True)
class Cost:
    """The forecast.

    Attributes:
        every: steps from one measurement to the next.
        steps: how many training steps one measurement takes as long as.
        num_tokens: of one measurement, d.
        tokens_per_step: b.
    """

    every: int
    steps: float
    num_tokens: int
    tokens_per_step: int

    @property
    def share(self) -> float:
        """Time of measuring as a share of that of training."""
        return self.steps / self.every

    def __str__(self) -> str:
        return (
            f"a measurement of {self.num_tokens:,} tokens takes as long as {self.steps:.2g} steps "
            f"of {self.tokens_per_step:,} tokens; one every {self.every:,} steps, and one at the "
            f"start, is {100 * self.share:.2g} % of the time of training"
        )


def plan_cost(
    *,
    num_tokens: int,
    tokens_per_step: int | None,
    trained_share: float,
    every: int | None,
    max_share: float,
) -> Cost:
    """The forecast for ``every``, or for the smallest one that keeps within ``max_share``.

    Raises:
        ConfigError: ``tokens_per_step`` is not known, or ``every`` would cost too much.
    """
    if tokens_per_step is None:
        raise ConfigError(
            "What measuring costs cannot be told: tokens_per_step is not known. Give the number of "
            "tokens of one training step, over all workers."
        )
    if tokens_per_step < 1:
        raise ConfigError(f"tokens_per_step is {tokens_per_step}; expected at least 1.")
    steps = num_tokens / (tokens_per_step * (2 + trained_share))
    least = max(1, math.ceil(steps / max_share - 1e-9))
    cost = Cost(least if every is None else every, steps, num_tokens, tokens_per_step)
    if cost.every < least:
        raise ConfigError(
            f"every={every} costs too much: {cost}, and max_share allows {100 * max_share:.2g} %. "
            f"Give every={least} or more, a smaller D, or a larger max_share."
        )
    return cost
