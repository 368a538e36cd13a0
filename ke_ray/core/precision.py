"""Precision of float32 products: PyTorch's process-wide setting, for the time of a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def matmul_precision(value: str) -> Iterator[None]:
    """Form float32 products in PyTorch's precision ``highest`` or ``high`` (TF32 where there is).

    What ke_ray sums itself is formed in ``highest`` whatever the model's own products are in: TF32
    keeps 10 bits of each factor.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(value)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
