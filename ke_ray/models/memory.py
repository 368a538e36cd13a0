"""Scoring and loading where memory is short: a smaller batch, then a message with the numbers."""

from __future__ import annotations

import gc
import logging
from typing import TYPE_CHECKING, Any

import psutil

from ke_ray.errors import DeviceMemoryError

if TYPE_CHECKING:
    import torch

    from ke_ray.core.statistics import GroupSums

log = logging.getLogger(__name__)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or a CPU; torch has no exception type for the CPU."""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def free_memory(device: torch.device) -> None:
    """Give back what nothing refers to, so that another allocation may succeed."""
    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def memory_of(device: torch.device) -> str:
    """What a device has, for messages."""
    import torch

    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
    else:
        memory = psutil.virtual_memory()
        free, total = memory.available, memory.total
    return f"{device} has {free / 1e9:.2f} GB free of {total / 1e9:.2f}"


def score_within_memory(
    model: Any, input_ids: Any, lengths: Any, *, batch_size: int, **keys: Any
) -> tuple[GroupSums, int]:
    """``score_instances``; where memory runs out, again from the start with half the batch.

    Returns:
        The sums, and the batch size that they were formed with, for the next call.

    Raises:
        DeviceMemoryError: a batch of one instance does not fit.
    """
    from ke_ray.models.scoring import score_instances

    device = next(model.parameters()).device
    while True:
        try:
            sums = score_instances(model, input_ids, lengths, batch_size=batch_size, **keys)
            return sums, batch_size
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).strip().splitlines()[0][:200]
        # Outside the handler: its traceback keeps the failed batch's tensors alive.
        free_memory(device)
        if batch_size == 1:
            weights = sum(p.numel() * p.element_size() for p in model.parameters())
            raise DeviceMemoryError(
                f"One instance of {input_ids.shape[1]:,} tokens does not fit beside "
                f"{weights / 1e9:.2f} GB of weights: {memory_of(device)} ({reason}). Use a device "
                "with more memory, dtype bfloat16, shorter instances (sequence_length) or fewer "
                "scorers (num_actors)."
            )
        batch_size = batch_size // 2
        log.warning("Out of memory (%s); going on with batches of %d.", reason, batch_size)
