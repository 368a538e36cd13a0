"""Forward passes of an evaluation, shared among the workers that train a model.

Every worker plans the same passes, runs its part of them, and sums of its results over all workers
are what one worker would have. Passes are dealt out from the most expensive to the cheapest, so
that workers finish within about one pass of each other. A sharded model gathers its weights in
every pass: its workers make the same number, and one that has fewer repeats a pass for the others.

Workers meet after every ``PASSES_BETWEEN`` passes, so that none waits for long at the end, and none
goes on without one that failed. Only tensors travel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ke_ray.models.sharded import is_sharded

#: Far fewer than a process group's timeout allows, and too many for the meeting to cost anything.
PASSES_BETWEEN = 32

#: What a pass costs beyond its tokens (weights read once, kernels launched), in tokens.
PASS_OVERHEAD = {"cpu": 32, "cuda": 4096}

PassT = TypeVar("PassT")
ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class Workers:
    """The processes that evaluate one model together, and which of them this is."""

    rank: int = 0
    size: int = 1

    def sum(self, tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
        """The sum over workers of a tensor on any device, through ``device``; on every worker."""
        if self.size == 1:
            return tensor
        total = tensor.to(device, copy=True)
        dist.all_reduce(total)
        return total.to(tensor.device)

    def tokens_per_pass(self, num_tokens: int, device: torch.device, at_most: int) -> int:
        """Tokens of a pass with which workers that share ``num_tokens`` end soonest.

        With b tokens a pass, each worker's passes cost (num_tokens / size / b) · overhead beside
        the tokens, and the last worker ends up to b tokens after the first.
        """
        if self.size == 1:
            return at_most
        overhead = PASS_OVERHEAD["cpu" if device.type == "cpu" else "cuda"]
        return max(1, min(at_most, round(math.sqrt(num_tokens * overhead / self.size))))

    def rows_per_pass(self, num_rows: int, width: int, device: torch.device, at_most: int) -> int:
        """The same for rows of ``width`` tokens."""
        return max(1, self.tokens_per_pass(num_rows * width, device, at_most * width) // width)


def share(
    passes: Sequence[PassT],
    forward: Callable[[PassT], ResultT],
    model: Any,
    workers: Workers,
    cost: Callable[[PassT], float],
) -> Iterator[tuple[PassT, ResultT]]:
    """Run this worker's part of the passes; consume it to the end on every worker.

    Args:
        passes: the same on every worker.
        forward: runs a pass through ``model``; may be called once more for the others' sake.
        cost: of a pass, in any unit.

    Yields:
        Each pass of this worker with its result; all of them in order where there is one worker.

    Raises:
        RuntimeError: another worker failed, and raises why.
    """
    if workers.size == 1:
        for each in passes:
            yield each, forward(each)
        return
    if not passes:
        return
    order = sorted(passes, key=cost, reverse=True)
    own = order[workers.rank :: workers.size]
    device = next(model.parameters()).device
    in_step = is_sharded(model)
    for number in range(math.ceil(len(order) / workers.size)):
        try:
            if number < len(own):
                result = forward(own[number])
            elif in_step:
                forward(order[-1])
        except Exception:
            if not in_step:  # else the others are within the pass: they see this process end
                _failed(True, workers, device)
            raise
        if number < len(own):
            yield own[number], result
        if (number + 1) % PASSES_BETWEEN == 0:
            _meet(workers, device)
    _meet(workers, device)


def _meet(workers: Workers, device: torch.device) -> None:
    if failed := _failed(False, workers, device):
        raise RuntimeError(  # no error of ours: whether another attempt helps, the other one says
            f"Worker {', '.join(map(str, failed))} of {workers.size} failed in its part of an "
            "evaluation; its own message says why."
        )


def _failed(has_failed: bool, workers: Workers, device: torch.device) -> list[int]:
    """The workers that failed; a meeting of all."""
    flags = torch.zeros(workers.size, device=device)
    flags[workers.rank] = float(has_failed)
    dist.all_reduce(flags)
    return flags.nonzero().flatten().tolist()
