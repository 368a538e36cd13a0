"""Device memory: whether it ran out, what can be given back, and its numbers for messages."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or a CPU; torch has no exception type for the CPU."""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    signs = ("DefaultCPUAllocator", "CUDA error: out of memory", "_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


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
