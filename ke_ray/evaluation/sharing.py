"""Forward passes of an evaluation, shared among the workers that train a model.

Every worker plans the same passes, runs its part of them, and sums of its results over all workers
are what one worker would have. Passes are dealt out from the most expensive to the cheapest, so
that workers finish within about one pass of each other. A sharded model gathers its weights in
every pass: its workers make the same number, and one that has fewer makes another for the others.

Workers meet after every ``PASSES_BETWEEN`` passes, so that none waits for long at the end, and none
goes on without one that failed. Only tensors travel.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from ke_ray.errors import DataError
from ke_ray.models.sharded import is_sharded

#: Far fewer than a process group's timeout allows, and too many for the meeting to cost anything.
PASSES_BETWEEN = 32

#: What a pass costs beyond its tokens (weights read once, kernels launched), in tokens.
PASS_OVERHEAD = {"cpu": 32, "cuda": 4096}
#: What it costs at least where weights are gathered (measured: 200 tokens of a CPU, over gloo).
_GATHERING = 256

#: Of the error that a worker raises because another one failed.
PEER_FAILED = "failed in its part of an evaluation"

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

    def tokens_per_pass(self, num_tokens: int, model: nn.Module, at_most: int) -> int:
        """Tokens of a pass with which workers that share ``num_tokens`` end soonest.

        Of b tokens a pass, each worker's overheads are num_tokens / (size · b) · overhead, and the
        last worker ends half a pass after the first: 2 · num_tokens · overhead / size = b².
        """
        if self.size == 1:
            return at_most
        overhead = PASS_OVERHEAD["cpu" if next(model.parameters()).device.type == "cpu" else "cuda"]
        if is_sharded(model):
            overhead = max(overhead, _GATHERING)
        return max(1, min(at_most, round(math.sqrt(2 * num_tokens * overhead / self.size))))

    def rows_per_pass(self, num_rows: int, at_most: int) -> int:
        """Rows of a pass with which every worker makes as few passes as it can, of like size."""
        if self.size == 1:
            return at_most
        num_rounds = math.ceil(num_rows / (self.size * at_most))
        return math.ceil(num_rows / (self.size * num_rounds))


def share(
    passes: Sequence[PassT],
    forward: Callable[[PassT], ResultT],
    model: Any,
    workers: Workers,
    cost: Callable[[PassT], float],
    filler: PassT | None = None,
    content: Callable[[], bytes] = bytes,
) -> Iterator[tuple[PassT, ResultT]]:
    """Run this worker's part of the passes; consume it to the end on every worker.

    Args:
        passes: the same on every worker.
        forward: runs a pass through ``model``; may be called once more for the others' sake.
        cost: of a pass, in any unit.
        filler: what it is called with then; default: the cheapest pass.
        content: of the passes; the workers' have to agree.

    Yields:
        Each pass of this worker with its result; all of them in order where there is one worker.

    Raises:
        DataError: the workers' passes differ.
        RuntimeError: another worker failed, and raises why.
    """
    if workers.size == 1:
        for each in passes:
            yield each, forward(each)
        return
    device = next(model.parameters()).device
    check_alike([cost(each) for each in passes], content(), device)
    if not passes:
        return
    order = sorted(passes, key=cost, reverse=True)
    own = order[workers.rank :: workers.size]
    in_step = is_sharded(model)
    for number in range(math.ceil(len(order) / workers.size)):
        try:
            if number < len(own):
                result = forward(own[number])
            elif in_step:
                forward(order[-1] if filler is None else filler)
        except Exception:
            if not in_step:  # else the others are within the pass: they see this process end
                _failed(True, workers, device)
            raise
        if number < len(own):
            yield own[number], result
        if (number + 1) % PASSES_BETWEEN == 0:
            _meet(workers, device)
    _meet(workers, device)


@contextmanager
def together(workers: Workers, device: torch.device) -> Iterator[None]:
    """A block that all workers leave, or none: where one raises, the others do too.

    Raises:
        RuntimeError: another worker raised why.
    """
    try:
        yield
    except Exception:
        if workers.size > 1:
            _failed(True, workers, device)
        raise
    if workers.size > 1:
        _meet(workers, device)


def check_alike(costs: Sequence[float], content: bytes, device: torch.device) -> None:
    """Refuse to go on where workers have different things to do; a meeting of all.

    Raises:
        DataError: on every worker.
    """
    digest = zlib.crc32(content, zlib.crc32(repr(costs).encode()))
    largest = torch.tensor([digest, -digest], dtype=torch.float64, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    if largest[0] != -largest[1]:
        raise DataError(
            "The workers have different items to evaluate; make facts, tasks and texts the same "
            "files on every node."
        )


def _meet(workers: Workers, device: torch.device) -> None:
    if failed := _failed(False, workers, device):
        raise RuntimeError(  # no error of ours: whether another attempt helps, the other one says
            f"Worker {', '.join(map(str, failed))} of {workers.size} {PEER_FAILED}; its own "
            "message says why."
        )


def _failed(has_failed: bool, workers: Workers, device: torch.device) -> list[int]:
    """The workers that failed; a meeting of all."""
    flags = torch.zeros(workers.size, device=device)
    flags[workers.rank] = float(has_failed)
    dist.all_reduce(flags)
    return flags.nonzero().flatten().tolist()
