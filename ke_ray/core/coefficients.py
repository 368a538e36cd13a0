"""Token means of memory coefficients (the inner mean of Eq. 2, arXiv 2410.01380).

    mean_i = (1/T) Σ_t |C_ti|                     C: input of the FFN's second projection
    relu_i = (1/T) Σ_t |ReLU(g_ti) · u_ti|        A.2: g the gate's pre-activation, u = up(x);
           = (1/T) Σ_t ReLU(u_ti)                 in an ungated FFN u is the pre-activation

Sums run in float32 at least, whatever the dtype of the activations (a bfloat16 sum over 2,048
tokens would keep two digits), and the inputs are only read: the forward pass goes on with them.

On a CPU the absolute values of a few rows go to a buffer that stays in the cache and are summed
by a product with ones, several times faster than ``x.abs().sum(0)``; on an accelerator one fused
reduction reads the activations once.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS = 256  # tokens per block on a CPU: fastest of 64 … 2048 at d_mlp 2048


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 activations, float32 for every other."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class TokenMean:
    """Means over tokens; its only state is the CPU's buffer, which every layer reuses."""

    def __init__(self, *, blocked: bool | None = None) -> None:
        """``blocked``: sum by blocks of rows or by fused reductions; default: by device."""
        self.blocked = blocked
        self._buffer = torch.empty(0, 0)

    def magnitude(self, coefficients: Tensor) -> Tensor:
        """Mean over tokens of |C|: [T, d_mlp] → [d_mlp], ≥ 0, float32 (float64 for float64)."""
        if self._blockwise(coefficients):
            return self._blocks(coefficients, None, rectify=False)
        dtype = accumulation_dtype(coefficients.dtype)
        total = torch.linalg.vector_norm(coefficients, ord=1, dim=0, dtype=dtype)
        return total.div_(coefficients.shape[0])

    def rectified(self, pre_activation: Tensor, up: Tensor | None = None) -> Tensor:
        """Mean over tokens of |ReLU(pre_activation) · up|, shapes as ``magnitude``.

        Args:
            pre_activation: [T, d_mlp], of the gate; without ``up`` that of an ungated FFN.
            up: [T, d_mlp], output of the up projection.
        """
        if self._blockwise(pre_activation):
            return self._blocks(pre_activation, up, rectify=True)
        dtype = accumulation_dtype(pre_activation.dtype)
        values = pre_activation.clamp_min(0.0).to(dtype)
        if up is not None:
            values = values.mul_(up).abs_()
        return values.sum(dim=0).div_(pre_activation.shape[0])

    def _blockwise(self, values: Tensor) -> bool:
        return values.device.type == "cpu" if self.blocked is None else self.blocked

    def _blocks(self, first: Tensor, factor: Tensor | None, *, rectify: bool) -> Tensor:
        num_tokens, d_mlp = first.shape
        dtype = accumulation_dtype(first.dtype)
        if self._buffer.shape[1] != d_mlp or self._buffer.dtype != dtype:
            self._buffer = torch.empty((_ROWS, d_mlp), dtype=dtype, device=first.device)
        ones = torch.ones((1, _ROWS), dtype=dtype, device=first.device)
        total = torch.zeros((1, d_mlp), dtype=dtype, device=first.device)
        for start in range(0, num_tokens, _ROWS):
            stop = min(start + _ROWS, num_tokens)
            rows = self._buffer[: stop - start]
            part = first[start:stop]
            if rectify:
                rows.copy_(part).clamp_min_(0.0)
                if factor is not None:
                    rows.mul_(factor[start:stop]).abs_()
            elif part.dtype == dtype:
                torch.abs(part, out=rows)
            else:
                rows.copy_(part).abs_()
            total.addmm_(ones[:, : stop - start], rows)
        return total[0].div_(num_tokens)
